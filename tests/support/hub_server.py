"""As much of the Hugging Face hub's interface as a push needs, on loopback."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = "hf_of_this_test"


class HubServer(ThreadingHTTPServer):
    """Knows one user, `someone`, of the organisation `lab`, with a token of that role."""

    daemon_threads = True

    def __init__(self, role: str = "write") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role = role
        self.refuses: str | None = None
        """Part of a path that is answered with status 400."""
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository -> name -> content."""
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        Thread(target=self.serve_forever, daemon=True).start()
        self._patch = pytest.MonkeyPatch()
        # Of the environment the library reads them once, as it is imported.
        self._patch.setattr(constants, "ENDPOINT", self.address)
        self._patch.setattr(constants, "HF_HUB_OFFLINE", False)
        self._patch.setenv("HF_TOKEN", TOKEN)
        _forget_session()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        _forget_session()
        self.shutdown()
        self.server_close()


def _forget_session() -> None:
    """Of the library's older versions, which keep one that is offline."""
    getattr(_http, "reset_sessions", lambda: None)()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        status, found = self._found(path, body)
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer  # noqa: N815

    def _found(self, path: str, body: bytes) -> tuple[int, Any]:
        server = self.server
        if server.refuses and server.refuses in path:
            return 400, {"error": "not today"}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": server.role}
            return 200, {
                "name": "someone",
                "orgs": [{"name": "lab"}],
                "auth": {"accessToken": token},
            }
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in server.files:
                return 409, {"error": "is there", "url": f"{server.address}/{name}"}
            server.created.append(asked)
            server.files[name] = {}
            return 200, {"url": f"{server.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": name, **regular} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    server.files[repository][value["path"]] = content
            return 200, {"commitUrl": f"{server.address}/{repository}/commit/1", "commitOid": "1"}
        return 200, {"id": repository, "sha": "1"}

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
