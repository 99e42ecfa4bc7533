"""Text is cut at a stop text exactly, wherever the tokens are cut; thinking is never cut by it."""

import json
import random

import pytest

from motley.data.conversation import Message
from motley.data.stop import StopAtText
from motley.data.tokenizer import END_THINK, THINK, Tokenizer, train_tokenizer
from motley.infer.sampler import SamplingParams
from motley.serve.answer import AnswerRequest, AnswerWriter


def cut_naively(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):  # the stop text that is complete first, the longest of those that end there
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("seed", range(300))
def test_a_stop_text_is_found_wherever_the_pieces_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("aab", k=chance.randint(0, 30)))
    stops = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(0, 3))]
    stop, passed, at = StopAtText(stops), "", 0
    while at < len(text):
        size = chance.randint(1, 4)
        passed += stop.push(text[at : at + size])
        at += size
        assert cut_naively(text, stops).startswith(passed), "something was shown that stands behind a stop text"
    if not stop.stopped:
        passed += stop.finish()
    assert passed == cut_naively(text, stops)
    assert stop.stopped == any(one in text for one in stops)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_stands_behind_a_stop_text_is_the_rest(size: int) -> None:
    text, stop, at = "one END two", StopAtText(["END"]), 0
    while not stop.stopped:
        stop.push(text[at : at + size])
        at += size
    assert stop.rest == text[len("one END") : at]


def test_text_that_cannot_begin_a_stop_text_is_not_held_back() -> None:
    stop = StopAtText(["END"])
    assert stop.push("hello ") == "hello "
    assert stop.push("E") == ""
    assert stop.push("N") == ""
    assert stop.push("X") == "ENX"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["one two three four five " * 4], vocab_size=300)


def written(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), thinking: bool = True
) -> tuple[str, str, AnswerWriter]:
    request = AnswerRequest([Message("user", "?")], SamplingParams(stop=stop), thinking)
    writer = AnswerWriter(tokenizer, 7, request)
    pieces = []
    for one in ids:
        pieces.append(writer.push(one))
        if writer.stopped:
            break
    pieces.append(writer.finish())
    return "".join(p.reasoning for p in pieces), "".join(p.content for p in pieces), writer


def test_thinking_and_answer_are_told_apart_and_counted(tokenizer: Tokenizer) -> None:
    thought, answer = tokenizer.encode("one two"), tokenizer.encode("three")
    ids = [*thought, tokenizer.end_think_id, *answer, tokenizer.eos_id]
    reasoning, content, writer = written(tokenizer, ids)
    assert (reasoning, content, writer.finish_reason) == ("one two", "three", "stop")
    assert writer.usage.prompt_tokens == 7
    assert writer.usage.completion_tokens == len(ids)
    assert writer.usage.reasoning_tokens == len(thought) + 1


def test_thinking_that_is_spelled_in_ordinary_text_is_told_apart_too(tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer.definition)
    definition["added_tokens"] = [one for one in definition["added_tokens"] if one["content"] not in (THINK, END_THINK)]
    older = Tokenizer(json.dumps(definition))
    ids = [*older.encode("one two\n</think>\n\nthree two"), older.eos_id]
    reasoning, content, writer = written(older, ids, stop=("two",))
    assert (reasoning, content, writer.finish_reason) == ("one two", "three ", "stop")
    assert 0 < writer.usage.reasoning_tokens < writer.usage.completion_tokens
    assert written(older, ids, thinking=False)[:2] == ("", "one two\n</think>\n\nthree two")


def test_a_stop_text_cuts_the_answer_but_never_the_thinking(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one two"), tokenizer.end_think_id, *tokenizer.encode("three two four"), tokenizer.eos_id]
    reasoning, content, writer = written(tokenizer, ids, stop=("two",))
    assert (reasoning, content, writer.finish_reason) == ("one two", "three ", "stop")


def test_an_answer_that_is_cut_off_says_length_and_shows_half_a_character_as_unreadable(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("é")[:1]
    assert written(tokenizer, half, thinking=False)[1:2] == ("\ufffd",)
    _, content, writer = written(tokenizer, tokenizer.encode("one tw"), stop=("two",), thinking=False)
    assert (content, writer.finish_reason, writer.usage.reasoning_tokens) == ("one tw", "length", 0)
