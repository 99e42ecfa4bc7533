"""Report steps, rounds, validations and checkpoints that took far longer than usual, with the ranks that were busy.

A process that was suspended, a laptop that slept, a disk that hung: nothing is lost, but the log says where the time went.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW, KNOWN = 20, 2  # times before that say what is usual: at most, and at least
LONG, LEAST_SECONDS = 5.0, 1.0  # times what is usual, and seconds beyond it
GUILTY = 0.5  # share of the time that one was busy for who made the others wait


@dataclass
class SlowStepWatch:
    """How long steps, rounds, validations and checkpoints of a run take; the first two of each say nothing yet.

    TensorBoard is imported behind the first step, for seconds, and a new machine is slow in other ways.
    """

    _seconds: dict[str, list[float]] = field(default_factory=dict)

    def remark(self, what: str, seconds: float, who: str = "", busy: Sequence[float] = ()) -> str | None:
        """None where it took about as long as usual. Otherwise what there is to say.

        Args:
            what: took the time, such as "step".
            seconds: that it took.
            who: share it: "worker" or "island".
            busy: seconds of it that each of them did not wait; empty where that was not measured.
        """
        before = self._seconds.get(what, [])
        self._seconds[what] = [*before, seconds][-WINDOW:]
        if len(before) < KNOWN:
            return None
        usual = statistics.median(before)
        if seconds < max(LONG * usual, usual + LEAST_SECONDS):
            return None
        said = f"this {what} took {seconds:.1f} s, usually it takes {usual:.2g} s"
        late = [number for number, own in enumerate(busy) if own > GUILTY * seconds]
        if late:
            names = " and ".join(f"{who} {number} for {busy[number]:.1f} s" for number in late)
            return f"{said}; busy or stopped meanwhile: {names}"
        return f"{said}; all of them waited: one was stopped, or a message was under way for long" if busy else said
