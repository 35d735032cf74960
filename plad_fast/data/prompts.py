"""Prompts: what teacher and student are both asked."""

from __future__ import annotations

import importlib.resources
import itertools
import json
import logging
import os
import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plad_fast.checks import shown
from plad_fast.data.chat import Content, Messages, is_blank, render_prompt
from plad_fast.data.chat_template import ChatTemplate
from plad_fast.data.places import BUILTIN
from plad_fast.data.plain_rows import made_by_arrow, without_nulls
from plad_fast.data.records import digest
from plad_fast.data.rows import read_content, read_tools
from plad_fast.data.tables import Row, Table, read_table, refuse_written_lists
from plad_fast.data.unicode import mend
from plad_fast.errors import UsageError, located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_LISTED = 20  # columns in a message


@dataclass(frozen=True)
class Prompt:
    """One thing to ask."""

    id: str
    """Unique among the prompts of a run; answers are stored, and sampling is seeded, under it."""

    content: Content
    """Plain text or chat messages."""

    reference: str | None = None
    """A reference answer, for evaluation; no model sees it. A blank one is none."""

    tools: Sequence[Mapping[str, Any]] = ()
    """What the model may call, as JSON schemas, beside messages."""

    def __post_init__(self) -> None:
        # They become names, keys and report text; of the content itself nothing is changed.
        for name in ("id", "reference"):
            object.__setattr__(self, name, mend(getattr(self, name)))
        object.__setattr__(self, "tools", tuple(self.tools))
        if isinstance(self.reference, str) and is_blank(self.reference):
            object.__setattr__(self, "reference", None)

    @property
    def digest(self) -> str:
        """Of what is asked: an answer belongs to it."""
        return digest([self.content, self.tools] if self.tools else self.content)

    @property
    def template(self) -> dict[str, Any]:
        """What a chat template gets beside the messages."""
        return {"tools": list(self.tools)} if self.tools else {}

    @property
    def has_tools(self) -> bool:
        """Whether tools may be called, or were in its messages."""
        messages = [] if isinstance(self.content, str) else self.content
        return bool(self.tools) or any(
            message["role"] == "tool" or message.get("tool_calls") for message in messages
        )

    @property
    def written(self) -> Content:
        """What is asked, for a reader, with the tools as a message in front."""
        if not self.tools:
            return self.content
        tools = {"role": "tools", "content": json.dumps(self.tools, ensure_ascii=False)}
        return [tools, *_messages(self.content)]


def load_prompts(
    source: str | os.PathLike[str],
    *,
    prompt_column: str | None = None,
    prompt_template: str | None = None,
    reference_column: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> list[Prompt]:
    """Reads prompts from a file or a hub data set.

    The id of a prompt is the data's `id` column where that is a text or number unique to the row,
    else a hash of the prompt's content, with an ordinal from the second occurrence on. It does not
    depend on `limit`, so a run can be extended.

    Args:
        source: path of a `.jsonl`, `.json`, `.csv` or `.parquet` file, or id of a hub data set,
            `owner/name` or `owner/name:config`.
        prompt_column: column with the prompt, text or a list of `{"role", "content"}` messages;
            `prompt` if neither this nor a template is given.
        prompt_template: text with `{column}` fields (`str.format`) to build the prompt from.
        reference_column: column with a reference answer, null or blank where there is none.
        limit: take only the first so many rows.
        split: split of a hub data set.

    Raises:
        UsageError: the source cannot be read or is empty, a column is missing, a row holds no
            usable prompt, or the options contradict each other.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UsageError(f"limit must be at least 1, not {limit!r}")
    if prompt_column is not None and prompt_template is not None:
        raise UsageError(
            f"prompt_column {prompt_column!r} and prompt_template are both given; give one"
        )
    table = read_table(os.fspath(source), split)
    column = "prompt" if prompt_column is None else prompt_column
    fields = set() if prompt_template is None else _template_fields(table, prompt_template)
    if prompt_template is None:
        advice = "--prompt-column, or build the prompt with --prompt-template"
        _require_column(table, column, advice)
    if reference_column is not None:
        _require_column(table, reference_column, "--reference-column")

    ids = _given_ids(table)
    repeats: Counter[str] = Counter()
    prompts = []
    from_arrow = made_by_arrow(table.rows)
    for index, row in enumerate(itertools.islice(table.rows, limit)):
        row = without_nulls(row) if from_arrow else row
        where = f"{table.source}, row {index + 1}"
        if prompt_template is None:
            content = _as_content(row.get(column), f"{where}, column {column!r}")
        else:
            content = _as_content(_filled(prompt_template, fields, row, where), where)
        tools: Sequence[Mapping[str, Any]] = ()
        if not isinstance(content, str):
            tools = read_tools(row, where)
        elif prompt_template is None and isinstance(row.get("tools"), list) and row["tools"]:
            raise UsageError(
                f"{where} has tools and a prompt of plain text, which passes through no chat "
                'template; write it as messages: [{"role": "user", "content": ...}]'
            )
        if ids is not None:
            prompt_id = ids[index]
        else:
            key = digest([content, tools] if tools else content)
            prompt_id = f"{key}-{repeats[key]}" if repeats[key] else key
            repeats[key] += 1
        reference = None
        if reference_column is not None:
            place = f"{where}, column {reference_column!r}"
            reference = read_reference(row.get(reference_column), place)
        prompts.append(Prompt(prompt_id, content, reference, tools))
    return prompts


def builtin_prompts(name: str = "builtin") -> list[Prompt]:
    """Prompts that ship with the package, by a name in `places.BUILTIN`."""
    with builtin_file(name) as path:
        return load_prompts(path)


def builtin_file(name: str = "builtin") -> AbstractContextManager[Path]:
    """The file of these prompts, each with a written `answer`."""
    file = importlib.resources.files("plad_fast.data").joinpath(BUILTIN[name])
    return importlib.resources.as_file(file)


def as_messages(tokenizer: PreTrainedTokenizerBase, content: Content) -> Content:
    """The content in the form this tokenizer's model is spoken to.

    Plain text becomes a single user message if the tokenizer has a chat template, and is returned
    as it is otherwise. Messages are returned as they are.
    """
    if isinstance(content, str) and tokenizer.chat_template:
        return [{"role": "user", "content": content}]
    return content


def _messages(content: Content) -> Messages:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def wording(content: Content) -> str:
    """Roles and words, by which prompts that differ in white space only are the same."""
    turns = _messages(content)
    return json.dumps([[turn["role"], *(turn.get("content") or "").split()] for turn in turns])


def check_tools(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
    """Raises UsageError where the chat template does not show the tools, calls and results of
    prompts, or a call in an answer."""
    call = {"type": "function", "function": {"name": "probe", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    for prompt in filter(lambda prompt: prompt.has_tools, prompts):
        messages = _messages(prompt.content)
        with located(f"prompt {prompt.id!r}"):
            head = render_prompt(tokenizer, messages, prompt.template)
            if prompt.tools:
                ChatTemplate(tokenizer, prompt.template).whole(messages, answer, head)


def require_unique_ids(prompts: Sequence[Prompt]) -> None:
    """Raises UsageError if two prompts have the same id, since answers are matched by it."""
    counts = Counter(prompt.id for prompt in prompts)
    repeated = [prompt_id for prompt_id, count in counts.items() if count > 1]
    if repeated:
        raise UsageError(
            f"{len(repeated)} prompt ids are used more than once, among them {repeated[0]!r}; "
            "give every prompt its own id"
        )


def _given_ids(table: Table) -> list[str] | None:
    if "id" not in table.columns:
        return None
    values = table.column("id")
    ids = [mend(str(value)) for value in values]
    if all(isinstance(value, (str, int)) for value in values) and len(set(ids)) == len(ids):
        return ids
    logger.warning(
        "%s: the id column is not unique to each row; prompts are identified by their content",
        table.source,
    )
    return None


def _require_column(table: Table, column: str, option: str) -> None:
    if column not in table.columns:
        advice = f"choose one with {option}"
        if len(table.columns) == 1 and (mark := re.search("[;\t|]", table.columns[0])):
            advice = f"if {mark[0]!r} stands between its fields, write commas there"
        raise UsageError(f"{table.source} has no column {column!r}, but {_listed(table)}: {advice}")


def _listed(table: Table) -> str:
    more = len(table.columns) - _MOST_LISTED
    names = ", ".join(map(shown, table.columns[:_MOST_LISTED]))
    return f"{names} and {more} more" if more > 0 else names


def _filled(template: str, fields: Collection[str], row: Row, where: str) -> str:
    if empty := [name for name in fields if row.get(name) is None]:
        raise UsageError(f"{where} has no {empty[0]!r} for the prompt template; fill it in")
    try:
        return template.format(**row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{where} does not fit the prompt template: {error}") from error


def _template_fields(table: Table, template: str) -> set[str]:
    try:
        parsed = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UsageError(
            f"the prompt template is malformed: {error}; write a literal brace twice, {{{{ or }}}}"
        ) from None
    # "{turns[0]}" and "{turn.text}" look into the column that stands first.
    fields = {name.partition("[")[0].partition(".")[0] for name in parsed}
    unknown = fields.difference(table.columns)
    if unknown or not fields:
        problem = f"names {{{min(unknown)}}}, which is no column" if unknown else "names no column"
        raise UsageError(
            f"the prompt template {problem}; {table.source} has {_listed(table)}: write them as "
            "{column}"
        )
    return fields


def _as_content(value: Any, where: str) -> Content:
    content = read_content(value, where)
    if isinstance(content, str):
        refuse_written_lists(content, where)
        asked = [content]
    else:
        if content[-1]["role"] == "assistant":
            raise UsageError(
                f"{where} ends in an assistant message, which leaves nothing to answer; cut it off"
            )
        if any(m["content"] is None and not m.get("tool_calls") for m in content):
            raise UsageError(f"{where} has a message without content; every turn needs a text")
        said = [m for m in content if m["role"] != "system"] or content
        asked = [message["content"] or "" for message in said]
    if all(map(is_blank, asked)):
        raise UsageError(f"{where} holds a blank prompt; fill it in or drop the row")
    return content


def read_reference(value: Any, where: str) -> str | None:
    """A reference answer as it is in the data; raises UsageError unless it is text or null."""
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where} holds a {type(value).__name__}; a reference is text or null")
    return value
