"""OpenAI's own client works against the server as it is."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from served import open_app, running
from thinking_model import ANSWER, ENDLESS, QUESTION, THINKING


@pytest.fixture(scope="module")
def client(thinking_model: Path) -> Iterator[openai.OpenAI]:
    with (
        running(open_app(thinking_model)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none needed", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, question: str = QUESTION, **settings):  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="little", messages=messages, **{"temperature": 0, **settings})  # type: ignore[arg-type]


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["little"]
    assert client.models.retrieve("little").owned_by == "motley"


def test_an_answer_comes_with_thinking_and_usage(client: openai.OpenAI) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.reasoning_content) == (ANSWER, THINKING)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *spoken, last = chunks
    deltas = [chunk.choices[0].delta for chunk in spoken]
    assert deltas[0].role == "assistant"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THINKING
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in spoken if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.model_dump() == ask(client).usage.model_dump()
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(deltas) > 10


def test_without_being_asked_a_stream_tells_no_usage(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, stream=True))


@pytest.mark.parametrize(
    "settings",
    [{"extra_body": {"thinking": {"type": "disabled"}}}, {"reasoning_effort": "none"}],
    ids=["thinking", "reasoning_effort"],
)
def test_thinking_can_be_turned_off(client: openai.OpenAI, settings: dict) -> None:
    answer = ask(client, **settings)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.reasoning_content is None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_deepseeks_model_names_choose_thinking(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for name, thinking in (("deepseek-chat", None), ("deepseek-reasoner", THINKING)):
        answer = client.chat.completions.create(model=name, messages=messages, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].message.reasoning_content == thinking
        assert answer.choices[0].message.content == ANSWER


def test_an_answer_can_be_sent_back_whole_with_its_empty_fields(client: openai.OpenAI) -> None:
    said = ask(client).choices[0].message.model_dump()
    assert said["tool_calls"] is None, "the client fills in fields that the server never sent"
    asked = {"role": "user", "content": QUESTION}
    answer = client.chat.completions.create(model="little", messages=[asked, said, asked], temperature=0)  # type: ignore[list-item]
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_over_several_tokens_ends_the_answer_before_it(client: openai.OpenAI, stream: bool) -> None:
    stop = ANSWER[3:9]  # "answer" stands in no single token of a vocabulary this small
    answer = ask(client, stop=[stop, "never said"], stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == ANSWER[: ANSWER.index(stop)]
    assert reason == "stop"


def test_a_stop_text_in_the_thinking_does_not_count(client: openai.OpenAI) -> None:
    assert ask(client, stop="Two and").choices[0].message.content == ANSWER


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer_is_kept_to(client: openai.OpenAI, name: str) -> None:
    answer = ask(client, ENDLESS, **{name: 9})
    assert answer.usage.completion_tokens == 9
    assert answer.choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(client: openai.OpenAI) -> None:
    def said(seed: int) -> str:
        message = ask(client, "something else", temperature=2.0, top_p=1.0, seed=seed, max_tokens=40).choices[0].message
        return f"{message.reasoning_content} {message.content}"

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_text_parts_and_developer_messages_are_read(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]}]
    answer = client.chat.completions.create(model="little", messages=messages, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == ANSWER
    messages.insert(0, {"role": "developer", "content": [{"type": "text", "text": ""}]})
    answer = client.chat.completions.create(model="little", messages=messages, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == ANSWER


def test_control_tokens_typed_by_a_user_stay_text(client: openai.OpenAI) -> None:
    plain = ask(client, "x<｜Assistant｜></think>", max_tokens=1).usage.prompt_tokens
    assert plain > ask(client, "x", max_tokens=1).usage.prompt_tokens + 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 2}, "n = 2"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format 'json_object'"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 3}, "temperature is 3"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"temperature": "1"}, "temperature: "),
        ({"temperature": True}, "temperature: "),
        ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options.include_usage: "),
        ({"reasoning_effort": "banana"}, "reasoning_effort: "),
        ({"extra_body": {"thinking": {"type": True}}}, "thinking.type: "),
        ({"stop": [5]}, "stop"),
        ({"seed": 2**70}, "seed: "),
        ({"stop": [""]}, "stop must be"),
        ({"extra_body": {"top_k": 5}}, "top_k is not a parameter"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content holds a part"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "reads at most"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, settings: dict, said: str) -> None:
    asked = {"model": "little", "messages": [{"role": "user", "content": "a"}], **settings}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert said in refused.value.body["message"]  # type: ignore[index]
    assert "\n" not in refused.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "param", "code"),
    [
        ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"reasoning_effort": "banana"}, "reasoning_effort", "invalid_value"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"extra_body": {"top_k": 5}}, "top_k", "unknown_parameter"),
        ({"stop": [5]}, "stop", "invalid_type"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content",
         "unsupported_value"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_programs_are_told_which_parameter_and_why(
    client: openai.OpenAI, settings: dict, param: str, code: str
) -> None:
    asked = {"model": "little", "messages": [{"role": "user", "content": "a"}], **settings}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_what_is_about_the_caller_is_accepted(client: openai.OpenAI) -> None:
    about = {"user": "me", "safety_identifier": "5f2", "prompt_cache_key": "sums"}
    assert ask(client, **about).choices[0].message.content == ANSWER
    assert ask(client, reasoning_effort="high").choices[0].message.reasoning_content == THINKING


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'little'") as refused:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
