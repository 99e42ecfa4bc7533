"""The OpenAI dialect, as DeepSeek speaks it: chat completions with `reasoning_content` beside `content`.

What a request asks for and this server cannot do is refused by name; nothing is quietly left out.
"""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from motley.data.conversation import Message
from motley.errors import InputError
from motley.infer.sampler import BrokenLogits, SamplingParams
from motley.serve.answer import AnswerRequest, Piece, Usage
from motley.serve.worker import Event, Finished

DEFAULT_MAX_TOKENS = 4096  # where the request names no limit; the end of the context ends an answer sooner
MOST_STOPS = 16
ALIASES = {
    "deepseek-chat": False,
    "deepseek-reasoner": True,
}  # names that clients know, and whether they think

log = logging.getLogger(__name__)


class Refused(InputError):
    """A request that cannot be answered, with what OpenAI's error object tells programs."""

    def __init__(self, message: str, param: str, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Typed(BaseModel):
    """Takes values as they are: "5" and true are no numbers."""

    model_config = ConfigDict(strict=True)


class Strict(Typed):
    """Refuses what it does not know, unless it is null: clients send back whole answers, empty fields and all."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def null_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Part(Typed):
    """A part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None  # accepted as DeepSeek does; earlier thinking is not read again
    name: str | None = None
    refusal: str | None = None

    def message(self, where: str) -> Message:
        if isinstance(self.content, list):
            other = next((part.type for part in self.content if part.type != "text"), None)
            if other is not None:
                raise Refused(
                    f"{where}.content holds a part of type {other!r}; this model reads text only",
                    f"{where}.content", "unsupported_value",
                )  # fmt: skip
            content = "".join(part.text or "" for part in self.content)
        else:
            content = self.content or ""
        return Message("system" if self.role == "developer" else self.role, content)


class Thinking(Typed):
    type: Literal["enabled", "disabled"]


class StreamOptions(Typed):
    include_usage: bool = False


class ChatRequest(Strict):
    """`POST /v1/chat/completions`. Fields without an effect here may only hold what asks for nothing."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    thinking: Thinking | None = None
    # "none" turns thinking off; there are no degrees of it here
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # about the caller or the bill, not about the answer
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None

    def refuse_what_is_missing(self) -> None:
        """Raises Refused naming the first thing asked for that this server cannot do."""
        form = (self.response_format or {}).get("type")
        wants = {
            f"n = {self.n}": self.n not in (None, 1),
            "logprobs": bool(self.logprobs) or bool(self.top_logprobs),
            "tools": bool(self.tools) or bool(self.functions),
            f"response_format {form!r}": form not in (None, "text"),
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "logit_bias": bool(self.logit_bias),
        }  # fmt: skip
        for name, wanted in wants.items():
            if wanted:
                raise Refused(
                    f"{name} is not supported by this server yet; leave it out",
                    name.split()[0],
                    "unsupported_parameter",
                )

    def request(self) -> AnswerRequest:
        """What is asked, free of the dialect. Raises InputError."""
        self.refuse_what_is_missing()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or "" in stops:
            raise Refused(f"stop must be at most {MOST_STOPS} texts, none of them empty", "stop", "invalid_value")
        given = {"temperature": self.temperature, "top_p": self.top_p}
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        params = SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            max_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
            seed=self.seed,
            stop=tuple(stops),
        )
        messages = [message.message(f"messages[{index}]") for index, message in enumerate(self.messages)]
        return AnswerRequest(messages, params, self.thinks)

    @property
    def thinks(self) -> bool:
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        if self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return ALIASES.get(self.model, True)


class Reply:
    """Writes one answer in this dialect, whole or as a stream."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
        reasoning, content = "", ""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Finished):
                    message = {
                        "role": "assistant",
                        "content": content,
                        "reasoning_content": reasoning or None,
                        "refusal": None,
                    }
                    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
                    return {
                        **self._head,
                        "object": "chat.completion",
                        "choices": [choice],
                        "usage": usage(event.usage),
                    }
                reasoning, content = reasoning + event.reasoning, content + event.content
        raise RuntimeError("the answer ended without an end")

    async def stream(self, events: AsyncGenerator[Event, None], include_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: a role, pieces, the reason of the end, the usage if asked for, `[DONE]`.

        The status has long been sent when something breaks on the way, so that the error is the last event.
        """
        yield self._chunk({"role": "assistant", "content": ""}, include_usage=include_usage)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Finished):
                        yield self._chunk({}, event.reason, include_usage)
                        if include_usage:
                            yield self._event({"choices": [], "usage": usage(event.usage)})
                        yield "data: [DONE]\n\n"
                    elif event == Piece():
                        yield ": still there\n\n"
                    else:
                        for delta in self._deltas(event):
                            yield self._chunk(delta, include_usage=include_usage)
        except Exception as error:
            log.exception("an answer broke off")
            yield server_sent(error_body(in_a_sentence(error), "server_error"))

    @staticmethod
    def _deltas(piece: Piece) -> list[dict[str, str]]:
        texts = {"reasoning_content": piece.reasoning, "content": piece.content}
        return [{name: text} for name, text in texts.items() if text]

    def _chunk(self, delta: dict[str, str], reason: str | None = None, include_usage: bool = False) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._event({"choices": [choice], **({"usage": None} if include_usage else {})})

    def _event(self, values: dict[str, Any]) -> str:
        return server_sent({**self._head, "object": "chat.completion.chunk", **values})


def server_sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def in_a_sentence(error: Exception) -> str:
    """What a caller is told of a fault inside; the rest stays in the log."""
    return str(error) if isinstance(error, BrokenLogits) else "something broke inside the server; its log says what"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def input_error_body(error: InputError) -> dict[str, Any]:
    """For what a request holds and cannot be; sentences about a setting begin with its name."""
    message, first = str(error), str(error).split()[0]
    if isinstance(error, Refused):
        param, code = error.param, error.code
    elif "reads at most" in message:
        param, code = "messages", "context_length_exceeded"
    else:
        param, code = first if first in ChatRequest.model_fields else "messages", "invalid_value"
    return error_body(message, "invalid_request_error", code, param)


def model_card(name: str, created: int, context_length: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "motley",
        "context_length": context_length,
    }
