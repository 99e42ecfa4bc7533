"""From generated tokens to text: reasoning, then the answer, cut at a stop text.

token ──▶ AnswerSplitter ──▶ reasoning ──────────────────▶ Piece
                         └─▶ content ──▶ StopAtText ──▶    (and at the end: finish_reason, Usage)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from motley.data.conversation import AnswerSplitter, Message
from motley.data.stop import StopAtText
from motley.data.tokenizer import Tokenizer
from motley.infer.sampler import SamplingParams


@dataclass(frozen=True)
class AnswerRequest:
    """A conversation whose last message is to be answered, and how; independent of the API's form."""

    messages: Sequence[Message]
    params: SamplingParams
    thinking: bool = True


@dataclass(frozen=True)
class Piece:
    """Text that became complete with a token; both fields may be empty."""

    reasoning: str = ""
    content: str = ""


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens; `completion_tokens` include `reasoning_tokens`, those up to and with `</think>`."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


class AnswerWriter:
    """Collects one answer token by token.

    Args:
        tokenizer: of the model.
        prompt_tokens: length of the prompt, for the usage.
        request: its stop texts (they apply to the answer, not to the reasoning) and whether the model thinks first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, request: AnswerRequest) -> None:
        self._splitter = AnswerSplitter(tokenizer, request.thinking)
        self._stop = StopAtText(request.params.stop)
        self._end = tokenizer.eos_id
        self._prompt_tokens, self._completion, self._reasoning = prompt_tokens, 0, 0
        self.finish_reason: Literal["stop", "length"] = "length"  # until the end token or a stop text

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"

    def push(self, token: int) -> Piece:
        self._completion += 1
        self._reasoning += self._splitter.reasoning and token != self._end
        reasoning, content = self._splitter.push(token)
        piece = Piece(reasoning, self._stop.push(content))
        if token == self._end or self._stop.stopped:
            self.finish_reason = "stop"
        return piece

    def finish(self) -> Piece:
        """The last piece: text that was held back because it could have begun a stop text or a character."""
        reasoning, content = self._splitter.finish()
        before = self._stop.push(content)
        return Piece(reasoning, before + ("" if self._stop.stopped else self._stop.finish()))

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion, self._reasoning)
