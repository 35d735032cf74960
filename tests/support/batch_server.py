"""OpenAI's files and batches on loopback, after the public description of the API."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.fault_server import answer_to
from tests.support.loopback import LoopbackServer, completion, said, send

Outcome = Callable[[str, int], Any]


class BatchServer(LoopbackServer):
    """Listens while the `with` block lasts.

    Args:
        outcome: of a question, and how often it was in a batch before: "answer", "expired", "lost"
            (in no file), a status, or a choice of a reply.
        polls: looks at a batch before it is over.
    """

    methods = ("GET", "POST")

    def __init__(self, outcome: Outcome = lambda question, times: "answer", polls: int = 0) -> None:
        self.outcome, self.polls = outcome, polls
        self.status = ""
        """Of all batches, in place of what they come to."""
        self.faults: list[int] = []
        """Statuses of the next replies, whatever is asked."""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        path = handler.path.partition("?")[0].removeprefix("/v1")
        kind = handler.headers.get("content-type", "")
        status, reply = self._reply(handler.command, path, content, kind)
        if self.faults:  # after what was asked is done, as a timeout on the way back
            status, reply = self.faults.pop(0), {"error": {"message": "planted"}}
        send(handler, status, reply)

    def _reply(self, method: str, path: str, content: bytes, kind: str) -> tuple[int, Any]:
        if (method, path) == ("POST", "/chat/completions"):
            return 200, completion([said("Yes.")])
        if (method, path) == ("POST", "/files"):
            boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
            parts = dict(map(_part, content.split(b"--" + boundary)[1:-1]))
            assert parts["purpose"] == b"batch"
            return 200, self._add_file(parts["file"])
        if (method, path) == ("POST", "/batches"):
            return 200, self._add_batch(**json.loads(content))
        if (method, path) == ("GET", "/batches"):
            data = [*self.batches.values()][::-1]
            return 200, {"object": "list", "data": data, "has_more": False}
        if found := re.fullmatch("/batches/(.+)", path):
            return 200, self._look_at(self.batches[found[1]])
        if found := re.fullmatch("/files/(.+)/content", path):
            return 200, self.files[found[1]]
        return 404, {"error": {"message": f"there is no {path}"}}

    def _add_file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        about = {"id": name, "object": "file", "bytes": len(content), "created_at": 0}
        return {**about, "filename": "f.jsonl", "purpose": "batch", "status": "processed"}

    def _add_batch(
        self, input_file_id: str, endpoint: str, completion_window: str
    ) -> dict[str, Any]:
        assert completion_window == "24h"
        lines = [json.loads(line) for line in self.files[input_file_id].splitlines()]
        assert all((line["method"], line["url"]) == ("POST", endpoint) for line in lines)
        assert len({line["custom_id"] for line in lines}) == len(lines)
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "status": "validating",
            "created_at": int(time.time()),
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "looks": 0,
        }
        return self.batches[name]

    def _look_at(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["looks"] += 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = self.status or "in_progress"
            if batch["status"] == "failed":
                problem = {"code": "invalid", "message": "this file is none", "line": 1}
                batch["errors"] = {"object": "list", "data": [problem]}
            elif batch["status"] in ("in_progress", "cancelled") and batch["looks"] > self.polls:
                self._answer(batch)
        return batch

    def _answer(self, batch: dict[str, Any]) -> None:
        lines = map(json.loads, self.files[batch["input_file_id"]].splitlines())
        done: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        status = "completed"
        for line in lines:
            body = line["body"]
            question = body["messages"][-1]["content"]
            outcome = self.outcome(question, self.asked[question])
            self.asked[question] += 1
            self.bodies.append(body)
            result = {"id": "r", "custom_id": line["custom_id"], "response": None, "error": None}
            if outcome == "expired":
                status = "expired"
                error = {"code": "batch_expired", "message": "This request was not executed"}
                failed.append({**result, "error": error})
            elif isinstance(outcome, int):
                error = {"error": {"message": "planted"}}
                failed.append({**result, "response": {"status_code": outcome, "body": error}})
            elif outcome != "lost":
                self.paid[question] += 1
                choice = said(answer_to(question)) if outcome == "answer" else outcome
                reply = completion([choice] * body.get("n", 1))
                done.append({**result, "response": {"status_code": 200, "body": reply}})
        batch["status"] = self.status or status
        batch["request_counts"] |= {"completed": len(done), "failed": len(failed)}
        for name, results in (("output_file_id", done), ("error_file_id", failed)):
            if results:
                content = "".join(json.dumps(result) + "\n" for result in results)
                batch[name] = self._add_file(content.encode())["id"]


def _part(part: bytes) -> tuple[str, bytes]:
    """Name and content of a part of a form."""
    head, _, content = part.partition(b"\r\n\r\n")
    return re.search(rb' name="([^"]+)"', head)[1].decode(), content.removesuffix(b"\r\n")
