"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere. Always on stderr."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0  # between two lines when nobody watches live
BENEATH_SECONDS = 60.0  # between two pictures, in plain text, of what a terminal shows beneath the bar all the time
PLAIN_WIDTH = 120  # letters of such a picture
REFRESHES = 2  # a second, in a terminal: what is beneath a bar takes milliseconds to draw


def in_words(seconds: float) -> str:
    """`95.2` → `1 min 35 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def note(text: str) -> None:
    """A line for people, between two progress bars."""
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: several threads may talk


def in_plain_text(shown: RenderableType) -> str:
    """What a terminal would show, without colours."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    with console.capture() as text:
        console.print(shown)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


class _Bar(RichProgress):
    """A bar that may have something beneath it."""

    beneath: Callable[[], RenderableType] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.beneath is not None:
            yield self.beneath()


class Progress:
    """Shows how far a piece of work is: `with Progress("packing", total=n, unit="documents") as bar: bar.advance(1)`.

    Args:
        title: what is being done, a word or two.
        total: amount of work in `unit`, or None if unknown.
        unit: plural noun; the rate is shown in units per second.
        done: amount already done before this process started (a resumed run); not counted in the rate.
        shown: False keeps silent (one of many workers speaks).
    """

    def __init__(self, title: str, total: float | None, unit: str, done: float = 0, shown: bool = True) -> None:
        self.shown = shown
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._done_before = done
        self._values = ""
        self._started = self._last_line = time.monotonic()
        self._beneath: Callable[[], RenderableType] | None = None
        self._last_beneath = -math.inf
        self._rich: _Bar | None = None
        if shown and sys.stderr.isatty():
            self._rich = _Bar(
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("[cyan]{task.fields[rate]}"),
                TextColumn("[magenta]{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=REFRESHES,
            )
            self._task = self._rich.add_task(title, total=total, completed=int(done), rate="", values="")

    def __enter__(self) -> Self:
        if self._rich:
            self._rich.start()
        return self

    def advance(self, amount: float = 1, **values: float | str) -> None:
        """Count `amount` more units as done; `values` (loss, say) are shown beside the bar."""
        self.done += amount
        if values:
            self._values = "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in values.items()
            )
        if self._rich:
            self._rich.update(self._task, completed=self.done, rate=self._rate(), values=self._values)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._line()

    def beneath(self, show: Callable[[], RenderableType]) -> None:
        """Show what `show` returns under the bar, renewed with it; in plain lines now and then, and at the end."""
        self._beneath = show
        if self._rich:
            self._rich.beneath = show

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return f"{(self.done - self._done_before) / elapsed:,.0f} {self.unit}/s"

    def _line(self, finished: bool = False) -> None:
        if not self.shown:
            return
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        parts = [f"{self.title}:"]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        parts += [f"{self.done:,.0f} {self.unit}", self._rate(), self._values]
        fresh = self.done - self._done_before
        if finished:
            parts.append(f"done in {in_words(elapsed)}")
        elif self.total and fresh > 0:
            parts.append(f"{in_words(elapsed * (self.total - self.done) / fresh)} left")
        lines = ["  ".join(part for part in parts if part)]
        if self._beneath and fresh and (finished or self._last_line - self._last_beneath >= BENEATH_SECONDS):
            self._last_beneath = self._last_line
            lines.append(in_plain_text(self._beneath()))
        note("\n".join(lines))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()
        else:
            self._line(finished=kind is None)
