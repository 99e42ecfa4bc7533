"""`motley chat`: talk to a model in the terminal."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from motley.data.conversation import ConversationEncoder, Message
from motley.errors import InputError
from motley.infer.engine import Engine
from motley.infer.load import open_engine
from motley.infer.sampler import SamplingParams
from motley.model.find import find_model
from motley.serve.about import Defaults, read_defaults
from motley.serve.answer import AnswerRequest, AnswerWriter, Piece

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "Type a message. /new clears the conversation, /think turns thinking on or off, /quit (or Ctrl-D) ends the chat."


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal.

    Settings that are left out are those of the model's about.json; without one, earlier messages are sent along, the
    temperature is 0.6 and an answer has at most 1024 tokens.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run or a checkpoint folder."""
    thinking: bool = True
    """Let the model think before it answers."""
    remember: Literal["auto", "yes", "no"] = "auto"
    """Send earlier messages along; without them, models trained on single questions answer better."""
    temperature: float | None = None
    """0 takes the most probable token."""
    top_p: float = 0.95
    max_tokens: int | None = None
    """Longest answer, thinking included."""
    seed: int | None = None
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


class Chat:
    """One conversation with one engine.

    Args:
        config: the user's settings.
        defaults: the model's, for settings that the user left open.
        out: where answers are written token by token; thinking is dim if it is a terminal.
    """

    def __init__(self, engine: Engine, config: ChatConfig, defaults: Defaults, out: TextIO) -> None:
        self.engine, self.out = engine, out
        self.encoder = ConversationEncoder(engine.tokenizer)
        temperature = defaults.temperature if config.temperature is None else config.temperature
        max_tokens = defaults.max_tokens if config.max_tokens is None else config.max_tokens
        self.params = SamplingParams(temperature, config.top_p, max_tokens, config.seed)
        self.remember = defaults.remember if config.remember == "auto" else config.remember == "yes"
        self.thinking = config.thinking
        self.messages: list[Message] = []

    def command(self, line: str) -> str:
        """Run a line that begins with a slash; returns what to print. Raises EOFError for /quit."""
        if line == "/quit":
            raise EOFError
        if line == "/new":
            self.messages.clear()
            return "The conversation is cleared."
        if line == "/think":
            self.thinking = not self.thinking
            return f"Thinking is {'on' if self.thinking else 'off'}."
        return HELP

    def ask(self, question: str, cancelled: threading.Event | None = None) -> None:
        """Stream the answer to `out`; the conversation does not keep a cancelled question. Raises InputError."""
        asked = [*(self.messages if self.remember else []), Message("user", question)]
        request = AnswerRequest(asked, self.params, self.thinking)
        prompt = self.encoder.prompt(request.messages, request.thinking)
        writer = AnswerWriter(self.engine.tokenizer, len(prompt), request)
        pieces: list[Piece] = []
        try:
            for token in self.engine.stream(prompt, request.params, cancelled):
                pieces.append(writer.push(token))
                self._show(pieces[-1], first=not any(piece.content for piece in pieces[:-1]))
                if writer.stopped:
                    break
            pieces.append(writer.finish())
            self._show(pieces[-1], first=not any(piece.content for piece in pieces[:-1]))
        finally:
            self._write(PLAIN if self._dims else "", "\n")
        if cancelled is not None and cancelled.is_set():
            self._write("(stopped; the conversation does not keep it)\n")
            return
        if not writer.stopped:
            self._write(f"(cut at {writer.usage.completion_tokens} tokens)\n")
        self.messages = [*asked, Message("assistant", "".join(piece.content for piece in pieces))]

    @property
    def _dims(self) -> bool:
        return self.out.isatty()

    def _show(self, piece: Piece, first: bool) -> None:
        if piece.reasoning:
            self._write(DIM if self._dims else "", piece.reasoning)
        if piece.content:
            gap = "\n" if first and self.thinking else ""
            self._write(PLAIN if self._dims else "", gap, piece.content)

    def _write(self, *texts: str) -> None:
        self.out.write("".join(texts))
        self.out.flush()


def chat(config: ChatConfig) -> None:
    """Answer questions from standard input, one a line, until it ends."""
    defaults = read_defaults(find_model(config.model))
    conversation = Chat(open_engine(config.model, config.device), config, defaults, sys.stdout)
    terminal = sys.stdin.isatty()
    if terminal:
        sys.stdout.write(HELP + "\n")
    while True:
        try:
            line = input("\n› " if terminal else "").strip()
            if line.startswith("/"):
                sys.stdout.write(conversation.command(line) + "\n")
                continue
        except EOFError:
            return
        if not line:
            continue
        try:
            with ctrl_c_ends_the_answer() as cancelled:
                conversation.ask(line, cancelled)
        except InputError as error:
            if not terminal:
                raise
            sys.stdout.write(f"{error}\n")


@contextmanager
def ctrl_c_ends_the_answer() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C sets the event instead of raising KeyboardInterrupt."""
    cancelled = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: cancelled.set())
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)
