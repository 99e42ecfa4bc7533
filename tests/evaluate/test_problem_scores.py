"""Shares of right answers are counted honestly: thinking apart, cut answers wrong, the error beside the number."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from motley.data.conversation import ConversationEncoder, Message
from motley.data.tasks import Problem, make_problems
from motley.data.tokenizer import Tokenizer, train_tokenizer
from motley.evaluate.problems import SAMPLES, Share, evaluate_problems
from motley.infer.engine import Completion
from motley.infer.sampler import SamplingParams


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["numbers and letters 0 1 2 3 4 5 6 7 8 9"], vocab_size=280)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(make_problems(("chain_sum", "spell_backward"), 40, seed=0, evaluation=True))


class KnownAnswers:
    """An engine that says what is written down for each problem."""

    def __init__(self, tokenizer: Tokenizer, said: Sequence[Completion]) -> None:
        self.tokenizer, self.said = tokenizer, list(said)
        self.prompts: list[Sequence[int]] = []

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, **_: Any) -> list[Completion]:
        self.prompts = list(prompts)
        self.params = params
        return self.said


def completion(tokenizer: Tokenizer, thinking: str, answer: str | None, reason: str = "stop") -> Completion:
    ids = tokenizer.encode(thinking)
    if answer is not None:
        ids += [tokenizer.end_think_id, *tokenizer.encode(answer)]
    return Completion(ids, reason)  # type: ignore[arg-type]


def test_shares_and_their_errors_are_counted_in_all_and_by_family(
    tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    # every sum right, one word in four right
    said = []
    for number, problem in enumerate(problems):
        right = problem.family == "chain_sum" or number % 8 == 1
        said.append(completion(tokenizer, problem.thinking, problem.answer if right else "wrong"))
    engine: Any = KnownAnswers(tokenizer, said)
    report = evaluate_problems(engine, ConversationEncoder(tokenizer), problems)
    assert report.count == 40
    assert report.accuracy == 25 / 40
    assert report.standard_error == pytest.approx(math.sqrt(25 / 40 * 15 / 40 / 40))
    assert report.families["chain_sum"] == Share(20, 1.0, 0.0)
    assert report.families["spell_backward"].accuracy == 5 / 20
    assert report.families["spell_backward"].standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 20))
    assert report.truncated_share == 0
    assert report.mean_tokens == pytest.approx(sum(len(one.ids) for one in said) / 40)
    assert len(report.samples) == SAMPLES


def test_problems_are_asked_as_a_user_would_with_room_to_think(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    engine: Any = KnownAnswers(tokenizer, [completion(tokenizer, "", "x")] * 40)
    encoder = ConversationEncoder(tokenizer)
    evaluate_problems(engine, encoder, problems)
    assert engine.prompts == [encoder.prompt([Message("user", problem.question)]) for problem in problems]
    assert engine.prompts[0][-1] == tokenizer.think_id
    assert engine.params.temperature == 0


def test_a_right_answer_within_the_thinking_does_not_count(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    said = [completion(tokenizer, problem.answer, None) for problem in problems]
    engine: Any = KnownAnswers(tokenizer, said)
    assert evaluate_problems(engine, ConversationEncoder(tokenizer), problems).accuracy == 0


def test_an_answer_that_was_cut_off_is_wrong_and_counted_as_cut(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    said = [completion(tokenizer, "", problem.answer, "length") for problem in problems]
    engine: Any = KnownAnswers(tokenizer, said)
    report = evaluate_problems(engine, ConversationEncoder(tokenizer), problems)
    assert (report.accuracy, report.truncated_share) == (0, 1)


def test_broken_text_and_stray_control_tokens_are_just_wrong(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    stray = [[], [tokenizer.think_id] * 3, [tokenizer.bos_id, tokenizer.user_id], tokenizer.encode("é")[:1] * 2]
    engine: Any = KnownAnswers(tokenizer, [Completion(ids, "stop") for ids in stray])
    report = evaluate_problems(engine, ConversationEncoder(tokenizer), problems[:4])
    assert report.accuracy == 0


def test_samples_are_drawn_by_lot_and_tell_what_was_expected(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    said = [completion(tokenizer, "hm", p.answer if n % 2 else "?") for n, p in enumerate(problems)]
    engine: Any = KnownAnswers(tokenizer, said)
    report = evaluate_problems(engine, ConversationEncoder(tokenizer), problems)
    assert {sample.correct for sample in report.samples} == {True, False}
    for sample in report.samples:
        assert sample.thinking == "hm"
        assert sample.correct == (sample.answer == sample.expected)
