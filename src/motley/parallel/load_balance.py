"""Load balancing: each replica takes as many rows of a step as it computes in the time the others need for theirs.

    measured  replica 0: 8 rows in 2.0 s   rates 4 1 2       36 rows → 21 5 10     by largest remainder
              replica 1: 8 rows in 8.0 s                     next step all are done after about 5 s
              replica 2: 8 rows in 4.0 s

Rows move, state does not. The gradient is the sum over all rows, so shares change the time of a step and nothing else;
that is why they may follow every measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from motley.apportion import apportion

FOLLOW = 0.5  # weight of the newest measurement
COLD = 2  # first measurements of a replica that count for nothing afterwards: memory and kernels are new to it
RECOVER = 0.05  # how far the rate of a replica that got no rows moves towards the mean, so that it is tried again


@dataclass
class LoadBalancer:
    """Rows of each replica, following measured speed; every rank computes the same shares from the same numbers.

    Attributes:
        rates: rows a second of each replica.
        known: how often each replica's rate was measured.
    """

    rates: list[float]
    known: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.known or [0] * len(self.rates)

    def rows(self, batch_rows: int) -> list[int]:
        """How many of a step's rows each replica takes; they add up to `batch_rows`."""
        return apportion(batch_rows, self.rates)

    def measured(self, rows: Sequence[float], seconds: Sequence[float]) -> None:
        """Take in how long each replica worked on its rows. A replica that got none slowly recovers its rate."""
        mean = sum(self.rates) / len(self.rates)
        for replica, (count, spent) in enumerate(zip(rows, seconds, strict=True)):
            old = self.rates[replica]
            if count and spent > 0:
                rate = count / spent
                self.rates[replica] = rate if self.known[replica] < COLD else old + FOLLOW * (rate - old)
                self.known[replica] += 1
            else:
                self.rates[replica] = old + RECOVER * (mean - old)
