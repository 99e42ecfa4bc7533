"""Rows and inner steps of each island in a round, by speed, so that all reach the outer step together.

    a round of 10 steps, 8 rows each, speeds 5:2            80 rows, 20 inner steps of about 4 rows

    island 0   ▏1▕▏2▕▏3▕ ... ▏14▕   rows  0 … 56            rows in proportion to speed, inner steps as near as whole
    island 1   ▏  1  ▕ ...  ▏ 6 ▕   rows 57 … 79            ones come; rows in a row: none is lost, none comes twice
               0                10  the run's steps, which the learning rate follows

A round takes as many rows as its steps would take without islands, so a run of islands sees the same data as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from motley.apportion import apportion


@dataclass(frozen=True)
class Round:
    """A round of all islands; the same on all of them.

    Attributes:
        start: the run's step at which it begins.
        steps: how many of the run's steps it stands for.
        batch_rows: rows of one of the run's steps.
        inner: inner steps of each island.
        shares: rows of each island, at least one for each of its inner steps.
    """

    start: int
    steps: int
    batch_rows: int
    inner: tuple[int, ...]
    shares: tuple[int, ...]

    @staticmethod
    def of(start: int, steps: int, batch_rows: int, speeds: Sequence[float]) -> "Round":
        """A round with rows and inner steps in proportion to `speeds`, at least one for each island."""
        inner = _at_least([1] * len(speeds), len(speeds) * steps, speeds)
        return Round(start, steps, batch_rows, inner, _at_least(inner, steps * batch_rows, speeds))

    def rows_of(self, island: int) -> range:
        """All rows that an island takes, of the run's endless stream."""
        first = self.start * self.batch_rows + sum(self.shares[:island])
        return range(first, first + self.shares[island])

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


def _at_least(least: Sequence[int], total: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """`total` in proportion to `speeds`, but for each at least so many."""
    beyond = [max(0.0, total * speed / sum(speeds) - own) for own, speed in zip(least, speeds, strict=True)]
    return tuple(own + more for own, more in zip(least, apportion(total - sum(least), beyond), strict=True))
