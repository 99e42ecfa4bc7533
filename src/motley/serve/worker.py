"""The engine's thread, and the line before it.

    request ──▶ line (at most `max_waiting`, first come first served) ──▶ the thread ──▶ pieces, back on the event loop

One answer at a time: the engine is the whole machine. Whoever goes away leaves the line, or frees the engine within
one token.
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

STILL_THERE_SECONDS = 10.0  # silence after which an empty piece says so; proxies cut silent connections


class Busy(Exception):
    """The line is full."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: Literal["stop", "length"]
    usage: Usage


Event = Piece | Finished


class Worker:
    """Answers requests with one engine; use it within one event loop."""

    def __init__(self, engine: Engine, max_waiting: int = 16) -> None:
        self.engine, self.encoder = engine, ConversationEncoder(engine.tokenizer)
        self.max_waiting = max_waiting
        self._present = 0  # being answered or waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # its queue is the line

    @property
    def waiting(self) -> int:
        return max(0, self._present - 1)

    def prompt(self, request: AnswerRequest) -> list[int]:
        """The request's token ids. Raises InputError if it is no conversation, or too long for the model."""
        prompt = self.encoder.prompt(request.messages, request.thinking)
        self.engine.check(prompt)
        return prompt

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[Event, None]:
        """Pieces of the answer, `Finished` last; close the iterator to give up, in line or in the engine.

        An empty piece comes as soon as the request stands in line, and again after each silence of ten seconds.

        Raises InputError as `prompt`, Busy when the line is full, and whatever breaks the engine.
        """
        prompt = self.prompt(request)
        if self._present > self.max_waiting:
            raise Busy
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()
        given_up = threading.Event()

        def emit(event: Event | Exception) -> None:
            if not given_up.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def left(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._leave)

        self._present += 1
        job = self._thread.submit(self._work, prompt, request, emit, given_up)
        job.add_done_callback(left)
        try:
            yield Piece()
            while True:
                try:
                    async with asyncio.timeout(STILL_THERE_SECONDS):
                        event = await events.get()
                except TimeoutError:
                    event = Piece()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            given_up.set()
            job.cancel()  # if it still waits in line

    def _leave(self) -> None:
        self._present -= 1

    def _work(
        self,
        prompt: list[int],
        request: AnswerRequest,
        emit: Callable[[Event | Exception], None],
        given_up: threading.Event,
    ) -> None:
        """On the engine's thread: one whole answer."""
        writer = AnswerWriter(self.engine.tokenizer, len(prompt), request)
        try:
            for token in self.engine.stream(prompt, request.params, given_up):
                piece = writer.push(token)
                if piece != Piece():
                    emit(piece)
                if writer.stopped:
                    break
            last = writer.finish()
            if last != Piece():
                emit(last)
            emit(Finished(writer.finish_reason, writer.usage))
        except Exception as error:  # carried to the one who asked; the thread lives on for the next
            emit(error)

    def close(self) -> None:
        """Turn away whoever still waits; the running answer, if any, must have been given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)
