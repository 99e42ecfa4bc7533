"""The thread that runs the engine, and the queue of requests before it.

    request ──▶ queue (first in, first out; at most `max_waiting`) ──▶ the thread ──▶ pieces, on the event loop

One answer at a time: the engine uses the whole machine. A disconnect cancels the request: in the queue at once, in the
engine within one token.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from motley.data.conversation import ConversationEncoder
from motley.infer.engine import Engine
from motley.serve.answer import AnswerRequest, AnswerWriter, Piece, Usage

KEEP_ALIVE_SECONDS = 10.0  # without an event, after which an empty piece is sent; proxies close idle connections


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: Literal["stop", "length"]
    usage: Usage


Event = Piece | Finished


class EngineThread:
    """Answers requests with one engine; use it within one event loop."""

    def __init__(self, engine: Engine, max_waiting: int = 16) -> None:
        self.engine, self.encoder = engine, ConversationEncoder(engine.tokenizer)
        self.max_waiting = max_waiting
        self._open = 0  # requests in the engine or in the queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # has the queue

    @property
    def waiting(self) -> int:
        return max(0, self._open - 1)

    def prompt(self, request: AnswerRequest) -> list[int]:
        """The request's token ids. Raises InputError if it is no conversation, or too long for the model."""
        prompt = self.encoder.prompt(request.messages, request.thinking)
        self.engine.check(prompt)
        return prompt

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[Event, None]:
        """Pieces of the answer, `Finished` last; closing the iterator cancels the request, queued or running.

        An empty piece comes as soon as the request is queued, and after every ten seconds without another event.

        Raises InputError as `prompt` does, Busy when the queue is full, and any exception of the engine.
        """
        prompt = self.prompt(request)
        if self._open > self.max_waiting:
            raise Busy
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()
        cancelled = threading.Event()

        def emit(event: Event | Exception) -> None:
            if not cancelled.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def done(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._close_request)

        self._open += 1
        job = self._thread.submit(self._work, prompt, request, emit, cancelled)
        job.add_done_callback(done)
        try:
            yield Piece()
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                        event = await events.get()
                except TimeoutError:
                    event = Piece()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            cancelled.set()
            job.cancel()  # if it is still queued

    def _close_request(self) -> None:
        self._open -= 1

    def _work(
        self,
        prompt: list[int],
        request: AnswerRequest,
        emit: Callable[[Event | Exception], None],
        cancelled: threading.Event,
    ) -> None:
        """On the engine's thread: one whole answer."""
        writer = AnswerWriter(self.engine.tokenizer, len(prompt), request)
        try:
            for token in self.engine.stream(prompt, request.params, cancelled):
                piece = writer.push(token)
                if piece != Piece():
                    emit(piece)
                if writer.stopped:
                    break
            last = writer.finish()
            if last != Piece():
                emit(last)
            emit(Finished(writer.finish_reason, writer.usage))
        except Exception as error:  # raised in `answer`; the thread goes on with the next request
            emit(error)

    def close(self) -> None:
        """Drop the requests in the queue; the running one, if any, must have been cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
