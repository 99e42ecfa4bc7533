"""The seconds that a benchmark may take: pieces are begun while time is left for them, and none outlasts it.

    budget = Budget(50.0) ──▶ budget.turns(7)     as many turns as there is time for, by the longest so far
                          ──▶ budget.left()       patience with processes that compute
                          ──▶ kept(budget, ...)   and should a piece hang all the same: say so and stop, in time

`--quick` promises a time. It is kept by doing less on a slow machine, not by guessing what a machine takes.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psutil

QUICK_SECONDS = 50.0  # what --quick promises unless a script says otherwise
RESERVED = 0.1  # of the time, for the pieces that are not asked for: telling what was found, ending processes
OUT_OF_TIME = 3  # exit status

Thing = TypeVar("Thing")


class Budget:
    """Seconds from the start of the process on.

    Attributes:
        seconds: promised; None: as many as it takes.
    """

    def __init__(self, seconds: float | None = None, now: Callable[[], float] = time.time) -> None:
        self.seconds, self._now = seconds, now
        self._began = psutil.Process().create_time() if now is time.time else now()

    def left(self) -> float:
        """Seconds for further pieces: without those that are reserved. Infinite without a promise."""
        if self.seconds is None:
            return float("inf")
        return max(0.0, (1 - RESERVED) * self.seconds - (self._now() - self._began))

    def patience(self, most: float) -> float:
        """How long to wait for a piece: `most`, or what is left."""
        return min(most, self.left())

    def allows(self, seconds: float) -> bool:
        """Whether a piece of so many seconds may begin."""
        return seconds <= self.left()

    def each(self, things: Iterable[Thing], least: int = 1) -> Iterator[Thing]:
        """The first `least` of `things`, and further ones while there is time for one as long as the longest so far."""
        longest = 0.0
        for number, thing in enumerate(things):
            if number >= least and not self.allows(longest):
                return
            began = self._now()
            yield thing
            longest = max(longest, self._now() - began)

    def turns(self, most: int, least: int = 1) -> Iterator[int]:
        """Numbers from 0 on, as `each` has them."""
        return self.each(range(most), least)


@contextmanager
def kept(budget: Budget, what: str) -> Iterator[Budget]:
    """While inside, the process ends when the promised time does, whatever hangs: one sentence, status OUT_OF_TIME.

    The last resort, where a single piece takes longer than all of the time. What was begun here ends with it.
    """
    if budget.seconds is None:
        yield budget
        return
    done = threading.Event()

    def watch() -> None:
        if done.wait(max(0.0, budget.left() + RESERVED / 2 * (budget.seconds or 0.0))):
            return
        print(
            f"{what}: not done within the {budget.seconds:g} s that --quick promises: this machine is too slow or too "
            "busy for the smallest piece of it; try again when it is quiet, or without --quick",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(OUT_OF_TIME)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield budget
    finally:
        done.set()
