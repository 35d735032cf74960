"""A model behind OpenAI's Batch API: the answers take up to a day, and cost half.

What is under way is recorded in a file before anything is paid for, so that a run that is killed
at any moment takes up its batches when it is started again, and pays for none twice.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plad_fast.data.prompts import Prompt
from plad_fast.data.records import RecordFormat, changed_settings, digest
from plad_fast.errors import UsageError
from plad_fast.pairs.generation.endpoint import chat
from plad_fast.pairs.generation.endpoint.access import one_line
from plad_fast.pairs.generation.endpoint.batch_client import CHAT, BatchClient, UncertainError
from plad_fast.pairs.generation.endpoint.chat_endpoint import Endpoint
from plad_fast.pairs.generation.endpoint.model import (
    EndpointModel,
    as_request,
    read_reply,
    runs_of_samples,
)
from plad_fast.pairs.generation.endpoint.retries import AGAIN, BadReplyError
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.text_model import Answer, Batches, Failure, Wanted

_FORMAT = RecordFormat("plad-fast batches", 1)
_MOST_REQUESTS, _MOST_BYTES = 50_000, 190_000_000  # of a file; the API takes 200 MB
_MOST_TIMES = 3  # that a request is in a batch
_AT_ONCE = 256  # answers between two writes


class BatchModel(EndpointModel):
    """Asks an endpoint every prompt, in batches that may take a day.

    A request that a batch did not get to, or that failed for a reason that may pass, is asked again
    in another batch, up to three times.

    Args:
        endpoint: where to ask. One plain request is made before a batch, at the full price.
        name: for progress and messages.
        record: file for the batches under way. It is removed with the last of them, and must stay
            with the store of the answers until then.

    Raises:
        UsageError: the endpoint is several servers.
    """

    def __init__(self, endpoint: Endpoint, name: str | None, record: Path) -> None:
        if "," in str(endpoint.base_url):
            raise UsageError(f"--batch asks one server, but --base-url is {endpoint.base_url}")
        super().__init__(endpoint, name)
        self._record = record

    def generate_samples(self, wanted: Wanted, sampling: Sampling) -> Batches:
        """Yields answers as batches end.

        Raises:
            UsageError: from this call: as `EndpointModel`, and the record is of other settings.
                From the iterator: the endpoint refuses a batch or is out of reach, a budget does
                not suffice for one, and a batch was cancelled or has an unknown status.
        """
        self.require_settings(sampling)
        return _Run(self, wanted, sampling, self._record).go()


class _Run:
    """The asking for what is wanted, until all of it is settled.

    Raises UsageError for a record that cannot be read, or was made with other settings.
    """

    def __init__(self, model: BatchModel, wanted: Wanted, sampling: Sampling, record: Path) -> None:
        self.model, self.endpoint = model, model.endpoint
        self.wanted, self.sampling, self.record = wanted, sampling, record
        self.client = BatchClient(model.endpoint)
        self.prompts = {_name(prompt): prompt for prompt, _ in wanted}
        self.left = {(prompt.id, sample): "" for prompt, sample in wanted}
        """What is to be had yet, and why the last batch had it not."""
        self.settings = {**model.endpoint.settings(), **sampling.settings()}
        fields = _recorded(record) or {"settings": self.settings, "batches": []}
        if changed := changed_settings(fields["settings"], self.settings):
            raise UsageError(
                f"a batch is under way that was made with other settings ({'; '.join(changed)}); "
                f"run with those once more, or delete {record}, which gives up what was paid for"
            )
        self.batches: list[dict[str, Any]] = fields["batches"]
        """Those under way. `file` is the id of what was uploaded, `batch` that of what was made of
        it, or None where that is not known, `since` the time (Unix) before it was made, and
        `prompts` names whose."""

    def go(self) -> Iterator[list[Answer | Failure]]:
        times: Counter[tuple[str, int]] = Counter()
        while self.left:
            if not self.batches:
                self._submit()
                times.update(self.left.keys())
            while self.batches:
                yield from self._collect()
            if spent := [key for key in self.left if times[key] == _MOST_TIMES]:
                why = f"not had from {_MOST_TIMES} batches; the last time: "
                yield [Failure(i, why + self.left.pop((i, k)), k) for i, k in spent]

    def _write(self) -> None:
        """The batches under way to their file, which goes with the last of them."""
        if self.batches:
            _FORMAT.write(self.record, settings=self.settings, batches=self.batches)
        else:
            self.record.unlink(missing_ok=True)

    def _submit(self) -> None:
        """New batches of what is left."""
        if not self.endpoint.usage.requests:  # else it is known what the endpoint takes
            self.endpoint.require_reply(self.model.trial(self.sampling))
        left = [
            (prompt, sample) for prompt, sample in self.wanted if (prompt.id, sample) in self.left
        ]
        runs = [(prompt, range(sample, sample + 1)) for prompt, sample in left]
        if "n" not in self.endpoint.dialect.refused:
            runs = runs_of_samples(left)
        requests = [as_request(*run, self.sampling) for run in runs]
        self.endpoint.require_budget(requests)
        names = [f"{_name(prompt)}-{run.start}-{run.stop}" for prompt, run in runs]
        bodies = map(self.endpoint.dialect.body, requests)
        for lines in _files(zip(names, bodies, strict=True)):
            file_id = self.client.upload(lines)
            asked = sorted({json.loads(line)["custom_id"].partition("-")[0] for line in lines})
            entry = {"batch": None, "since": int(time.time()), "prompts": asked}
            self.batches.append({"file": file_id, **entry})
            self._write()  # from here on a batch of it may be there
            self._create(self.batches[-1])

    def _create(self, entry: dict[str, Any]) -> None:
        try:
            entry["batch"] = self.client.create(entry["file"])
        except UncertainError:
            raise
        except UsageError:  # there is none
            self.batches.remove(entry)
            self._write()
            raise
        self._write()

    def _collect(self) -> Iterator[list[Answer | Failure]]:
        """What the first recorded batch brings, once it is over; then it is recorded no more."""
        entry = self.batches[0]
        if entry["batch"] is None:  # a kill came between its making, if it was made, and the record
            entry["batch"] = self.client.find(entry["file"], entry["since"])
        if entry["batch"] is None:
            self._create(entry)
        batch = self.client.wait(entry["batch"])
        items: list[Answer | Failure] = []
        for file_id in (batch.output_file_id, batch.error_file_id):
            for line in self.client.lines(file_id):
                items += self._settled(line)
                if len(items) >= _AT_ONCE:
                    yield items
                    items = []
        if items:
            yield items
        # Whoever asked has stored what was yielded.
        self.batches.pop(0)
        self._write()
        if batch.status == "failed":
            errors = getattr(batch.errors, "data", None) or []
            why = "; ".join(dict.fromkeys(str(error.message) for error in errors)) or "no reason"
            raise UsageError(
                f"batch {batch.id} was refused as a whole ({one_line(why, self.client.key)}); "
                "change what that names, then run again"
            )
        if batch.status == "cancelled":
            raise UsageError(
                f"batch {batch.id} was cancelled where it ran; what it had answered is kept: run "
                "again to ask for the rest in a new batch"
            )

    def _settled(self, line: Mapping[str, Any]) -> list[Answer | Failure]:
        """What a line settles of what is left; why it does not is noted there."""
        name, *numbers = str(line.get("custom_id")).split("-")
        if name not in self.prompts or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
            return []  # of a prompt that is asked no more
        prompt, samples = self.prompts[name], range(*map(int, numbers))
        prompt_id = prompt.id
        found = self._read(prompt, samples, line)
        if isinstance(found, str):
            self.left |= {(prompt_id, k): found for k in samples if (prompt_id, k) in self.left}
            return []
        found = [item for item in found if (item.prompt_id, item.sample) in self.left]
        for item in found:
            del self.left[item.prompt_id, item.sample]
        return found

    def _read(
        self, prompt: Prompt, samples: range, line: Mapping[str, Any]
    ) -> list[Answer | Failure] | str:
        """Answers and failures that are final, or why there are none this time."""
        key, response = self.client.key, line.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        if not isinstance(response, dict) or not isinstance(body, dict):
            return _said(line.get("error"), key) or "the batch gave no reply"
        status = response.get("status_code")
        if status != 200:
            said = f"status {status}: {_said(body.get('error') or body, key)}"
            if not isinstance(status, int) or status in AGAIN or status >= 500:
                return said
            return [Failure(prompt.id, said, sample) for sample in samples]
        request, usage = as_request(prompt, samples, self.sampling), self.endpoint.usage
        counted = chat.read_usage(body)
        usage.add(*counted)
        usage.requests += 1
        usage.uncounted += not any(counted)
        try:
            choices = chat.read_choices(
                body,
                key,
                n=request.sampling.n,
                told=True,
                limit=self.endpoint.dialect.limit(request),
                tools=bool(request.tools),
            )
        except BadReplyError as error:
            return one_line(str(error), key)
        usage.replies += 1
        # The samples for which the reply has no choice are left.
        return read_reply(prompt.id, samples[: len(choices)], chat.Reply(choices))


def _recorded(path: Path) -> dict[str, Any] | None:
    """The fields of a record, None where there is none; UsageError for one that cannot be read."""
    fields, problem = _FORMAT.read(path, settings=dict, batches=list)
    if problem == "missing":
        return None
    if problem:
        raise UsageError(
            f"{path} is no record of batches, or is damaged; mend it, or delete it, which gives up "
            "what was paid for"
        )
    return fields


def require_prompts(record: Path, prompts: Sequence[Prompt]) -> None:
    """Raises UsageError where a batch under way has answers to prompts that are none of these,
    which would be lost."""
    batches = (_recorded(record) or {"batches": []})["batches"]
    asked = {name for entry in batches for name in entry["prompts"]}
    if others := asked - set(map(_name, prompts)):
        raise UsageError(
            f"a batch that was paid for is under way for {len(others)} prompts that are asked no "
            f"more or have changed; run with those prompts once more to take its answers, or "
            f"delete {record} to give them up"
        )


def _name(prompt: Prompt) -> str:
    return digest([prompt.id, prompt.digest])


def _files(requests: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[bytes]]:
    """Lines of named requests, as many together as a file may have."""
    lines: list[bytes] = []
    size = 0
    for name, body in requests:
        request = {"custom_id": name, "method": "POST", "url": CHAT, "body": body}
        line = json.dumps(request).encode()
        if lines and (len(lines) == _MOST_REQUESTS or size + len(line) > _MOST_BYTES):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    yield lines


def _said(error: Any, key: str) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error
    return one_line(str(error), key) if error else ""
