"""Loss scales: fp16 loses small gradients, so workers that compute in it multiply theirs by a power of two.

    worker 0  bf16       activations ─▶   worker 1  fp16, scale 65536
    gradient of what     ◀── gradient     receives and sends true gradients, in the wire's format; multiplies what it
    it sent, as it is                     receives, divides (in fp32) what it sends and its parameters' gradients

A power of two changes no digit, so that scales change no gradient that fits. One that does not fit overflows: then no
worker takes the step, and the scale of the worker where it happened halves. After many good steps it doubles again.

Every worker keeps the scales of all, and follows what all saw: nobody has to be told.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from motley.fleet.device import Format

FIRST, LOWEST = 2.0**16, 1.0
GOOD_STEPS = 2000  # in a row, before a scale doubles


@dataclass
class LossScales:
    """The loss scale of every worker; part of the training state.

    Attributes:
        values: by rank; 1 where the format needs none.
        good: steps since the scale last changed.
        workers: ranks of those that need one.
    """

    values: list[float]
    good: list[int]
    workers: list[int]

    @classmethod
    def of(cls, formats: Sequence[Format]) -> "LossScales":
        """To begin with."""
        workers = [rank for rank, name in enumerate(formats) if name == "fp16"]
        values = [FIRST if rank in workers else 1.0 for rank in range(len(formats))]
        return cls(values, [0] * len(formats), workers)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint's scales. Another crew's begin at the lowest of them, and grow from there."""
        before = LossScales(**saved)
        if before.workers == self.workers and len(before.values) == len(self.values):
            self.values, self.good = before.values, before.good
        elif before.workers:
            lowest = min(before.values[rank] for rank in before.workers)
            for rank in self.workers:
                self.values[rank], self.good[rank] = lowest, 0

    def follow(self, culprits: Sequence[int]) -> str | None:
        """After a step in which the numbers of `culprits` overflowed: lower their scales, and say why to skip it.

        None where nobody's did, or where lowering scales does not help.
        """
        if not culprits:
            for rank in self.workers:
                self._count(rank)
            return None
        if not set(culprits) <= set(self.workers) or any(self.values[rank] == LOWEST for rank in culprits):
            return None
        for rank in culprits:
            self.values[rank], self.good[rank] = self.values[rank] / 2, 0
        return f"{_named(culprits)} overflowed fp16; loss scale now {self.values[culprits[0]]:g}"

    def hopeless(self, culprits: Sequence[int]) -> str:
        """What to do about those that overflow at the lowest scale, to end a sentence with."""
        ranks = [rank for rank in culprits if rank in self.workers and self.values[rank] == LOWEST]
        return f"; {_named(ranks)} overflowed fp16 at a loss scale of 1: give it --precision fp32" if ranks else ""

    def _count(self, rank: int) -> None:
        self.good[rank] += 1
        if self.good[rank] == GOOD_STEPS:
            self.values[rank], self.good[rank] = self.values[rank] * 2, 0


def culprits(seen: Tensor, groups: Iterable[Sequence[int]]) -> list[int]:
    """Ranks where numbers that are not finite came from, of groups that exchange numbers within each pass.

    seen: [workers, 4], above 0 where a worker saw what is not finite: in what it made in forward passes, in the
        activations it received, in its gradient, in the gradients it received.
    """
    found: list[int] = []
    for ranks in groups:
        made, received, gradient, received_gradient = (seen[list(ranks)].sum(0) > 0).tolist()
        if (made and not received) or (gradient and not received and not received_gradient):
            found += ranks
    return sorted(found)


def _named(ranks: Sequence[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + " and ".join(map(str, ranks))
