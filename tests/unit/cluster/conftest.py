"""An endpoint that says what the test wants it to say."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class ScriptedEndpoint:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)            # of the next streamed answer
    status: int = 200
    paths: list[str] = field(default_factory=list)            # of GETs
    pages: dict[str, tuple[int, str]] = field(default_factory=dict)            # what other GETs find: status, body

    def answers(self, *pieces: str) -> None:
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        events.append({"choices": [], "usage": {"completion_tokens": len(pieces)}})
        self.lines = [f"data: {json.dumps(event)}" for event in events] + ["data: [DONE]"]


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        scripted = ScriptedEndpoint(f"http://127.0.0.1:{server.server_port}")
        server.RequestHandlerClass = _handler(scripted)  # type: ignore[assignment]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield scripted
        server.shutdown()


def _handler(scripted: ScriptedEndpoint) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scripted.paths.append(self.path)
            scripted.authorizations.append(self.headers["Authorization"])
            status, body = scripted.pages.get(self.path, (200, json.dumps({"data": [{"id": "tiny"}]})))
            self._send(status, body)

        def do_POST(self) -> None:
            scripted.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            scripted.authorizations.append(self.headers["Authorization"])
            if scripted.status == 200:
                self._send(200, "".join(f"{line}\n\n" for line in scripted.lines))
            else:
                self._send(scripted.status, json.dumps({"error": {"message": "no room"}}))

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
