"""Who does which part of a round: islands of different speed that all arrive together.

    a round of 10 steps, 8 rows each, speeds 3:1            80 rows, 20 inner steps of 4 rows

    island 0   ▏1▕▏2▕▏3▕ ... ▏15▕   rows  0 … 59            inner steps in proportion to speed
    island 1   ▏  1  ▕ ...  ▏ 5 ▕   rows 60 … 79            rows in a row: none is lost, none comes twice
               0                10  the run's steps, which the learning rate follows

A round takes as many rows as its steps would take in one crew, so a run of islands sees the same data as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from motley.plan.partition import apportion


@dataclass(frozen=True)
class Round:
    """A round of all islands; the same on all of them.

    Attributes:
        start: the run's step at which it begins.
        steps: how many of the run's steps it stands for.
        batch_rows: rows of one of the run's steps.
        inner: inner steps of each island.
    """

    start: int
    steps: int
    batch_rows: int
    inner: tuple[int, ...]

    @staticmethod
    def of(start: int, steps: int, batch_rows: int, speeds: Sequence[float]) -> "Round":
        """A round with inner steps in proportion to `speeds`, at least one for each island."""
        count = len(speeds)
        inner = [1 + more for more in apportion(count * (steps - 1), _beyond_one(speeds, count * steps))]
        return Round(start, steps, batch_rows, tuple(inner))

    def rows_of(self, island: int) -> range:
        """All rows that an island takes, of the run's endless stream."""
        shares = apportion(self.steps * self.batch_rows, self.inner)
        first = self.start * self.batch_rows + sum(shares[:island])
        return range(first, first + shares[island])

    def rows(self, island: int, number: int) -> range:
        """Rows of inner step `number` of an island."""
        own = self.rows_of(island)
        return own[number * len(own) // self.inner[island] : (number + 1) * len(own) // self.inner[island]]

    def step(self, island: int, number: int) -> int:
        """The run's step when an island has taken `number` inner steps: the round's last one only at its end."""
        inner = self.inner[island]
        if number == inner:
            return self.start + self.steps
        return self.start + min(-(-number * self.steps // inner), self.steps - 1)

    def meetings(self, island: int, fragments: int, overlap: int) -> list[tuple[int, int]]:
        """For each fragment, after how many inner steps an island (sends it, takes in what all sent).

        Fragment f of F arrives (f + 1) / F through the round, so the last one at its end. It leaves `overlap` of the
        run's steps before, but within the round: nothing is under way between rounds.
        """
        inner = self.inner[island]
        early = -(-overlap * inner // self.steps)
        arrivals = [-(-(fragment + 1) * inner // fragments) for fragment in range(fragments)]
        return [(max(1, arrival - early), arrival) for arrival in arrivals]


def _beyond_one(speeds: Sequence[float], inner: int) -> list[float]:
    """What of each island's proportional share of `inner` steps is beyond its first one."""
    return [max(0.0, inner * speed / sum(speeds) - 1) for speed in speeds]
