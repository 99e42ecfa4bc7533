"""Encode conversations as token ids; no other code puts control tokens into a sequence.

The text form is DeepSeek-V3.1's; B and E stand for the begin and end tokens:

    B system <｜User｜>question<｜Assistant｜><think>reasoning</think>answer E        thinking
    B system <｜User｜>question<｜Assistant｜></think>answer E                        not thinking
    ──────────────── given ───────────────────────┘└──── the model's own words: these carry the loss

Reasoning belongs to the last message only: before a new question it is left out of the history. Ordinary text never
becomes a control token, so nothing typed by a user can end the turn, open another role or close the thinking.

Vocabularies older than DeepSeek-R1 lack some of these tokens. What a vocabulary lacks is spelled in ordinary text:
thinking as R1 first spelled it, and where there are no speakers either, these as DeepSeek-V2 did (↵ is a line end):

    B system <｜User｜>question<｜Assistant｜><think>↵reasoning↵</think>↵↵answer E     V3 (December 2024), thinking
    B system <｜User｜>question<｜Assistant｜>answer E                                not thinking
    B system↵↵User: question↵↵Assistant: answer E                                   V2; there a user can type a role
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from motley.data.stop import StopAtText
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


@dataclass(frozen=True)
class Form:
    """The markers around the parts of a conversation; a field is the name of a control token, or ordinary text.

    `no_think` is given to the model in place of `think`; `answer` is what an answer without thinking begins with.
    """

    system_end: str = ""
    user: str = USER
    user_end: str = ""
    assistant: str = ASSISTANT
    think: str = THINK
    end_think: str = END_THINK
    no_think: str = END_THINK
    answer: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Form":
        """The form for the control tokens that a vocabulary has."""
        if not tokenizer.has_conversation_tokens:
            return cls("\n\n", "User: ", "\n\n", "Assistant:", f" {THINK}\n", f"\n{END_THINK}\n\n", "", " ")
        if not tokenizer.has_thinking_tokens:
            return cls(think=f"{THINK}\n", end_think=f"\n{END_THINK}\n\n", no_think="")
        return cls()


class ConversationEncoder:
    """Turns messages into ids for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.form = tokenizer, Form.of(tokenizer)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation for training.

        The loss is on what the assistant generates: reasoning, `</think>` after it, content and the end token.
        `<｜Assistant｜><think>` and `<｜Assistant｜></think>` are given, as they are in `prompt`. An earlier answer
        whose reasoning is left out has no loss: the model would learn to guess.

        Raises:
            InputError: not a conversation, or no message of an assistant has content.
        """
        check_conversation(messages)
        if not any(message.role == "assistant" for message in messages):
            raise InputError("the conversation has no assistant message, so there is nothing to learn from it")
        return self._encoded(self._parts(messages))

    def prompt(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
        """The ids of a prompt for the model; they end in the form's `think`, or `no_think` if not `thinking`.

        Raises:
            InputError: not a conversation, or the last message is not a user's.
        """
        check_conversation(messages)
        if messages[-1].role != "user":
            raise InputError(f"the last message must be the user's, but it is the {messages[-1].role}'s")
        opening = [self.form.assistant, self.form.think if thinking else self.form.no_think]
        return self._encoded([*self._parts(messages), *((self._mark(one), False) for one in opening)]).ids

    def _mark(self, mark: str) -> str | int:
        """The id of a control token, or the ordinary text that stands for one."""
        known = self.tokenizer.control_id(mark)
        return mark if known is None else known

    def _parts(self, messages: Sequence[Message]) -> Iterator[tuple[str | int, bool]]:
        """(text or id of a control token, whether it carries the loss), in order; what people wrote is always text."""
        form, mark = self.form, self._mark
        yield self.tokenizer.bos_id, False
        for number, message in enumerate(messages, start=1):
            if message.role == "system":
                yield from ((message.content, False), (mark(form.system_end), False))
            elif message.role == "user":
                yield from ((mark(form.user), False), (message.content, False), (mark(form.user_end), False))
            elif message.reasoning_content is not None and number == len(messages):
                yield from ((mark(form.assistant), False), (mark(form.think), False))
                yield from ((message.reasoning_content, True), (mark(form.end_think), True), (message.content, True))
                yield self.tokenizer.eos_id, True
            else:
                loss = message.reasoning_content is None
                yield from ((mark(form.assistant), False), (mark(form.no_think), False))
                yield from ((form.answer, loss), (message.content, loss), (self.tokenizer.eos_id, loss))

    def _encoded(self, parts: Iterable[tuple[str | int, bool]]) -> Encoded:
        """Ids of the parts: text between control tokens as one piece, cut where the loss begins or ends."""
        ids: list[int] = []
        mask: list[bool] = []
        for (is_text, loss), run in itertools.groupby(parts, key=lambda part: (isinstance(part[0], str), part[1])):
            content = [part for part, _ in run]
            more = self.tokenizer.encode("".join(map(str, content))) if is_text else [int(one) for one in content]
            ids += more
            mask += [loss] * len(more)
        return Encoded(ids, mask)

    def chat_template(self) -> str:
        """The form as a Jinja template for other tools, with a variable `thinking` (true by default).

        Such tools render text first and then look for control tokens in all of it, so there a user *can* type
        `<｜User｜>` and be believed. For ordinary text both give the same ids.
        """
        form = {name: json.dumps(mark, ensure_ascii=False) for name, mark in vars(self.form).items()}
        return (
            "{%- if thinking is not defined %}{% set thinking = true %}{% endif %}"
            "{{- bos_token }}"
            "{%- for message in messages %}"
            "{%- if message['role'] == 'system' %}{{- message['content'] + " + form["system_end"] + " }}"
            "{%- elif message['role'] == 'user' %}"
            "{{- " + form["user"] + " + message['content'] + " + form["user_end"] + " }}"
            "{%- elif message['role'] == 'assistant' %}{{- " + form["assistant"] + " }}"
            "{%- if loop.last and message['reasoning_content'] is defined"
            " and message['reasoning_content'] is not none %}"
            "{{- " + form["think"] + " + message['reasoning_content'] + " + form["end_think"] + " }}"
            "{%- else %}{{- " + form["no_think"] + " + " + form["answer"] + " }}{%- endif %}"
            "{{- message['content'] + eos_token }}"
            "{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}"
            "{{- " + form["assistant"] + " + (" + form["think"] + " if thinking else " + form["no_think"] + ") }}"
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
        thinking: the prompt ended in the form's `think`, so the first tokens are reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = True) -> None:
        form, spelled = Form.of(tokenizer), not tokenizer.has_thinking_tokens
        self._switches = {} if spelled else {tokenizer.think_id: True, tokenizer.end_think_id: False}
        self._end_think = StopAtText([f"\n{END_THINK}", END_THINK] if spelled else [])
        self._decoder = tokenizer.stream_decoder()
        self._lead = "\n" if spelled and thinking else form.answer  # white space of the form, before the content
        self.reasoning = thinking  # whether the next token is reasoning

    def push(self, token_id: int) -> tuple[str, str]:
        """(new reasoning, new content): whole characters only; control tokens give no text."""
        delta = self._sorted(self._decoder.push(token_id))  # a control token first completes what came before
        self.reasoning = self._switches.get(token_id, self.reasoning)
        return delta

    def finish(self) -> tuple[str, str]:
        """Text held back: an incomplete character (U+FFFD), or the beginning of an end of thinking in ordinary text."""
        reasoning, content = self._sorted(self._decoder.finish())
        return (reasoning + self._end_think.finish() if self.reasoning else reasoning), content

    def _sorted(self, text: str) -> tuple[str, str]:
        if not self.reasoning:
            return "", self._content(text)
        reasoning = self._end_think.push(text)
        if not self._end_think.stopped:
            return reasoning, ""
        self.reasoning = False
        return reasoning, self._content(self._end_think.rest)

    def _content(self, text: str) -> str:
        if self._lead:
            text = text.lstrip(self._lead)
            self._lead = "" if text else self._lead
        return text
