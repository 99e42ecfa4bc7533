"""`motley serve`: one model behind an OpenAI-compatible API and a chat page.

GET  /                      the page                    GET  /v1/models
GET  /api/about             facts for the page          POST /v1/chat/completions
GET  /health
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import tyro
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from motley import __version__
from motley.errors import InputError
from motley.infer.engine import Engine
from motley.infer.load import open_engine
from motley.model.find import find_model
from motley.serve.about import read_about
from motley.serve.engine_thread import Busy, EngineThread, Event
from motley.serve.middleware import AccessMiddleware, is_loopback
from motley.serve.openai import (
    ALIASES,
    ChatRequest,
    Reply,
    RequestRefused,
    error_body,
    in_a_sentence,
    input_error_body,
    model_card,
)

PAGES = Path(__file__).parent / "pages"
KEY_VARIABLE = "MOTLEY_API_KEY"
RETRY_SECONDS = 5
GRACE_SECONDS = 5  # for requests in progress when the server is stopped


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model: an OpenAI-compatible API and a chat page."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run or a checkpoint folder."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs an API key."""
    port: int = 8321
    """0: any free port."""
    api_key: str | None = None
    """Key that clients must send; also read from the environment variable MOTLEY_API_KEY."""
    max_waiting: int = 16
    """Requests that may wait while one is answered; further ones get status 429 with a Retry-After header."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"--port is {self.port}; it must be from 0 to 65535")
        if self.max_waiting < 0:
            raise InputError(f"--max-waiting is {self.max_waiting}; it must be at least 0")


class EventStream(StreamingResponse):
    """Closes its generator however the response ends, so that a disconnect frees the engine."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


def create_app(
    engine: Engine,
    about: dict[str, Any],
    local: bool = True,
    api_key: str | None = None,
    max_waiting: int = 16,
) -> FastAPI:
    """The ASGI application for one engine; `about` is what /api/about returns, its "model" the name in the API."""
    engine_thread, name, created = EngineThread(engine, max_waiting), about["model"], int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine_thread.close()

    app = FastAPI(title="motley", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": engine_thread.waiting}

    @app.get("/api/about")
    async def read_facts() -> dict[str, Any]:
        return about

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name, created, engine.context_length)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return model_card(name, created, engine.context_length)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        check_model(asked.model)
        events = engine_thread.answer(asked.request())
        await anext(events)  # the request is queued, or an exception says why not
        reply = Reply(name)
        if asked.stream:
            return EventStream(reply.stream(events, bool(asked.stream_options and asked.stream_options.include_usage)))
        answer = await unless_disconnected(request, events, reply)
        return JSONResponse(answer) if answer is not None else Response(status_code=499)

    def check_model(asked: str) -> None:
        if asked != name and asked not in ALIASES:
            message = f"there is no model {asked!a} here; this server has {name!r}"
            raise RequestRefused(message, "model", "model_not_found", status=404)

    if has_page():
        app.mount("/", StaticFiles(directory=PAGES, html=True))
    add_error_handlers(app)
    app.add_middleware(AccessMiddleware, local=local, api_key=api_key)
    return app


def has_page() -> bool:
    """Whether the page was built; without it only the API is served."""
    return (PAGES / "index.html").is_file()


async def unless_disconnected(
    request: Request, events: AsyncGenerator[Event, None], reply: Reply
) -> dict[str, Any] | None:
    """The whole answer, or None if the client disconnects first: that cancels the request."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, disconnected = asyncio.ensure_future(reply.whole(events)), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in (answer, disconnected):
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(answer, disconnected, return_exceptions=True)


def add_error_handlers(app: FastAPI) -> None:
    """Every failure in OpenAI's form: {"error": {"message": one sentence, ...}}."""

    def reply(status: int, message: str, kind: str, code: str | None = None, headers: Any = None) -> JSONResponse:
        return JSONResponse(error_body(message, kind, code), status, headers)

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        return JSONResponse(input_error_body(error), error.status if isinstance(error, RequestRefused) else 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param, code = describe_validation(error.errors()[0])
        return JSONResponse(error_body(ascii_only(message), "invalid_request_error", code, param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = error.detail
        if message == "Not Found":
            message = f"there is nothing at {ascii_only(request.url.path)}"
            if request.url.path == "/" and not has_page():
                message = "the page was not built; install motley with its page, or use the API under /v1"
        if message == "Method Not Allowed":
            message = f"{request.url.path} does not take {request.method}"
        return reply(error.status_code, message, "invalid_request_error", headers=error.headers)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return reply(429, "too many requests are waiting; try again in a moment", "rate_limit_error", "busy", headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return reply(500, in_a_sentence(error), "server_error")


def describe_validation(error: Any) -> tuple[str, str | None, str | None]:
    """pydantic's first error as a sentence (where, then what), and the param and code of OpenAI's error object."""
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', '')}", None, None
    steps = [step for step in error["loc"] if step not in ("body", "str") and not str(step).startswith("list[")]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    param = ascii_only(where) or None
    if error["type"] == "extra_forbidden":
        return f"{where} is not a parameter this server knows; leave it out", param, "unknown_parameter"
    code = {"missing": "missing_required_parameter"}.get(error["type"])
    code = code or ("invalid_type" if error["type"].endswith("_type") else "invalid_value")
    return f"{where or 'the body'}: {error['msg']}", param, code


def ascii_only(text: str) -> str:
    """Escape all but ASCII: half surrogate pairs and control characters from a client must not break the reply."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def listen(host: str, port: int, other_ports: int = 0) -> socket.socket:
    """A bound socket, on one of the next `other_ports` if `port` is taken. Raises InputError where none is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine: {error.strerror}") from None
    problem: OSError | None = None
    for candidate in range(port, min(port + other_ports, 65535) + 1):
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((address[0], candidate))
            bound.listen(128)
            return bound
        except OSError as error:
            bound.close()
            problem = error
    assert problem is not None
    raise InputError(f"cannot listen on {host} port {port}: {problem.strerror}; choose another with --port")


class Server(uvicorn.Server):
    """Prints its address once it accepts connections."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(f"{self._greeting}   (Ctrl-C stops)\n")
            sys.stdout.flush()


def serve(config: ServeConfig, other_ports: int = 0) -> None:
    """Serve until stopped. Raises InputError for a model, address or port that cannot be used."""
    api_key = config.api_key or os.environ.get(KEY_VARIABLE) or None
    local = is_loopback(config.host)
    if not local and api_key is None:
        raise InputError(
            f"--host {config.host} accepts connections from other machines, which needs an API key: "
            f"give --api-key or set {KEY_VARIABLE}"
        )
    listening = listen(config.host, config.port, other_ports)
    with listening:
        engine = open_engine(config.model, config.device)
        app = create_app(engine, read_about(find_model(config.model), engine), local, api_key, config.max_waiting)
        name, port = listening.getsockname()[:2]
        address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
        if has_page():
            greeting = f"talk to it at {address}" + (f"?key={api_key}" if api_key else "")
        else:
            greeting = f"the API is at {address}v1; the page was not built, `python hatch_build.py` builds it"
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
        )
        try:
            Server(settings, greeting).run(sockets=[listening])
        except KeyboardInterrupt:  # the usual way to stop it
            sys.stdout.write("\n")
