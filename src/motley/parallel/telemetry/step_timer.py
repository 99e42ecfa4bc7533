"""Time one rank's step: every moment belongs to exactly one kind, so that the kinds add up to the step.

    other ▏ forward ▏ experts ▏ forward ▏ neighbour ▏ backward ▏ gradients ▏ optimizer ▏ spreading ▏ numbers
            ╰─ work ─╯ ╰ wait ╯                       ╰─ work ─╯ ╰─ wait ──╯

A wait inside work is taken from the work. A wait lasts until what was waited for is here: the slowness of others and
the time on the wire are one, as seen from here. On GPUs, where sums run beside the host, it is what the host waits.
Every step begins right after a message among all, so that all ranks' clocks start together.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

WORK = ("forward", "backward", "weights", "optimizer")
"""Computing. `weights`: gradients of the weights, where the schedule makes them apart."""
WAITS = ("neighbour", "experts", "gradients", "spreading", "numbers", "meeting")
"""For a neighbour in the pipeline, tokens of experts, sums of gradients, new weights, small numbers, other islands."""
OTHER = "other"
"""The rest: reading rows, clipping, bookkeeping."""
KINDS = (*WORK, *WAITS, OTHER)
WAITS_BY_WORDS = {
    "receiving from": "neighbour",
    "sending": "neighbour",
    "exchanging": "experts",
    "reducing gradients": "gradients",
    "broadcasting weights": "spreading",
    "outer step": "meeting",
}
"""The kind of a wait, by how the description given to `Communicator.talk` begins; any other is `numbers`."""
SHORTEST = 1 / 1000
"""Of the step: what is shorter cannot be seen in a picture of it, and is left out there."""
MOST_SPANS = 20_000
"""Of a step; what follows is timed, but not drawn."""


class Span(NamedTuple):
    """A rank at one thing.

    Attributes:
        kind: one of KINDS.
        micro_batch: that was computed; -1: none.
        whom: ranks that were waited for; empty: none, or all.
        start, end: seconds since the step began.
    """

    kind: str
    micro_batch: int
    whom: tuple[int, ...]
    start: float
    end: float


class StepTimer:
    """Seconds, bytes and spans of this rank's current step.

    Attributes:
        seconds: by kind.
        sent, received: bytes of messages. A sum over n ranks counts 2 (n - 1) / n of its size each way, as a ring
            makes of it; one from all, or from one to all, counts once at each rank.
        spans: what was done when, one after the other.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.sent = self.received = 0.0
        self.spans: list[Span] = []
        self._now: tuple[str, int, tuple[int, ...]] = (OTHER, -1, ())
        self._began = self._since = self._clock()

    @property
    def busy(self) -> float:
        """Seconds of computing so far."""
        return sum(self.seconds[kind] for kind in WORK)

    @property
    def waited(self) -> float:
        """Seconds of waiting so far."""
        return sum(self.seconds[kind] for kind in WAITS)

    @contextmanager
    def at(self, kind: str, micro_batch: int = -1, whom: Sequence[int] = ()) -> Iterator[None]:
        """Inside, this rank is at something else."""
        before = self._now
        self._turn((kind, micro_batch, tuple(whom)))
        try:
            yield
        finally:
            self._turn(before)

    def waiting(self, doing: str, whom: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Inside, this rank waits for a message; `doing` as in `Communicator.talk`."""
        kind = next((kind for words, kind in WAITS_BY_WORDS.items() if doing.startswith(words)), "numbers")
        return self.at(kind, whom=whom)

    def summed(self, size: float, ranks: int) -> None:
        """Count an all-reduce of `size` bytes over so many ranks."""
        self.moved(2 * size * (ranks - 1) / ranks, 2 * size * (ranks - 1) / ranks)

    def passed(self, size: float, gives: bool) -> None:
        """Count a message of `size` bytes from one to all or from all to one, which this rank gives or gets."""
        self.moved(size if gives else 0, 0 if gives else size)

    def moved(self, sent: float, received: float) -> None:
        """Count bytes of messages."""
        self.sent += sent
        self.received += received

    def stop(self) -> float:
        """Count the time until now; returns the seconds of the step so far."""
        self._turn(self._now)
        return self._since - self._began

    def _turn(self, what: tuple[str, int, tuple[int, ...]]) -> None:
        now = self._clock()
        kind, micro_batch, whom = self._now
        self.seconds[kind] += now - self._since
        if now > self._since and len(self.spans) < MOST_SPANS:
            self.spans.append(Span(kind, micro_batch, whom, self._since - self._began, now - self._began))
        self._now, self._since = what, now


def visible(spans: Sequence[Span], step_seconds: float) -> list[Span]:
    """Spans long enough to be seen; what an invisible one had parted is one again. At most 1 / SHORTEST remain."""
    least = SHORTEST * step_seconds
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1][:3] == span[:3] and span.start - joined[-1].end < least:
            joined[-1] = joined[-1]._replace(end=span.end)
        elif span.kind in WORK or span.end - span.start >= least:
            joined.append(span)
    return [span for span in joined if span.end - span.start >= least]
