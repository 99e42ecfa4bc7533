"""Slow chips for those who have none: a worker of a crew made slower, by a cap of its CPU or by waiting.

    cap      a control group gives the process its share of CPU time: caches, memory and pauses are as real as it gets
    wait     after every piece of work the worker sleeps as long as a slower chip would have worked on

A cap needs the right to write control groups (root, mostly); `handicap` says which of the two it used.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from motley.errors import InputError

Way = Literal["auto", "cap", "wait"]
PERIOD_MICROSECONDS = 20_000
GROUPS = Path("/sys/fs/cgroup")


@dataclass
class Handicap:
    """What slows this process down.

    Attributes:
        speed: share of its full speed.
        way: how.
    """

    speed: float
    way: Literal["cap", "wait"]
    _cpu: float = field(default_factory=time.process_time)

    def pace(self, seconds: float) -> float:
        """After `seconds` of work: wait as long as a slower chip would have; returns the seconds waited.

        What counts is the CPU time of the work, so that a machine shared by many workers slows none of them twice.
        """
        spent, self._cpu = time.process_time() - self._cpu, time.process_time()
        if self.way == "cap" or self.speed >= 1:
            return 0.0
        rest = max(0.0, spent / self.speed - seconds)
        time.sleep(rest)
        self._cpu = time.process_time()
        return rest


def speeds_of(text: str, workers: int) -> list[float]:
    """`1:2:4:1` → each worker's share of the fastest one's speed. Raises InputError for what is no such list."""
    try:
        speeds = [float(part) for part in text.split(":")]
    except ValueError:
        speeds = []
    if len(speeds) != workers or min(speeds, default=0.0) <= 0:
        raise InputError(
            f"emulated speeds are {text!r}; write one number above 0 for each of the {workers} workers, such as 1:2:4"
        )
    return [speed / max(speeds) for speed in speeds]


def handicap(speed: float, way: Way = "auto", cores: float = 1.0) -> Handicap:
    """Slow this process down to `speed` (0 to 1) of its own.

    Args:
        speed: share of full speed.
        way: "cap", "wait", or "auto": cap where the system allows it.
        cores: that it would use at full speed.

    Raises InputError for a speed that is none, and for a cap that is asked for and not allowed.
    """
    if not 0 < speed <= 1:
        raise InputError(f"a handicap of {speed:g}: a speed is a share of the full one, above 0 and at most 1")
    if speed == 1 or way == "wait":
        return Handicap(speed, "wait")
    failure = _cap(speed * cores)
    if failure is None:
        return Handicap(speed, "cap")
    if way == "cap":
        raise InputError(f"this system does not let CPU time be capped ({failure}); emulate by waiting instead")
    return Handicap(speed, "wait")


def _cap(cores: float) -> str | None:
    """Give this process `cores` cores' worth of CPU time; returns why not, if not."""
    quota = str(max(1000, int(cores * PERIOD_MICROSECONDS)))
    tried: list[Callable[[], None]] = [lambda: _cap_v2(quota), lambda: _cap_v1(quota)]
    failure = "no control groups here"
    for attempt in tried:
        try:
            attempt()
            return None
        except OSError as error:
            failure = str(error)
    return failure


def _cap_v2(quota: str) -> None:
    group = GROUPS / f"motley-{os.getpid()}"
    if not (GROUPS / "cgroup.controllers").is_file():
        raise OSError("no control groups of version 2")
    with suppress(OSError):  # already on, or not ours to switch; what follows says whether it works
        (GROUPS / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir(exist_ok=True)
    (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _cap_v1(quota: str) -> None:
    root = GROUPS / "cpu"
    if not root.is_dir():
        raise OSError("no control groups of version 1")
    group = root / f"motley-{os.getpid()}"
    group.mkdir(exist_ok=True)
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
    (group / "cpu.cfs_quota_us").write_text(quota)
    (group / "cgroup.procs").write_text(str(os.getpid()))
