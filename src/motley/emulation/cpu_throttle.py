"""Make a rank slower, so that a fleet of unequal chips can be emulated on one machine.

    cap    a control group limits the CPU time of the process: caches, memory and pauses behave as on a busy machine
    wait   after every piece of work the rank sleeps for as long as a slower chip would have gone on working

A cap needs the right to write control groups: root, or with version 2 a user to whose session they were delegated.

    version 1   /sys/fs/cgroup/cpu/OWN GROUP/motley-PID          inside the process's own group: its limits still hold
    version 2   /sys/fs/cgroup/PARENT OF OWN GROUP/motley-PID    beside it: a group there has processes or children

A process removes its group when it ends. A killed one leaves it, and the next rank that makes a group there removes it.
"""

import atexit
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
from motley.train.config import EmulateBy

PERIOD_MICROSECONDS = 20_000
LEAST_QUOTA_MICROSECONDS = 1_000  # the kernel's
MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # which groups this process is in
GROUP = "motley-"


@dataclass
class Throttle:
    """A limit on the speed of this process.

    Attributes:
        speed: share of its full speed.
        by: what makes it slow.
        means: the same for people.
        end: lifts the limit.
    """

    speed: float
    by: Literal["cap", "wait"]
    means: str = "by waiting after each piece of work"
    end: Callable[[], None] = lambda: None
    _cpu: float = field(default_factory=time.process_time)

    def begin(self) -> None:
        """Work begins; CPU time spent before does not count."""
        self._cpu = time.process_time()

    def pace(self, seconds: float) -> float:
        """After `seconds` of work: sleep for the time that a slower chip would have needed on top; returns seconds.

        Where the CPU time of the work is less than `seconds`, the CPU time counts: ranks that share cores already had
        to wait for them, and are not slowed down for that a second time.
        """
        spent, self._cpu = time.process_time() - self._cpu, time.process_time()
        if self.by != "wait" or self.speed >= 1:
            return 0.0
        rest = max(0.0, min(spent, seconds) / self.speed - seconds)
        time.sleep(rest)
        self._cpu = time.process_time()
        return rest


def throttle(speed: float, by: EmulateBy = "auto") -> Throttle:
    """Slow this process down.

    Args:
        speed: share, above 0 and at most 1, of its full speed, which its threads have with a core each.
        by: "auto" caps where the system allows it and waits elsewhere.

    Raises InputError for a speed out of range, and for "cap" where the system does not allow it.
    """
    if not 0 < speed <= 1:
        raise InputError(f"emulated speed {speed:g}: it must be a share of the full speed, above 0 and at most 1")
    if by == "wait" or speed == 1:
        return Throttle(speed, "wait", "at full speed" if speed == 1 else Throttle.means)
    try:
        return _cap(speed)
    except OSError as error:
        if by == "cap":
            raise InputError(f"CPU time cannot be capped here ({error}); choose --emulate-by wait") from None
        return Throttle(speed, "wait", f"{Throttle.means} (CPU time cannot be capped here: {error})")


# ------------------------------------------------------------------------------------------ control groups


def _cap(speed: float) -> Throttle:
    """Limit the CPU time of this process. Raises OSError where the system does not allow it."""
    version, own, home = _groups()
    _remove_stale(home)
    group = home / f"{GROUP}{os.getpid()}"
    quota = max(LEAST_QUOTA_MICROSECONDS, int(speed * torch.get_num_threads() * PERIOD_MICROSECONDS))
    if version == 2:
        with suppress(OSError):  # already on, or not allowed; writing cpu.max below fails then
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
        with suppress(OSError):  # a child of this process may still run in the group; it is removed later
            (own / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()

    atexit.register(end)
    return Throttle(speed, "cap", f"CPU time capped by a control group (version {version})", end)


def _groups() -> tuple[int, Path, Path]:
    """(version, this process's group of the cpu controller, parent of the new group). Raises OSError without groups."""
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
    """Remove the groups of processes that were killed and could not remove them."""
    for group in home.glob(f"{GROUP}*"):
        number = group.name.removeprefix(GROUP)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            with suppress(OSError):  # another rank removed it first
                group.rmdir()
