"""Parameters of a request that a server refuses, for their name or for their value, and bodies of
requests without them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from plad_fast.pairs.generation.endpoint.chat import ChatRequest
    from plad_fast.pairs.generation.endpoint.retries import Trouble

logger = logging.getLogger(__name__)

LIMITS = frozenset({"max_tokens", "max_completion_tokens"})

# How servers that speak to another API behind them call the limit.
_LIMIT = re.compile(
    r"\bmax_(?:completion_|output_|new_)?tokens\b|\bmax(?:Output|New|Completion)?Tokens\b"
    r"|\bmax(?:imum)?[ -](?:number of )?(?:completion |output |new )?tokens\b",
    re.IGNORECASE,
)
_OF_NAME = re.compile(
    r"unsupported|not (?:currently )?support|n.t support|unknown|unrecogni[sz]ed|unexpected"
    r"|\bextra[ _](?:input|field|argument|param|forbidden)|not permitted|not allowed|no such"
    r"|not available|unavailable|deprecated|not accept|invalid (?:parameter|argument)s? name"
    r"|not a valid (?:parameter|argument|field)|additional propert|not compatible"
    r"|cannot (?:both )?be (?:used|specified|set)",
    re.IGNORECASE,
)
_OF_VALUE = re.compile(
    r"\brange\b|\bm(?:ax|in)imum\b|\bat (?:most|least)\b|\btoo (?:large|big|high|long|small|low)\b"
    r"|\b(?:less|greater|larger|smaller|lower|higher|more|fewer) than\b|\bexceed|\bbetween\b"
    r"|\bup to\b|\s[<>]=?\s|[<>]=|[≤≥]|\bunsupported value\b|\b(?:below|above)\b"
    r"|\bvalues? (?:of|for|is|was)\b|\blimit\b[^.;]*\d",
    re.IGNORECASE,
)
# A list of errors quotes the value as well, whatever is wrong.
_EXTRA = re.compile(r"\bextra[ _](?:input|field|argument|param|forbidden)", re.IGNORECASE)
_INSTEAD = re.compile(r"\b(?:use|replaced|renamed|instead|in favou?r of)\b", re.IGNORECASE)
# In what a server says of a prompt and of an answer that are too long together.
OF_PROMPT = re.compile(
    r"\binputs\b|\binput[ _](?:tokens|length)|\bprompt\b|\bin the messages\b|\brequested\b"
    r"|\byour request\b|\bcontext length\b",
    re.IGNORECASE,
)
# A name of one letter is only believed where it stands as a name.
_ONE_LETTER = r"""['"`]{0}['"`]|(?:^|\s){0}\s*(?:[=<>:]|must\b|should\b)"""
_ONE_LETTER += r"|\b(?:parameter|of|invalid) {0}\b"


class Refusal(NamedTuple):
    """What is refused; `parameter` is empty where that is not to be found out."""

    parameter: str = ""
    of: Literal["name", "value"] = "value"

    def can_drop(self, sent: Mapping[str, Any], any_temperature: bool) -> bool:
        """Whether the request says the same without the parameter, or by another name of it."""
        if self.parameter == "temperature":
            # Left out, the server's own is used, which is 1 as a rule.
            return any_temperature or (self.of == "name" and sent["temperature"] == 1)
        is_limit_by_name = self.parameter in LIMITS and self.of == "name"
        return is_limit_by_name or self.parameter in ("seed", "n")


def find_refusal(named: object, said: str, sent: Mapping[str, Any]) -> Refusal:
    """What a server does not take that answers a body by status 400 or 422.

    `named` is the parameter that its error names, if it does, and `said` all that the error says.
    """
    limit = next((name for name in sent if name in LIMITS), "")
    others = [n for n in ("seed", "n", "temperature", "top_p") if n in sent]
    if named in others:
        others = [str(named)]
    elif limit and (named in LIMITS or _LIMIT.search(said)):
        return Refusal(limit, _of_limit(limit, said, sent[limit]))
    for name in others:
        pattern = _ONE_LETTER.format(name) if len(name) == 1 else rf"\b{name}\b"
        if named == name or re.search(pattern, said):
            of_name = _OF_NAME.search(said) and not _OF_VALUE.search(said)
            return Refusal(name, "name" if of_name else "value")
    return Refusal()


def _of_limit(limit: str, said: str, value: object) -> Literal["name", "value"]:
    other = next(iter(LIMITS - {limit}))
    quoted = re.search(rf"(?<![\d<]){value}(?!\d)", said) and not _EXTRA.search(said)
    if _OF_VALUE.search(said) or quoted:
        return "value"
    replaced = re.search(rf"\b{other}\b", said) and _INSTEAD.search(said)
    return "name" if replaced or _OF_NAME.search(said) else "value"


class Dialect:
    """The parameters that an endpoint takes.

    Args:
        model: as the endpoint calls it.
        reasoning_tokens: added to the length limit of every request.
        limits: names of the length limit, the one to begin with first.
    """

    def __init__(self, model: str, reasoning_tokens: int, limits: tuple[str, str]) -> None:
        self.model = model
        self.reasoning_tokens = reasoning_tokens
        self.refused: set[str] = set()
        self._limits = limits

    def limit(self, request: ChatRequest) -> int:
        """Tokens that an answer may have, those of reasoning among them."""
        return request.sampling.max_new_tokens + self.reasoning_tokens

    def body(self, request: ChatRequest, had: int = 0) -> dict[str, Any]:
        """The request for what is left to be asked for, where `had` choices have come."""
        named = (name for name in self._limits if name not in self.refused)
        limit = next(named, self._limits[0])
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": sampling.temperature,
            limit: self.limit(request),
        }
        if request.tools:
            body["tools"] = list(request.tools)
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.n - had > 1:
            body["n"] = sampling.n - had
        if not request.any_temperature:
            # Servers that take no `n` are asked again, and must not say the same again.
            body["seed"] = sampling.seed + had
        left_out = self.refused - {limit}  # a request without a limit may cost anything
        if sampling.temperature != 1 and not request.any_temperature:
            left_out.discard("temperature")
        return {name: value for name, value in body.items() if name not in left_out}

    def adapt(self, trouble: Trouble, request: ChatRequest) -> None:
        """Does without the parameter that was refused from now on."""
        name, value = trouble.parameter, request.sampling.temperature
        if name in self.refused:
            return
        self.refused.add(name)
        if name == "temperature" and value != 1:
            what = f"model {self.model!r} takes no temperature of {value:g}: going on at its own"
            logger.warning("%s, so that replies are samples (%s)", what, trouble.reason)
        else:
            logger.info("%s takes no %s: going on without (%s)", self.model, name, trouble.reason)
