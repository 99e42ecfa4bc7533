"""Verifiable problems as conversations with thinking, from reasoning-gym.

    library's entry ──▶ short question, worked thinking, short answer ──▶ the library's scorer says 1.0, or not

The library draws the numbers and words and judges the answers; wording and thinking are ours, written so that a model
of a few million parameters can learn each step: numbers digit by digit, words letter by letter (their letters stand
apart in the question, since the tokenizer would hide them), searches tried one after another.

Item i of the library depends on seed + i only, so nearby seeds give the same items shifted. Training draws from seeds
below `EVALUATION`, evaluation from above, and what occurs in training is dropped from evaluation by its question.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import reasoning_gym

from motley.data.conversation import Message
from motley.errors import InputError
from motley.files import whole_file

EVALUATION = 1 << 40  # seeds from here on are never trained on
SEED_DISTANCE = 1 << 28  # items of one seed; the next seed begins behind them
PLAIN_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,80}")  # all that the library may evaluate


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, how it is worked out, and the library's entry that judges an answer."""

    family: str
    question: str
    thinking: str
    answer: str
    entry: dict[str, Any]


@dataclass(frozen=True)
class Worked:
    """How an entry is put to the model and solved."""

    question: str
    thinking: str
    answer: str


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        title: for people.
        difficulty: what is asked at most, in words.
        entries: the library's entries from a seed on, without end.
        work: question, thinking and answer of an entry; None if it lies outside the difficulty.
    """

    title: str
    difficulty: str
    entries: Callable[[int], Iterator[dict[str, Any]]]
    work: Callable[[dict[str, Any]], Worked | None]


def _library(name: str, **config: Any) -> Callable[[int], Iterator[dict[str, Any]]]:
    def entries(seed: int) -> Iterator[dict[str, Any]]:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=SEED_DISTANCE, **config)
        for index in range(SEED_DISTANCE):
            yield dataset[index]

    return entries


# ------------------------------------------------------------------------------------------ chain_sum


def _column_sum(a: int, b: int) -> tuple[str, int]:
    """a + b from the last digit on, carrying: `7+8=15 2+5+1=8`."""
    steps, carry, left, right = [], 0, a, b
    while left or right or not steps:
        terms = [left % 10, right % 10] + ([carry] if carry else [])
        steps.append(f"{'+'.join(map(str, terms))}={sum(terms)}")
        carry, left, right = sum(terms) // 10, left // 10, right // 10
    return " ".join(steps), a + b


def _column_difference(a: int, b: int) -> tuple[str, int]:
    """a - b >= 0 from the last digit on, borrowing: `12-7=5 5-1-1=3`."""
    steps, borrow, left, right = [], 0, a, b
    while left or right or not steps:
        top, bottom = left % 10, [right % 10] + ([1] if borrow else [])
        borrow = top < sum(bottom)
        top += 10 * borrow
        steps.append(f"{'-'.join(map(str, [top, *bottom]))}={top - sum(bottom)}")
        left, right = left // 10, right // 10
    return " ".join(steps), a - b


def _chain_sum(entry: dict[str, Any]) -> Worked | None:
    """`27 + 58 - 14`: one operation a line, digit by digit; only where no partial result is negative."""
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        if sign == "-" and int(term) > total:
            return None
        column = _column_sum if sign == "+" else _column_difference
        steps, result = column(total, int(term))
        lines.append(f"{total}{sign}{term}: {steps} so {result}")
        total = result
    return Worked(f"What is {expression}?", "\n".join(lines), entry["answer"])


# ------------------------------------------------------------------------------------------ countdown


def _countdown_entries(seed: int) -> Iterator[dict[str, Any]]:
    """Entries of the library's form, drawn here: its own generator simplifies each with sympy, 5 ms a problem."""
    for index in range(SEED_DISTANCE):
        random = Random(seed + index)
        numbers = [random.randint(1, 20) for _ in range(3)]
        terms = list(zip(("+", *random.choice(("++", "+-", "-+"))), numbers, strict=True))  # at most one minus
        target = sum(number if sign == "+" else -number for sign, number in terms)
        if not 1 <= target <= 60:
            continue
        expression = " ".join(f"{sign} {number}" for sign, number in terms).removeprefix("+ ")
        random.shuffle(numbers)
        yield {
            "question": f"Calculate {target} using all of these numbers: {', '.join(map(str, numbers))}.",
            "answer": expression,
            "metadata": {"source_dataset": "countdown", "source_index": index, "numbers": numbers, "target": target,
                         "expression": expression},
        }  # fmt: skip


def _countdown(entry: dict[str, Any]) -> Worked:
    """Try the signs one after another, each worked out in two steps, until the target is met."""
    (a, b, c), target = entry["metadata"]["numbers"], entry["metadata"]["target"]
    tried = []
    for first, second in ((a, b), (a, c), (b, c)):
        third = a + b + c - first - second
        for sign in ("+", "-") if (first, second) == (a, b) else ("-",):
            result = first + second + (third if sign == "+" else -third)
            tried.append(f"{first}+{second}={first + second} {first + second}{sign}{third}={result}")
            if result == target:
                question = f"Make {target} from {a}, {b} and {c} with + and -."
                return Worked(question, "\n".join([*tried, "yes"]), f"{first} + {second} {sign} {third}")
            tried[-1] += " no"
    raise AssertionError(f"no signs make {target} of {a}, {b}, {c}")


# ------------------------------------------------------------------------------------------ number_sorting


def _number_sorting(entry: dict[str, Any]) -> Worked:
    """Take the smallest (largest) of what is left, again and again."""
    direction = entry["metadata"]["direction"]
    left = [int(float(number)) for number in entry["metadata"]["original_numbers"]]
    question = f"Sort in {direction} order: {', '.join(map(str, left))}"
    best, steps, taken = (min if direction == "ascending" else max), [], []
    while left:
        taken.append(best(left))
        left.remove(taken[-1])
        steps.append(f"{taken[-1]}" + (f" left {' '.join(map(str, left))}" if left else ""))
    return Worked(question, "\n".join(steps), f"[{', '.join(map(str, taken))}]")


# ------------------------------------------------------------------------------------------ letters


def _apart(word: str) -> str:
    """`hero` → `h e r o`: each letter a token of its own."""
    return " ".join(word)


def _letter_counting(entry: dict[str, Any]) -> Worked | None:
    """Walk over the letters and count aloud."""
    words, letter = [word.lower() for word in entry["metadata"]["span"]], entry["metadata"]["target_letter"]
    if not all(word.isascii() and word.isalpha() for word in words) or sum(map(len, words)) > 14:
        return None
    count, walk = 0, []
    for character in "".join(words):
        count += character == letter
        walk.append(f"{character} {count}" if character == letter else character)
    question = f"How many times does the letter {letter} appear in: {', '.join(map(_apart, words))}?"
    return Worked(question, " ".join(walk), entry["answer"])


def _spell_backward(entry: dict[str, Any]) -> Worked | None:
    """Number the letters, then read them from the last."""
    word = entry["metadata"]["word"]
    if not (word.isascii() and word.isalpha()):
        return None
    forwards = " ".join(f"{number} {letter}" for number, letter in enumerate(word, start=1))
    return Worked(f"Spell backward: {_apart(word)}", f"{forwards}\n{_apart(word[::-1])}", word[::-1])


# ------------------------------------------------------------------------------------------ all of them

FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        "Sums and differences",
        "two or three numbers of two digits, no negative result on the way",
        _library("chain_sum", min_terms=2, max_terms=3, min_digits=2, max_digits=2),
        _chain_sum,
    ),
    "countdown": Family(
        "Countdown", "three numbers up to 20, plus and at most one minus", _countdown_entries, _countdown
    ),
    "number_sorting": Family(
        "Sorting",
        "three to five whole numbers up to 99, both directions",
        _library("number_sorting", min_numbers=3, max_numbers=5, min_decimals=0, max_decimals=0, min_value=0, max_value=99),
        _number_sorting,
    ),
    "letter_counting": Family(
        "Counting letters",
        "one to three words of at most 14 letters together, letters written apart",
        _library("letter_counting", min_words=1, max_words=3),
        _letter_counting,
    ),
    "spell_backward": Family(
        "Spelling backward",
        "a word of three to seven letters, written apart",
        _library("spell_backward", min_word_len=3, max_word_len=7),
        _spell_backward,
    ),
}  # fmt: skip


def make_problems(families: Sequence[str], count: int, seed: int, evaluation: bool = False) -> Iterator[Problem]:
    """`count` problems, the families taking turns; the same arguments give the same problems.

    Args:
        families: names from `FAMILIES`.
        count: problems in all.
        seed: which draw, 0 … 4095.
        evaluation: draw from the seeds that training never sees.

    Raises InputError for an unknown family or a seed out of range.
    """
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise InputError(f"no family of problems is called {unknown or 'nothing'}; there are {', '.join(FAMILIES)}")
    if not 0 <= seed < 4096:
        raise InputError(f"the seed of problems is {seed}; it must be from 0 to 4095")
    first = seed * SEED_DISTANCE + (EVALUATION if evaluation else 0)
    streams = [_worked(name, first) for name in families]
    for number in range(count):
        yield next(streams[number % len(streams)])


def _worked(name: str, seed: int) -> Iterator[Problem]:
    family = FAMILIES[name]
    for entry in family.entries(seed):
        worked = family.work(entry)
        if worked is not None:
            yield Problem(name, worked.question, worked.thinking, worked.answer, entry)


def fresh_problems(families: Sequence[str], count: int, seed: int, seen: set[str]) -> Iterator[Problem]:
    """`count` problems for evaluation: far seeds, none twice, none whose question is in `seen`.

    Raises InputError when the families have too few unseen problems left.
    """
    seen = set(seen)
    asked: dict[str, int] = dict.fromkeys(families, 0)
    streams = {name: make_problems([name], 50 * count + 1000, seed, evaluation=True) for name in families}
    for number in range(count):
        name = families[number % len(families)]
        problem = next((one for one in streams[name] if one.question not in seen), None)
        if problem is None:
            raise InputError(f"{name} has no more problems that were not seen in training ({asked[name]} found)")
        seen.add(problem.question)
        asked[name] += 1
        yield problem


def score(problem: Problem, answer: str) -> float:
    """1.0 if `answer` is right, else 0.0; the library's scorer judges, and must be quite sure.

    Its partial credit counts as wrong, its tolerance of 1 when sorting is not used, and only plain expressions reach
    its evaluator.
    """
    answer = answer.strip()
    if problem.family == "countdown" and (not PLAIN_EXPRESSION.fullmatch(answer) or "**" in answer or "//" in answer):
        return 0.0
    if problem.family == "number_sorting":
        found = re.findall(r"-?\d+(?:\.\d+)?", answer)
        if [float(number) for number in found] != [float(n) for n in problem.entry["metadata"]["sorted_numbers"]]:
            return 0.0
    return float(_scorer(problem.entry["metadata"]["source_dataset"])(answer, problem.entry) == 1.0)


@cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.get_score_answer_fn(name)


def conversation(problem: Problem) -> tuple[Message, Message]:
    """The problem as a user asks it, and the assistant's worked answer."""
    return Message("user", problem.question), Message("assistant", problem.answer, problem.thinking)


def write_jsonl(problems: Iterable[Problem], path: Path) -> int:
    """Write conversations in the common `messages` form, one a line, each question once; returns how many.

    What `motley sft` reads from anyone's file.
    """
    written: set[str] = set()
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for problem in problems:
            if problem.question in written:
                continue
            written.add(problem.question)
            messages = [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.answer, "reasoning_content": problem.thinking},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(written)


def seen_questions(files: Iterable[Path]) -> set[str]:
    """What users ask in files of conversations: not to be asked again in an evaluation."""
    from motley.data.sources import read_conversations

    paths = [str(file) for file in files]
    return {m.content for messages in (read_conversations(paths) if paths else ()) for m in messages if m.role == "user"}
