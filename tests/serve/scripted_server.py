"""A server that answers by script over the real pages: what a random model cannot be made to say, it says.

It speaks the routes of `motley serve` and sends its security headers; the pages do not know the difference.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import motley

PAGES = Path(motley.__file__).parent / "serve" / "pages"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Script:
    """Words for one question: pieces of thinking, then pieces of the answer, `pause` seconds before each."""

    thinking: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    pause: float = 0.0
    finish: str = "stop"
    breaks: bool = False  # the connection ends in the middle
    refuses: tuple[int, str] | None = None  # status and sentence instead of an answer


@dataclass
class ScriptedServer:
    """Scripts by question; afterwards, what was asked and which answers the other side hung up on."""

    about: dict[str, Any]
    scripts: dict[str, Script]
    address: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["ScriptedServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, script: ScriptedServer, *arguments: Any) -> None:
        self.script = script
        super().__init__(*arguments, directory=str(PAGES))

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def do_GET(self) -> None:
        if self.path == "/api/about":
            self._json(200, self.script.about)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.requests.append(asked)
        script = self.script.scripts[asked["messages"][-1]["content"]]
        if script.refuses:
            status, sentence = script.refuses
            return self._json(status, {"error": {"message": sentence}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._speak(script)
        except (BrokenPipeError, ConnectionResetError):
            self.script.hung_up.set()

    def _speak(self, script: Script) -> None:
        pieces = [("reasoning_content", piece) for piece in script.thinking]
        pieces += [("content", piece) for piece in script.answer]
        for kind, piece in pieces:
            time.sleep(script.pause)
            self._event({"choices": [{"delta": {kind: piece}, "finish_reason": None}]})
        if script.breaks:
            return
        self._event({"choices": [{"delta": {}, "finish_reason": script.finish}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(pieces)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass  # the tests' output stays quiet
