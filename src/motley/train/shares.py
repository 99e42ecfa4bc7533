"""How many rows of a step each lane takes: as many as it computes in the time the others need for theirs.

    measured  lane 0: 8 rows in 2.0 s      rates 4 1 2       36 rows → 21 5 10     by largest remainder
              lane 1: 8 rows in 8.0 s                        next step all are done after about 5 s
              lane 2: 8 rows in 4.0 s

Rows move, state does not. The gradient is the sum over all rows, so shares change the time of a step and nothing else;
that is why they may follow every measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

FOLLOW = 0.5  # weight of the newest measurement
LEAST = 1e-9


@dataclass
class Shares:
    """Rows of each lane, following measured speed; every worker computes the same shares from the same numbers.

    Attributes:
        rates: rows a second of each lane.
        most: rows a lane can take in a step at most (None: any).
        known: whether a lane's rate was measured (else assumed).
    """

    rates: list[float]
    most: int | None = None
    known: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.known or [False] * len(self.rates)

    def rows(self, batch_rows: int) -> list[int]:
        """How many of a step's rows each lane takes; they add up to `batch_rows`."""
        return apportion(batch_rows, self.rates)

    def measured(self, rows: Sequence[float], seconds: Sequence[float]) -> None:
        """Take in how long each lane worked on its rows. A lane without rows keeps its rate, so that it gets some again
        when the others slow down."""
        for lane, (count, spent) in enumerate(zip(rows, seconds, strict=True)):
            if count and spent > 0:
                rate = count / spent
                old = self.rates[lane]
                self.rates[lane] = rate if not self.known[lane] else old + FOLLOW * (rate - old)
                self.known[lane] = True


def apportion(whole: int, weights: Sequence[float]) -> list[int]:
    """`whole` in whole parts proportional to `weights`, by largest remainder; equal remainders in order."""
    total = max(sum(weights), LEAST)
    exact = [whole * weight / total for weight in weights]
    parts = [int(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: whole - sum(parts)]:
        parts[index] += 1
    return parts
