"""Conversations as token ids: the one place that puts control tokens into a sequence.

The text form is DeepSeek-V3.1's; B and E stand for the begin and end tokens:

    B system <｜User｜>question<｜Assistant｜><think>reasoning</think>answer E        thinking
    B system <｜User｜>question<｜Assistant｜></think>answer E                        not thinking
    ──────────────── given ───────────────────────┘└──── the model's own words: these carry the loss

Reasoning belongs to the last message only: before a new question it is left out of the history. Every message
is encoded by itself, and ordinary text never becomes a control token, so nothing typed by a user can end the
turn, open another role or close the thinking.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from motley.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, Tokenizer
from motley.errors import InputError
from motley.files import write_json, write_text

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn; `reasoning_content` is an assistant's thinking before the answer, None if there was none."""

    role: Role
    content: str
    reasoning_content: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A conversation for training: ids, and for each whether the model is trained to say it (same length)."""

    ids: list[int]
    loss_mask: list[bool]


def check_conversation(messages: Sequence[Message]) -> None:
    """Raises InputError unless there are messages, of known roles, with the system's (if any) first."""
    if not messages:
        raise InputError("the conversation has no messages")
    for number, message in enumerate(messages, start=1):
        if message.role not in get_args(Role):
            raise InputError(f"message {number} has the role {message.role!r}; roles are system, user, assistant")
        if message.role == "system" and number > 1:
            raise InputError(f"message {number} is a system message; only the first message can be one")
        if message.reasoning_content is not None and message.role != "assistant":
            raise InputError(f"message {number} has reasoning_content, but only an assistant's message can")


class ConversationEncoder:
    """Turns messages into ids for one tokenizer.

    Raises:
        InputError: the tokenizer lacks one of the control tokens that conversations need.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Read all of them now: better a clear error before a long run than within it.
        self._user, self._assistant = tokenizer.user_id, tokenizer.assistant_id
        self._think, self._end_think = tokenizer.think_id, tokenizer.end_think_id

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation for training.

        The loss is on what the assistant says by itself: reasoning, `</think>` after it, content and the end
        token. `<｜Assistant｜><think>` and `<｜Assistant｜></think>` are given, as they are in `prompt`. An
        earlier answer whose reasoning is left out carries no loss: without it, it would teach guessing.

        Raises:
            InputError: not a conversation, or no assistant says anything.
        """
        check_conversation(messages)
        if not any(message.role == "assistant" for message in messages):
            raise InputError("the conversation has no assistant message, so there is nothing to learn from it")
        ids, mask = self._history(messages)
        return Encoded(ids, mask)

    def prompt(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
        """The ids after which the model speaks; they end in `<think>`, or in `</think>` if not `thinking`.

        Raises:
            InputError: not a conversation, or the last message is not a user's.
        """
        check_conversation(messages)
        if messages[-1].role != "user":
            raise InputError(f"the last message must be the user's, but it is the {messages[-1].role}'s")
        ids, _ = self._history(messages)
        return [*ids, self._assistant, self._think if thinking else self._end_think]

    def _history(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids, mask = [self.tokenizer.bos_id], [False]

        def add(more: list[int], loss: bool) -> None:
            ids.extend(more)
            mask.extend([loss] * len(more))

        for number, message in enumerate(messages, start=1):
            content = self.tokenizer.encode(message.content)
            if message.role == "system":
                add(content, loss=False)
            elif message.role == "user":
                add([self._user, *content], loss=False)
            elif message.reasoning_content is not None and number == len(messages):
                add([self._assistant, self._think], loss=False)
                add([*self.tokenizer.encode(message.reasoning_content), self._end_think], loss=True)
                add([*content, self.tokenizer.eos_id], loss=True)
            else:
                add([self._assistant, self._end_think], loss=False)
                add([*content, self.tokenizer.eos_id], loss=message.reasoning_content is None)
        return ids, mask

    def chat_template(self) -> str:
        """The same form as a Jinja template for other tools, with a variable `thinking` (true by default).

        Such tools render text first and then look for control tokens in all of it, so there a user *can* type
        `<｜User｜>` and be believed. For ordinary text both give the same ids.
        """
        user, assistant, think, end_think = (
            json.dumps(t, ensure_ascii=False) for t in (USER, ASSISTANT, THINK, END_THINK)
        )
        return (
            "{%- if thinking is not defined %}{% set thinking = true %}{% endif %}"
            "{{- bos_token }}"
            "{%- for message in messages %}"
            "{%- if message['role'] == 'system' %}{{- message['content'] }}"
            "{%- elif message['role'] == 'user' %}{{- " + user + " + message['content'] }}"
            "{%- elif message['role'] == 'assistant' %}{{- " + assistant + " }}"
            "{%- if loop.last and message['reasoning_content'] is defined"
            " and message['reasoning_content'] is not none %}"
            "{{- " + think + " + message['reasoning_content'] }}{%- endif %}"
            "{{- " + end_think + " + message['content'] + eos_token }}"
            "{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}"
            "{{- " + assistant + " + (" + think + " if thinking else " + end_think + ") }}"
            "{%- endif %}"
        )

    def save(self, folder: str | Path, context_length: int) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`: what other tools read.

        Args:
            folder: where to write; made if it is missing.
            context_length: most tokens the model can attend to.
        """
        folder = Path(folder)
        self.tokenizer.save(folder / "tokenizer.json")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD if self.tokenizer.pad_id != self.tokenizer.eos_id else EOS,
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template(),
        }
        write_json(folder / "tokenizer_config.json", config)
        write_text(folder / "chat_template.jinja", self.chat_template())


class AnswerSplitter:
    """Splits generated tokens into reasoning and content while they arrive.

    Args:
        tokenizer: whose ids arrive.
        thinking: the prompt ended in `<think>`, so the first tokens are reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = True) -> None:
        self._think, self._end_think = tokenizer.think_id, tokenizer.end_think_id
        self._decoder = tokenizer.stream_decoder()
        self.reasoning = thinking  # whether the next token is reasoning

    def push(self, token_id: int) -> tuple[str, str]:
        """(new reasoning, new content): whole characters only; control tokens give no text."""
        delta = self._sorted(self._decoder.push(token_id))  # a control token first completes what came before
        if token_id in (self._think, self._end_think):
            self.reasoning = token_id == self._think
        return delta

    def finish(self) -> tuple[str, str]:
        """What is left of a character that was begun and not completed (U+FFFD), or nothing."""
        return self._sorted(self._decoder.finish())

    def _sorted(self, text: str) -> tuple[str, str]:
        return (text, "") if self.reasoning else ("", text)
