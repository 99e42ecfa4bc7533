"""Verifiable problems as conversations with thinking, from reasoning-gym.

    library's entry ──▶ short question, worked thinking, short answer ──▶ the library's scorer says 1.0, or not

The library draws the numbers and words and judges the answers; wording and thinking are ours, written so that a model
of a few million parameters can learn each step: numbers digit by digit, words letter by letter (their letters stand
apart in the question, since the tokenizer would hide them), searches tried one after another.

Training and evaluation share no problem, however many are drawn: a hash of what a problem is about (`substance`: its
numbers, letters and signs, in any order and wording) gives one problem in `HELD_OUT` to evaluation and the others to
training. They also draw from seeds far apart, since item i of the library depends on seed + i only and nearby seeds
give the same items shifted.
"""

import json
import re
import zlib
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
SEEDS = EVALUATION // SEED_DISTANCE
HELD_OUT = 8  # one problem in so many is kept for evaluation
SUBSTANCE = re.compile(r"\d+|\b[a-z]\b|(?<= )[+-](?=[ .])|\b(?:ascending|descending)\b")
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
    """Question and solution of an entry; `wordings` are several forms of the same question."""

    wordings: tuple[str, ...]
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
    wordings = (f"What is {expression}?", f"Calculate {expression}.", f"{expression} = ?")
    return Worked(wordings, "\n".join(lines), entry["answer"])


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
    """Try the signs one after another, in two steps each, until one fits: `7+16=23 23+17=40 no 23-17=6 yes`."""
    (a, b, c), target = entry["metadata"]["numbers"], entry["metadata"]["target"]
    wordings = (
        f"Make {target} from {a}, {b} and {c} with + and -.",
        f"Use {a}, {b} and {c} with + and - to make {target}.",
        f"Reach {target} with {a}, {b}, {c} by + and -.",
    )
    lines = []
    for first, second, third, signs in ((a, b, c, "+-"), (a, c, b, "-"), (b, c, a, "-")):
        pair = first + second
        lines.append(f"{first}+{second}={pair}")
        for sign in signs:
            result = pair + third if sign == "+" else pair - third
            lines[-1] += f" {pair}{sign}{third}={result} {'yes' if result == target else 'no'}"
            if result == target:
                return Worked(wordings, "\n".join(lines), f"{first} + {second} {sign} {third}")
    raise AssertionError(f"no signs make {target} of {a}, {b}, {c}")


# ------------------------------------------------------------------------------------------ number_sorting


def _number_sorting(entry: dict[str, Any]) -> Worked:
    """Take the smallest (largest) of what is left, again and again: `14 | 81 55` is 14 taken, 81 and 55 left."""
    direction = entry["metadata"]["direction"]
    left = [int(float(number)) for number in entry["metadata"]["original_numbers"]]
    numbers = ", ".join(map(str, left))
    wordings = (
        f"Sort in {direction} order: {numbers}",
        f"Sort {numbers} in {direction} order.",
        f"Put in {direction} order: {numbers}",
    )
    best, steps, taken = (min if direction == "ascending" else max), [], []
    while left:
        taken.append(best(left))
        left.remove(taken[-1])
        steps.append(f"{taken[-1]}" + (f" | {' '.join(map(str, left))}" if left else ""))
    return Worked(wordings, "\n".join(steps), f"[{', '.join(map(str, taken))}]")


# ------------------------------------------------------------------------------------------ letters


def _letter_counting(entry: dict[str, Any]) -> Worked | None:
    """Walk over the letters, each with the count so far: `t0h0e1h1e2r2o2`.

    A digit after each letter keeps the letters apart, so that every one is a token of its own.
    """
    words, letter = [word.lower() for word in entry["metadata"]["span"]], entry["metadata"]["target_letter"]
    if not all(word.isascii() and word.isalpha() for word in words) or sum(map(len, words)) > 14:
        return None
    count, walk = 0, ""
    for character in "".join(words):
        count += character == letter
        walk += f"{character}{count}"
    apart = " ".join(map("-".join, words))
    wordings = (
        f"Count the letter {letter} in: {apart}",
        f"How often is the letter {letter} in {apart}?",
        f"How many {letter} are in {apart}?",
    )
    return Worked(wordings, walk, entry["answer"])


def _spell_backward(entry: dict[str, Any]) -> Worked | None:
    """Number the letters, then read them from the last: `h1e2r3o4`, `o4r3e2h1`; all in small letters."""
    word = entry["metadata"]["word"].lower()
    if not (word.isascii() and word.isalpha()):
        return None
    numbered = [f"{letter}{number}" for number, letter in enumerate(word, start=1)]
    apart = "-".join(word)
    wordings = (f"Spell backward: {apart}", f"Spell {apart} backward.", f"Reverse the letters: {apart}")
    return Worked(wordings, "".join(numbered) + "\n" + "".join(reversed(numbered)), word[::-1])


# ------------------------------------------------------------------------------------------ all of them


def _whole_numbers(most: int) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Three to `most` numbers of two digits, to be sorted."""
    return _library(
        "number_sorting",
        min_numbers=3, max_numbers=most, min_decimals=0, max_decimals=0, min_value=10, max_value=99,
    )  # fmt: skip


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
        "three to five whole numbers from 10 to 99, both directions",
        _whole_numbers(5),
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

EASIER: dict[str, Family] = {
    "chain_sum:easy": Family(
        "Sums and differences, easy",
        "two numbers of two digits, no negative result",
        _library("chain_sum", min_terms=2, max_terms=2, min_digits=2, max_digits=2),
        _chain_sum,
    ),
    "number_sorting:easy": Family(
        "Sorting, easy",
        "three whole numbers from 10 to 99, both directions",
        _whole_numbers(3),
        _number_sorting,
    ),
    "letter_counting:easy": Family(
        "Counting letters, easy",
        "a word of at most 14 letters, written apart",
        _library("letter_counting", min_words=1, max_words=1),
        _letter_counting,
    ),
    "spell_backward:easy": Family(
        "Spelling backward, easy",
        "a word of three to five letters, written apart",
        _library("spell_backward", min_word_len=3, max_word_len=5),
        _spell_backward,
    ),
}  # fmt: skip
"""Easier problems of the same kinds, for machines on which the full ones cannot be learned in minutes."""


def family_named(name: str) -> Family:
    """A family by its name, which ends in `:easy` for the easier form. Raises InputError for an unknown name."""
    known = FAMILIES | EASIER
    if name not in known:
        raise InputError(f"no family of problems is called {name or 'nothing'}; there are {', '.join(known)}")
    return known[name]


def substance(question: str) -> str:
    """The numbers, single letters and signs of a question, sorted: the same for all its wordings.

    Two questions of equal substance count as the same problem: `27 + 58` and `58 + 27`, or the same three numbers of a
    countdown in another order.
    """
    return " ".join(sorted(SUBSTANCE.findall(question.lower())))


def is_held_out(question: str) -> bool:
    """Whether the problem belongs to evaluation; depends on its substance alone."""
    return zlib.crc32(substance(question).encode()) % HELD_OUT == 0


def make_problems(families: Sequence[str], count: int, seed: int, evaluation: bool = False) -> Iterator[Problem]:
    """`count` problems, the families taking turns; the same arguments give the same problems.

    Problems may repeat within a draw; `write_jsonl` and `fresh_problems` drop repetitions.

    Args:
        families: names from `FAMILIES`.
        count: problems in all.
        seed: which draw, 0 … 4095.
        evaluation: draw what is held out of every training draw.

    Raises InputError for an unknown family or a seed out of range.
    """
    for name in families or [""]:
        family_named(name)
    if not 0 <= seed < SEEDS:
        raise InputError(f"the seed of problems is {seed}; it must be from 0 to {SEEDS - 1}")
    streams = [_worked(name, seed, evaluation) for name in families]
    return (next(streams[number % len(streams)]) for number in range(count))


def _worked(name: str, seed: int, evaluation: bool) -> Iterator[Problem]:
    family, first = family_named(name), seed * SEED_DISTANCE + (EVALUATION if evaluation else 0)
    for entry in family.entries(first):
        worked = family.work(entry)
        if worked is not None and is_held_out(worked.wordings[0]) == evaluation:
            question = worked.wordings[entry["metadata"]["source_index"] % len(worked.wordings)]
            yield Problem(name, question, worked.thinking, worked.answer, entry)


def fresh_problems(families: Sequence[str], count: int, seed: int, seen: set[str]) -> Iterator[Problem]:
    """`count` problems for evaluation: held out of training, none twice, none whose `substance` is in `seen`.

    Raises InputError when the families have too few such problems.
    """
    seen = set(seen)
    asked: dict[str, int] = dict.fromkeys(families, 0)
    streams = {name: make_problems([name], 50 * count + 10_000, seed, evaluation=True) for name in families}
    for number in range(count):
        name = families[number % len(families)]
        problem = next((one for one in streams[name] if substance(one.question) not in seen), None)
        if problem is None:
            raise InputError(f"{name} has only {asked[name]} fresh problems; ask for fewer, or leave it out")
        seen.add(substance(problem.question))
        asked[name] += 1
        yield problem


def score(problem: Problem, answer: str) -> float:
    """1.0 if `answer` is right, else 0.0; the library's scorer judges, and must be quite sure.

    Its partial credit counts as wrong, its tolerance of 1 when sorting is not used, and only plain expressions reach
    its evaluator.
    """
    answer, kind = answer.strip(), problem.entry["metadata"]["source_dataset"]
    if kind == "countdown" and (not PLAIN_EXPRESSION.fullmatch(answer) or "**" in answer or "//" in answer):
        return 0.0
    if kind == "number_sorting":
        found = re.findall(r"-?\d+(?:\.\d+)?", answer)
        if [float(number) for number in found] != [float(n) for n in problem.entry["metadata"]["sorted_numbers"]]:
            return 0.0
    return float(_scorer(kind)(answer, problem.entry) == 1.0)


@cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.get_score_answer_fn(name)  # pyright: ignore[reportReturnType] (annotated without arguments)


def conversation(problem: Problem) -> tuple[Message, Message]:
    """The problem as a user's question and the assistant's answer with its reasoning."""
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
    """The `substance` of what users ask in files of conversations: not to be asked again in an evaluation."""
    from motley.data.sources import read_conversations

    paths = [str(file) for file in files]
    conversations = read_conversations(paths) if paths else ()
    return {substance(message.content) for messages in conversations for message in messages if message.role == "user"}
