"""Loss scales: fp16 loses small gradients, so ranks that compute in it multiply their loss by a power of two.

    rank 0  bf16         activations ─▶   rank 1  fp16, scale 65536
    gradient of what     ◀── gradient     receives and sends true gradients, in the wire's format; multiplies what it
    it sent, as it is                     receives, divides (in fp32) what it sends and its parameters' gradients

A power of two only shifts exponents, so scaling is exact for gradients that fit. If a gradient overflows on any rank,
all ranks skip the step, and the rank where it overflowed halves its scale; after GOOD_STEPS it doubles it again. Every
rank keeps the scales of all ranks and updates them from the same numbers, so they need no message of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from motley.fleet.device import Format

FIRST, LOWEST = 2.0**16, 1.0
GOOD_STEPS = 2000  # in a row, before a scale doubles


@dataclass
class LossScaler:
    """The loss scale of every rank; part of the training state.

    Attributes:
        values: loss scale of each rank; 1 where its format needs none.
        good: steps without overflow since each scale last changed.
        ranks: those that compute in fp16.
    """

    values: list[float]
    good: list[int]
    ranks: list[int]

    @classmethod
    def of(cls, formats: Sequence[Format]) -> "LossScaler":
        """The scales at the start of a run."""
        ranks = [rank for rank, name in enumerate(formats) if name == "fp16"]
        values = [FIRST if rank in ranks else 1.0 for rank in range(len(formats))]
        return cls(values, [0] * len(formats), ranks)

    def restore(self, saved: dict[str, Any]) -> None:
        """Resume from a checkpoint's scales. If other ranks wrote it, all start from its lowest one."""
        before = LossScaler(saved["values"], saved["good"], saved.get("ranks", saved.get("workers", [])))
        if before.ranks == self.ranks and len(before.values) == len(self.values):
            self.values, self.good = before.values, before.good
        elif before.ranks:
            lowest = min(before.values[rank] for rank in before.ranks)
            for rank in self.ranks:
                self.values[rank], self.good[rank] = lowest, 0

    def follow(self, culprits: Sequence[int]) -> str | None:
        """Update the scales after a step that overflowed on the ranks `culprits`; returns why it must be skipped.

        None if it overflowed on no rank, or where lower scales would not help.
        """
        if not culprits:
            for rank in self.ranks:
                self._count(rank)
            return None
        if not set(culprits) <= set(self.ranks) or any(self.values[rank] == LOWEST for rank in culprits):
            return None
        for rank in culprits:
            self.values[rank], self.good[rank] = self.values[rank] / 2, 0
        return f"{_named(culprits)} overflowed fp16; loss scale now {self.values[culprits[0]]:g}"

    def hopeless(self, culprits: Sequence[int]) -> str:
        """The end of an error text about ranks that overflow at the lowest scale; empty if there are none."""
        lowest = [rank for rank in culprits if rank in self.ranks and self.values[rank] == LOWEST]
        return f"; {_named(lowest)} overflowed fp16 at a loss scale of 1: give it --precision fp32" if lowest else ""

    def _count(self, rank: int) -> None:
        self.good[rank] += 1
        if self.good[rank] == GOOD_STEPS:
            self.values[rank], self.good[rank] = self.values[rank] * 2, 0


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))
