"""Report steps, rounds, validations and checkpoints that took far longer than usual, with the ranks that were busy.

Causes are a suspended process, a sleeping laptop or a disk that hangs. Nothing is lost; the log says where time went.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW, KNOWN = 20, 2  # earlier durations whose median is usual: at most, and at least
LONG, LEAST_SECONDS = 5.0, 1.0  # slow: this many times the median, and this many seconds above it
GUILTY = 0.5  # a rank that was busy for more than this share of the time made the others wait


@dataclass
class SlowStepWatch:
    """Recent durations of steps, rounds, validations and checkpoints; the first KNOWN of each are never reported.

    The first step imports TensorBoard, which takes seconds, and caches are cold.
    """

    _seconds: dict[str, list[float]] = field(default_factory=dict)

    def remark(self, what: str, seconds: float, who: str = "", busy: Sequence[float] = ()) -> str | None:
        """Record a duration; returns a remark if it was far above the median, else None.

        Args:
            what: was timed, such as "step".
            seconds: its duration.
            who: took part: "rank" or "island".
            busy: seconds that each of them did not wait; empty if not measured.
        """
        before = self._seconds.get(what, [])
        self._seconds[what] = [*before, seconds][-WINDOW:]
        if len(before) < KNOWN:
            return None
        usual = statistics.median(before)
        if seconds < max(LONG * usual, usual + LEAST_SECONDS):
            return None
        said = f"this {what} took {seconds:.1f} s, usually it takes {usual:.2g} s"
        late = [number for number, spent in enumerate(busy) if spent > GUILTY * seconds]
        if late:
            names = " and ".join(f"{who} {number} for {busy[number]:.1f} s" for number in late)
            return f"{said}; busy or stopped meanwhile: {names}"
        return f"{said}; all of them waited: one was stopped, or a message was under way for long" if busy else said
