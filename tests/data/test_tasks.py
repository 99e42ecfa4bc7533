"""Problems are right, their thinking is right step by step, the judge cannot be fooled, and evaluation is unseen."""

import ast
import json
import operator
import re
import time
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import pytest
import reasoning_gym

from motley.data.conversation import ConversationEncoder
from motley.data.sources import read_conversations
from motley.data.tasks import (
    EASIER,
    FAMILIES,
    Problem,
    conversation,
    fresh_problems,
    is_held_out,
    make_problems,
    score,
    seen_questions,
    substance,
    write_jsonl,
)
from motley.data.tokenizer import train_tokenizer
from motley.errors import InputError

COUNT = 150
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.USub: operator.neg}


def drawn(family: str, count: int = COUNT, **settings) -> list[Problem]:  # type: ignore[no-untyped-def]
    return list(make_problems([family], count, **{"seed": 3, **settings}))


def value_of(expression: str) -> int:
    """Plus and minus over whole numbers, and nothing else."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](walk(node.operand))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return walk(ast.parse(re.sub(r"\b0+(?=\d)", "", expression), mode="eval").body)


@pytest.mark.parametrize("family", FAMILIES | EASIER)
def test_the_answer_is_right_for_us_and_for_the_library(family: str) -> None:
    scorer = cache(reasoning_gym.get_score_answer_fn)  # each call would read the library's word list again
    for problem in drawn(family):
        assert score(problem, problem.answer) == 1.0
        assert scorer(problem.entry["metadata"]["source_dataset"])(problem.answer, problem.entry) == 1.0
        assert problem.family == family


def test_sums_are_worked_out_rightly_digit_by_digit() -> None:
    for problem in drawn("chain_sum"):
        expression = re.sub(r"[^\d+ -]", "", problem.question).strip()
        for line in problem.thinking.splitlines():
            whole, steps = line.split(": ")
            steps, result = steps.split(" so ")
            assert value_of(whole) == int(result) >= 0
            for step in steps.split():
                left, right = step.split("=")
                assert value_of(left) == int(right)
        assert problem.thinking.endswith(f"so {problem.answer}")
        assert value_of(expression) == int(problem.answer)


def test_countdown_tries_are_right_and_the_last_one_fits() -> None:
    for problem in drawn("countdown"):
        numbers, target = problem.entry["metadata"]["numbers"], problem.entry["metadata"]["target"]
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted([*numbers, target])
        words = problem.thinking.split()
        for word in words:
            if "=" in word:
                left, right = word.split("=")
                assert value_of(left) == int(right)
        tries = [(one, two) for one, two in pairwise(words) if two in ("yes", "no")]
        assert [verdict for _, verdict in tries] == ["no"] * (len(tries) - 1) + ["yes"]
        assert all((int(step.split("=")[1]) == target) == (verdict == "yes") for step, verdict in tries)
        assert value_of(problem.answer) == target
        assert sorted(map(int, re.findall(r"\d+", problem.answer))) == sorted(numbers)


def test_sorting_takes_the_best_of_what_is_left() -> None:
    for problem in drawn("number_sorting"):
        left = list(map(int, re.findall(r"\d+", problem.question)))
        best = min if "ascending" in problem.question else max
        for line in problem.thinking.splitlines():
            taken, *rest = map(int, re.findall(r"\d+", line))
            assert taken == best(left)
            left.remove(taken)
            assert rest == left
        assert left == []


def test_counting_walks_over_every_letter() -> None:
    for problem in drawn("letter_counting"):
        letter = problem.entry["metadata"]["target_letter"]
        letters = re.sub(r"[^a-z]", "", "".join(re.findall(r"\b[a-z](?:-[a-z])*\b", problem.question.split(" in")[-1])))
        steps = re.findall(r"([a-z])(\d+)", problem.thinking)
        assert "".join(character for character, _ in steps) == letters
        for place, (_, count) in enumerate(steps, start=1):
            assert int(count) == letters[:place].count(letter)
        assert problem.answer == str(letters.count(letter))


def test_spelling_backward_numbers_the_letters_and_turns_them() -> None:
    for problem in drawn("spell_backward"):
        forward, backward = (re.findall(r"([a-z])(\d)", line) for line in problem.thinking.splitlines())
        assert [int(number) for _, number in forward] == list(range(1, len(forward) + 1))
        assert backward == forward[::-1]
        assert problem.answer == "".join(letter for letter, _ in backward)
        assert "-".join(problem.answer[::-1]) in problem.question


def test_easier_problems_have_less_to_work_out() -> None:
    def lines(family: str) -> int:
        return max(len(problem.thinking.splitlines()) for problem in drawn(family, 400))

    assert (lines("chain_sum:easy"), lines("chain_sum")) == (1, 2)
    assert (lines("number_sorting:easy"), lines("number_sorting")) == (3, 5)
    assert max(len(problem.answer) for problem in drawn("spell_backward:easy")) == 5
    assert all(len(problem.entry["metadata"]["span"]) == 1 for problem in drawn("letter_counting:easy"))


@pytest.mark.parametrize("family", EASIER)
def test_what_is_held_out_of_a_family_is_held_out_of_its_easier_form_too(family: str) -> None:
    whole = family.removesuffix(":easy")
    asked = {substance(p.question) for p in make_problems([family], 500, 7, evaluation=True)}
    asked |= {substance(p.question) for p in make_problems([whole], 2000, 7, evaluation=True)}
    for trained in (family, whole):
        assert not asked & {substance(p.question) for p in make_problems([trained], 5000, 7)}


@pytest.mark.parametrize("family", FAMILIES | EASIER)
def test_wrong_answers_are_wrong(family: str) -> None:
    for problem in drawn(family, 40):
        changed = re.sub(r"\d+", lambda found: str(int(found[0]) + 1), problem.answer, count=1)
        wrong = ["", " ", "I do not know", problem.answer + " 7", "x" + problem.answer, problem.answer[:-1], "None"]
        wrong += [changed] if changed != problem.answer else [problem.answer + problem.answer]
        if family.startswith("number_sorting"):
            items = json.loads(problem.answer)
            wrong += [str(items[1:]), str([*items, 5]), str(items[::-1]), str([item + 1 for item in items])]
        wrong = [answer for answer in wrong if answer.strip() != problem.answer]
        if family.startswith("number_sorting"):  # the numbers are what counts, not the brackets
            wrong = [answer for answer in wrong if re.findall(r"\d+", answer) != re.findall(r"\d+", problem.answer)]
        for answer in wrong:
            assert score(problem, answer) == 0.0, (problem.question, answer)


HOSTILE = [
    "__import__('os').system('touch hacked')",
    "exec(\"open('hacked', 'w')\")",
    "().__class__.__bases__[0].__subclasses__()",
    "9**9**9**9",
    "9" * 100_000,
    "(" * 5000 + "1" + ")" * 5000,
    "1//0",
    "1/0",
    "lambda: 0",
    "\x00",
    "７ + 16 - 17",
    "[" * 10_000,
    "\ud800",
]


@pytest.mark.parametrize("family", FAMILIES | EASIER)
def test_hostile_answers_are_wrong_quickly_and_nothing_is_executed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problem = drawn(family, 1)[0]
    started = time.process_time()
    for answer in HOSTILE:
        assert score(problem, answer) == 0.0, answer[:40]
    assert time.process_time() - started < 60, "an answer was computed that should not have been"
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_draws_the_same_and_another_draws_others() -> None:
    def key(problems: list[Problem]) -> list[tuple[str, str, str]]:
        return [(problem.question, problem.thinking, problem.answer) for problem in problems]

    families = tuple(FAMILIES)
    first = list(make_problems(families, 50, seed=1))
    assert key(first) == key(list(make_problems(families, 50, seed=1)))
    assert key(first) != key(list(make_problems(families, 50, seed=2)))
    assert [problem.family for problem in first[:5]] == list(families)


def test_training_never_draws_what_is_held_out_and_evaluation_only_that() -> None:
    families = tuple(FAMILIES)
    trained = {substance(problem.question) for problem in make_problems(families, 4000, seed=0)}
    asked = [problem.question for problem in make_problems(families, 500, seed=0, evaluation=True)]
    assert not any(is_held_out(question) for question in (p.question for p in make_problems(families, 500, seed=7)))
    assert all(is_held_out(question) for question in asked)
    assert not {substance(question) for question in asked} & trained


def test_another_wording_or_order_is_the_same_problem() -> None:
    assert substance("What is 27 + 58?") == substance("58 + 27 = ?")
    assert substance("Make 6 from 7, 16 and 17 with + and -.") == substance("Use 17, 7 and 16 with + and - to make 6.")
    assert substance("What is 27 + 58?") != substance("What is 27 - 58?")
    assert substance("Spell backward: t-o-p") == substance("Reverse the letters: t-o-p")


def test_fresh_problems_are_asked_once_and_never_if_seen() -> None:
    first = list(fresh_problems(("chain_sum", "countdown"), 100, seed=0, seen=set()))
    assert len({substance(problem.question) for problem in first}) == 100
    seen = {substance(problem.question) for problem in first[:50]}
    second = list(fresh_problems(("chain_sum", "countdown"), 100, seed=0, seen=seen))
    assert not seen & {substance(problem.question) for problem in second}
    assert [problem.family for problem in second[:4]] == ["chain_sum", "countdown"] * 2


def test_problems_are_written_as_conversations_each_once_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    problems = list(make_problems(("spell_backward",), 3000, seed=0))
    written = write_jsonl(problems, file)
    assert written == len({problem.question for problem in problems}) < 3000
    conversations = list(read_conversations([str(file)]))
    assert len(conversations) == written
    assert tuple(conversations[0]) == conversation(problems[0])
    assert seen_questions([file]) == {substance(problem.question) for problem in problems}


def test_a_problem_fits_into_a_row_of_the_demo() -> None:
    tokenizer = train_tokenizer([p.question + p.thinking for p in make_problems(tuple(FAMILIES), 300, seed=1)], 400)
    encoder = ConversationEncoder(tokenizer)
    lengths = [len(encoder.encode(conversation(p)).ids) for p in make_problems(tuple(FAMILIES), 500, seed=2)]
    assert max(lengths) < 256


def test_unknown_families_and_seeds_are_named() -> None:
    with pytest.raises(InputError, match="no family of problems is called chess"):
        list(make_problems(["chess"], 1, seed=0))
    with pytest.raises(InputError, match="seed of problems is -1"):
        list(make_problems(["countdown"], 1, seed=-1))
    with pytest.raises(InputError, match="there are chain_sum"):
        list(islice(make_problems([], 1, seed=0), 1))
