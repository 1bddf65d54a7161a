"""A server that speaks chat/completions, answers as it is told, and fails on request."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from PIL import Image

Answer = Callable[[str, str, Image.Image | None], str]
"""(model, text, picture) -> what is said."""


@dataclass
class Trouble:
    """What happens to the next `times` requests instead of an answer; status None: the connection is dropped."""

    status: int | None
    times: int = 10**9
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class ChatServer:
    """Use it in a `with` block; `url` ends with /v1."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.troubles: list[Trouble] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.gate: threading.Barrier | None = None
        """Where it is set, requests wait for one another here: as many as it counts must be under way at once."""
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.chat = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    chat: ChatServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.bodies.append(body)
            chat.headers.append({name.lower(): value for name, value in self.headers.items()})
            trouble = next((each for each in chat.troubles if each.times), None)
            if trouble:
                trouble.times -= 1
        if trouble and trouble.status is None:
            self.close_connection = True
            return
        if trouble and trouble.status is not None:
            self._reply(trouble.status, trouble.body, trouble.headers)
            return
        if self.path != "/v1/chat/completions":
            self._reply(404, f"no route {self.path}")
            return
        if chat.gate:
            chat.gate.wait()
        self._reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": self._said(body)}}]}))

    def _said(self, body: dict[str, Any]) -> str:
        content = body["messages"][-1]["content"]
        if isinstance(content, str):
            return self.server.chat.answer(body["model"], content, None)
        (picture,) = (part["image_url"]["url"] for part in content if part["type"] == "image_url")
        (text,) = (part["text"] for part in content if part["type"] == "text")
        data = base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True)
        return self.server.chat.answer(body["model"], text, Image.open(io.BytesIO(data)))

    def _reply(self, status: int, body: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())
