"""An HTTP server on loopback, for tests that play a service."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from typing_extensions import Self


class LoopbackServer:
    """Listens while the `with` block lasts, and gives what it is sent to `handle`."""

    methods: tuple[str, ...] = ("POST",)

    def __init__(self) -> None:
        def take(handler: BaseHTTPRequestHandler) -> None:
            self.handle(handler, handler.rfile.read(int(handler.headers.get("content-length", 0))))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

        for method in self.methods:
            setattr(Handler, f"do_{method}", take)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: Any) -> None:
                """Silent: the client has gone."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        raise NotImplementedError


def send(handler: BaseHTTPRequestHandler, status: int, content: Any, **headers: str) -> None:
    """Content of bytes as it is, other as JSON; `length` in place of the content's own."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = headers.pop("length", str(len(data)))
    handler.send_response(status)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", length)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def said(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A choice of a reply of a chat model."""
    return {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, **message},
    }


def completion(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The reply of a chat model."""
    about = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {**about, "choices": choices, "usage": usage}
