"""A little model behind a real server, in this process: what the tests of the API share."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from motley.infer.engine import Engine
from motley.infer.load import open_engine
from motley.serve.about import read_about
from motley.serve.app import create_app


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address at which `app` is served, on a free port, until the block ends."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def open_app(folder: Path, **settings: Any) -> FastAPI:
    engine = open_engine(folder, "cpu")
    return create_app(engine, read_about(folder, engine), **settings)


class SlowEngine(Engine):
    """The real engine, that waits before each token until it may go on: to look at it in the middle of an answer."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model, engine.tokenizer)
        self.go_on = threading.Event()
        self.running = 0

    def stream(self, prompt, params, cancelled=None):  # type: ignore[no-untyped-def, override]
        self.running += 1
        try:
            for token in super().stream(prompt, params, cancelled):
                yield token
                while not self.go_on.wait(0.01):
                    if cancelled is not None and cancelled.is_set():
                        return
        finally:
            self.running -= 1
