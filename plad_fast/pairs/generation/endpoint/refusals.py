"""Parameters of a request that a server refuses, for their name or for their value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

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
