"""Share of new problems that a model answers correctly, with reasoning."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from motley.data.conversation import AnswerSplitter, ConversationEncoder
from motley.data.tasks import Problem, conversation, score
from motley.infer.engine import Completion, Engine
from motley.infer.sampler import SamplingParams
from motley.progress import Progress

SAMPLES = 10  # transcripts shown, drawn by lot


@dataclass(frozen=True)
class Share:
    """A share of right answers and how sure it is (binomial standard error)."""

    count: int
    accuracy: float
    standard_error: float

    @classmethod
    def of(cls, right: Sequence[bool]) -> "Share":
        share = sum(right) / len(right)
        return cls(len(right), share, math.sqrt(share * (1 - share) / len(right)))


@dataclass(frozen=True)
class Sample:
    """One transcript."""

    family: str
    question: str
    thinking: str
    answer: str
    correct: bool
    expected: str


@dataclass(frozen=True)
class ProblemReport:
    """Exact answers over all problems and in each family.

    truncated_share: answers cut at the token limit (they count as wrong). mean_tokens: length of an answer, thinking
    included. samples: drawn by lot, right and wrong alike.
    """

    count: int
    accuracy: float
    standard_error: float
    families: dict[str, Share]
    truncated_share: float
    mean_tokens: float
    seconds: float
    temperature: float
    samples: list[Sample]


def evaluate_problems(
    engine: Engine,
    encoder: ConversationEncoder,
    problems: Sequence[Problem],
    max_tokens: int = 200,
    temperature: float = 0.0,
) -> ProblemReport:
    """Ask every problem once and let the library's scorer judge what follows `</think>`."""
    started = time.monotonic()
    prompts = [encoder.prompt(conversation(problem)[:1]) for problem in problems]
    params = SamplingParams(temperature=temperature, top_p=1.0, max_tokens=max_tokens, seed=0)
    with Progress("answering", len(problems), "problems") as bar:
        completions = engine.generate(prompts, params, progress=bar)
    samples = [_judge(encoder, problem, completion) for problem, completion in zip(problems, completions, strict=True)]
    families = {
        name: Share.of([sample.correct for sample in samples if sample.family == name])
        for name in sorted({sample.family for sample in samples})
    }
    total = Share.of([sample.correct for sample in samples])
    return ProblemReport(
        count=total.count, accuracy=total.accuracy, standard_error=total.standard_error, families=families,
        truncated_share=sum(one.finish_reason == "length" for one in completions) / total.count,
        mean_tokens=sum(len(one.ids) for one in completions) / total.count,
        seconds=time.monotonic() - started, temperature=temperature,
        samples=random.Random(0).sample(samples, min(SAMPLES, len(samples))),
    )  # fmt: skip


def _judge(encoder: ConversationEncoder, problem: Problem, completion: Completion) -> Sample:
    splitter = AnswerSplitter(encoder.tokenizer)
    deltas = [splitter.push(token) for token in completion.ids] + [splitter.finish()]
    thinking, answer = ("".join(parts).strip() for parts in zip(*deltas, strict=True))
    correct = completion.finish_reason == "stop" and score(problem, answer) == 1.0
    return Sample(problem.family, problem.question, thinking, answer, correct, problem.answer)
