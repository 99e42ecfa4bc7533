"""Slow chips for those who have none: a worker made slower, truly or by waiting.

    cap        a control group gives the process its share of CPU time: caches, memory and pauses are as real as it gets
    priority   all workers on the same cores, the slow ones with low priority: shares hold only while all have work
    wait       after every piece of work the worker sleeps as long as a slower chip would have worked on

A cap needs the right to write control groups: root, or on version 2 a user whose session was given them.

    version 1   /sys/fs/cgroup/cpu/OWN GROUP/motley-PID          inside the process's own group: its limits still hold
    version 2   /sys/fs/cgroup/PARENT OF OWN GROUP/motley-PID    beside it: a group there has processes or children

A group goes when its process ends. One whose process was killed is removed by the next worker that makes one there.
"""

import atexit
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch

from motley.errors import InputError

Way = Literal["auto", "cap", "priority", "wait"]
PERIOD_MICROSECONDS = 20_000
LEAST_QUOTA_MICROSECONDS = 1_000  # the kernel's
MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # which groups this process is in
GROUP = "motley-"
NICE_STEP = 1.25  # the kernel's: of the CPU time that one step of priority is worth
MOST_NICE = 19
AUTOGROUP = Path("/proc/self/autogroup")  # sessions share the CPU before their processes do


@dataclass
class Handicap:
    """What slows this process down.

    Attributes:
        speed: share of its full speed.
        way: how.
        means: the same in words.
        end: gives the process its full speed back.
    """

    speed: float
    way: Literal["cap", "priority", "wait"]
    means: str = "by waiting after each piece of work"
    end: Callable[[], None] = lambda: None
    _cpu: float = field(default_factory=time.process_time)

    def begin(self) -> None:
        """Work begins: what came before is nobody's slowness."""
        self._cpu = time.process_time()

    def pace(self, seconds: float) -> float:
        """After `seconds` of work: wait as long as a slower chip would have; returns the seconds waited.

        What counts is the CPU time of the work where that is less, so that a machine shared by many workers slows none
        of them twice.
        """
        spent, self._cpu = time.process_time() - self._cpu, time.process_time()
        if self.way != "wait" or self.speed >= 1:
            return 0.0
        rest = max(0.0, min(spent, seconds) / self.speed - seconds)
        time.sleep(rest)
        self._cpu = time.process_time()
        return rest


def handicap(speed: float, way: Way = "auto", fastest: float = 1.0) -> Handicap:
    """Slow this process down.

    Args:
        speed: share of its full speed, above 0 and at most 1: that of its threads, each with a core to itself.
        way: "auto" caps where the system allows it and waits elsewhere.
        fastest: speed of the fastest worker beside it, against which priorities count.

    Raises InputError for a speed that is none, and for a way that is asked for and not allowed.
    """
    if not 0 < speed <= 1:
        raise InputError(f"a handicap of {speed:g}: a speed is a share of the full one, above 0 and at most 1")
    if way == "priority":
        return _priority(speed, fastest)
    if way == "wait" or speed == 1:
        return Handicap(speed, "wait", "at full speed" if speed == 1 else Handicap.means)
    try:
        return _cap(speed)
    except OSError as error:
        if way == "cap":
            raise InputError(f"CPU time cannot be capped here ({error}); choose --emulate-by wait") from None
        return Handicap(speed, "wait", f"{Handicap.means} (CPU time cannot be capped here: {error})")


# ------------------------------------------------------------------------------------------ control groups


def _cap(speed: float) -> Handicap:
    """Give this process its share of CPU time. Raises OSError where it may not."""
    version, own, home = _groups()
    _remove_stale(home)
    group = home / f"{GROUP}{os.getpid()}"
    quota = max(LEAST_QUOTA_MICROSECONDS, int(speed * torch.get_num_threads() * PERIOD_MICROSECONDS))
    if version == 2:
        with suppress(OSError):  # already on, or not ours to switch; whether cpu.max can be written says it
            (home / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir(exist_ok=True)
    try:
        if version == 2:
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        group.rmdir()
        raise

    def end() -> None:
        atexit.unregister(end)
        with suppress(OSError):  # a child of this process may live on in the group; it is removed later
            (own / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()

    atexit.register(end)
    return Handicap(speed, "cap", f"CPU time capped by a control group (version {version})", end)


def _groups() -> tuple[int, Path, Path]:
    """(version, this process's group of the cpu controller, where to make ours). Raises OSError: no control groups."""
    lines = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    paths = {name: path.lstrip("/") for _, names, path in lines for name in names.split(",")}
    if (MOUNT / "cgroup.controllers").is_file():
        group = MOUNT / paths.get("", "")
        return 2, group, MOUNT if group == MOUNT else group.parent
    if (MOUNT / "cpu").is_dir():
        group = MOUNT / "cpu" / paths.get("cpu", "")
        if not group.is_dir():  # a container sees its own group as the root
            group = MOUNT / "cpu"
        return 1, group, group.parent if group.name.startswith(GROUP) else group
    raise OSError(f"no control groups at {MOUNT}")


def _remove_stale(home: Path) -> None:
    """Remove the groups of processes that are gone: a killed one removes nothing itself."""
    for group in home.glob(f"{GROUP}*"):
        number = group.name.removeprefix(GROUP)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with suppress(OSError):  # another worker was quicker
                group.rmdir()


# ------------------------------------------------------------------------------------------ priority


def _priority(speed: float, fastest: float) -> Handicap:
    """Share the first cores with all others, with a priority that is worth `speed` beside the fastest one's."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system does not bind processes to cores; choose --emulate-by wait")
    cores = sorted(os.sched_getaffinity(0))
    steps = round(math.log(fastest / speed) / math.log(NICE_STEP))
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice + steps > MOST_NICE:
        raise InputError(
            f"priorities reach down to 1/{NICE_STEP ** (MOST_NICE - nice):.0f} of the fastest worker's speed, "
            f"{speed / fastest:.1%} is below; choose --emulate-by wait"
        )
    os.sched_setaffinity(0, cores[: torch.get_num_threads()])
    os.nice(steps)
    with suppress(OSError):  # systems without it go by the process's priority alone
        AUTOGROUP.write_text(str(nice + steps))
    return Handicap(speed, "priority", f"priority {nice + steps} on the cores of all others (coarse: while all work)")
