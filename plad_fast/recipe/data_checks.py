"""Checks for data from which little or nothing can be learned, before the hours it would cost.

Each check gives findings: a line with a count and an example. Nothing here reads a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from plad_fast.checks import shown
from plad_fast.data.prompts import wording
from plad_fast.data.rows import read_row
from plad_fast.errors import UsageError
from plad_fast.pairs import text_metrics

FEW_PAIRS = 20
"""Below this many pairs a result is noise more than anything; the report counts prompts alike."""

_MOST_ALIKE = 0.5  # share of answers that are one and the same
_ONE_SIDED = 0.95  # share of pairs whose longer answer is on one side
_MUCH_LONGER = 1.5  # mean words of one side by those of the other


@dataclass(frozen=True)
class Finding:
    """Something that the user should look at."""

    text: str
    """One line: what, how often, and an example."""

    hopeless: bool = False
    """Nothing can be learned from such data."""

    def __str__(self) -> str:
        return self.text


def check_rows(
    rows: Sequence[Mapping[str, Any]], what: str = "pairs", *, for_training: bool = True
) -> list[Finding]:
    """Findings on rows of the preference format, with or without rejected responses, called `what`.

    A row that cannot be read is left to those who will refuse it with its number. `for_training` as
    they are, a single row is hopeless; else others may be added to it.
    """
    readable: list[tuple[tuple[str, str], list[str]]] = []
    for row in rows:
        with suppress(UsageError):
            asked, responses, _ = read_row(row)
            text = asked if isinstance(asked, str) else str(asked[-1].get("content"))
            key = (json.dumps(asked, sort_keys=True, default=str), text)
            readable.append((key, [*map(_text, responses)]))
    if not readable:
        return []
    findings = []
    if (count := len(readable)) < FEW_PAIRS:
        few = f"the number of {what} is {count}: below {FEW_PAIRS} a result is noise"
        findings.append(Finding(few, for_training and count == 1))
    findings += check_answers([texts[0] for _, texts in readable], f"chosen answers of the {what}")
    prompts = Counter(prompt for prompt, _ in readable)
    whole = Counter((prompt, *texts) for prompt, texts in readable)
    (copied, *_), _ = whole.most_common(1)[0]
    [(prompt, times)] = prompts.most_common(1)
    if copies := count - len(whole):
        text = f"{copies} of {count} {what} are copies of others, such as {shown(copied[1])}"
        findings.append(Finding(text))
    elif count - len(prompts) > _MOST_ALIKE * count:
        text = f"the {count} {what} have {len(prompts)} different prompts; "
        findings.append(Finding(f"{text}{shown(prompt[1])} stands there {times} times"))
    pairs = [(texts[0], rejected) for _, texts in readable for rejected in texts[1:]]
    return findings + (_check_sides(pairs, what) if pairs else [])


def check_overlap(
    rows: Iterable[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], what: str
) -> list[Finding]:
    """A finding where rows that a training is measured on, called `what`, have prompts of those
    that it is trained on."""
    asked = [*map(_wording, held_out)]
    trained = {*asked}.intersection(map(_wording, rows))  # which holds no others
    shared = [found for found in asked if found and found in trained]
    if not shared:
        return []
    text = f"{len(shared)} of {len(held_out)} {what} have a prompt that is trained on, such as "
    return [Finding(f"{text}{shown(shared[0])}: what was learned by heart looks good there")]


def _wording(row: Mapping[str, Any]) -> str:
    """Of the prompt; empty for a row that cannot be read."""
    with suppress(UsageError):
        return wording(read_row(row)[0])
    return ""


def check_answers(texts: Sequence[str], what: str) -> list[Finding]:
    """Findings on answers of one author, or of one side: all alike, or without a word."""
    findings = []
    counts = Counter(" ".join(text.split()) for text in texts)
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    if len(texts) > 1 and count > _MOST_ALIKE * len(texts):
        alike = f"{count} of {len(texts)} {what} are the same: {shown(text)}"
        findings.append(Finding(alike, hopeless=len(counts) == 1))
    mute = [text for text in texts if not text_metrics.words(text)]
    if mute and len(counts) > 1:
        text = f"{len(mute)} of {len(texts)} {what} hold no word, such as {shown(mute[0])}"
        findings.append(Finding(text))
    return findings


class NothingToLearnError(UsageError):
    """Data from which nothing can be learned."""


def require_learnable(findings: Sequence[Finding], advice: str) -> None:
    """Raises NothingToLearnError where one of the findings is hopeless; it names them all."""
    if any(finding.hopeless for finding in findings):
        listed = "; ".join(finding.text for finding in findings if finding.hopeless)
        raise NothingToLearnError(f"nothing can be learned from this data: {listed}; {advice}")


def show_findings(findings: Sequence[Finding | str]) -> None:
    """Prints what to look at, if there is anything."""
    if findings:
        print("   check your data:", *dict.fromkeys(map(str, findings)), sep="\n   - ", flush=True)


def _check_sides(pairs: Sequence[tuple[str, str]], what: str) -> list[Finding]:
    """How the chosen answers stand to the rejected ones."""
    findings = []
    equal = [a for a, b in pairs if " ".join(a.split()) == " ".join(b.split())]
    if equal:
        text = f"{len(equal)} of {len(pairs)} {what} have the same answer as chosen and as rejected"
        findings.append(Finding(f"{text}: {shown(equal[0])}", len(equal) == len(pairs)))
    mute = [chosen for chosen, rejected in pairs if not text_metrics.words(rejected)]
    if mute:
        text = f"{len(mute)} of {len(pairs)} rejected answers of the {what} hold no word; the first"
        findings.append(Finding(f"{text} stands beside {shown(mute[0])}"))
    lengths = [(len(text_metrics.words(a)), len(text_metrics.words(b))) for a, b in pairs]
    means = [sum(side) / len(pairs) for side in zip(*lengths, strict=True)]
    counts = f"({means[0]:.0f} words to {means[1]:.0f} on average)"
    for longer, shorter, name, share in (
        (*means, "longer", sum(a > b for a, b in lengths) / len(pairs)),
        (*means[::-1], "shorter", sum(a < b for a, b in lengths) / len(pairs)),
    ):
        if len(pairs) >= FEW_PAIRS and share >= _ONE_SIDED and longer > _MUCH_LONGER * shorter:
            text = f"in {share:.0%} of {len(pairs)} {what} the chosen answer is the {name} one"
            findings.append(Finding(f"{text} {counts}: that alone may be what a student learns"))
    return findings


def _text(response: Any) -> str:
    """A response as a text to compare; of a message with more than text, all of it."""
    if isinstance(response, str):
        return response
    last = response[-1]
    if set(last) <= {"role", "content"} and isinstance(last.get("content"), str):
        return last["content"]
    return json.dumps(last, sort_keys=True, default=str)
