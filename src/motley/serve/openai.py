"""OpenAI's chat completions with DeepSeek's field `reasoning_content` beside `content`.

A parameter that this server does not support is refused by name; none is ignored silently.
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
from motley.serve.engine_thread import Event, Finished

DEFAULT_MAX_TOKENS = 4096  # where the request names no limit; the end of the context ends an answer sooner
MOST_STOPS = 16
ALIASES = {
    "deepseek-chat": False,
    "deepseek-reasoner": True,
}  # names that clients know, and whether they think

log = logging.getLogger(__name__)


class RequestRefused(InputError):
    """A request that cannot be answered, with the fields of OpenAI's error object."""

    def __init__(self, message: str, param: str, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Typed(BaseModel):
    """Converts no values: "5" and true are not numbers."""

    model_config = ConfigDict(strict=True)


class Strict(Typed):
    """Refuses unknown fields unless they are null: clients send whole answers back, with their empty fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_null_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class ContentPart(Typed):
    """One entry of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None  # accepted as DeepSeek does, and not given to the model
    name: str | None = None
    refusal: str | None = None

    def message(self, where: str) -> Message:
        if isinstance(self.content, list):
            other = next((part.type for part in self.content if part.type != "text"), None)
            if other is not None:
                raise RequestRefused(
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
    """`POST /v1/chat/completions`. Fields that this server does not support must have a value without effect."""

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
    # "none" turns thinking off; the other values are all the same here
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
    # about the client or the bill, not about the answer
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None

    def check_supported(self) -> None:
        """Raises RequestRefused, which names the first parameter that this server does not support."""
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
                raise RequestRefused(
                    f"{name} is not supported by this server yet; leave it out",
                    name.split()[0],
                    "unsupported_parameter",
                )

    def request(self) -> AnswerRequest:
        """The request, independent of the API's form. Raises InputError."""
        self.check_supported()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or "" in stops:
            raise RequestRefused(
                f"stop must be at most {MOST_STOPS} texts, none of them empty", "stop", "invalid_value"
            )
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
    """Writes one answer in the API's form, whole or as a stream."""

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
        raise RuntimeError("the events ended without Finished")

    async def stream(self, events: AsyncGenerator[Event, None], include_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: a role, pieces, the finish reason, the usage if requested, `[DONE]`.

        The status has already been sent when an exception occurs on the way, so that the error is the last event.
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
                        yield ": keep-alive\n\n"
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
    """What a client is told of an internal error; the rest is in the log."""
    return str(error) if isinstance(error, BrokenLogits) else "internal error; the server's log has the traceback"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def input_error_body(error: InputError) -> dict[str, Any]:
    """The error object for a value that cannot be used; messages about a parameter begin with its name."""
    message, first = str(error), str(error).split()[0]
    if isinstance(error, RequestRefused):
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
