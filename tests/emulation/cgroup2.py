"""A stand-in for the kernel's control groups, version 2: folders and files in which writing has the kernel's effects.

Rules after the kernel's Documentation/admin-guide/cgroup-v2.rst: a new group gets the controllers that its parent hands
on; a process is in one group; a group with processes hands on nothing and a group that hands on takes none, but for the
root (which has no cgroup.type); a group goes by rmdir once it is empty.
"""

import errno
import os
from pathlib import Path, PosixPath
from typing import Any


class Group(PosixPath):
    """A group or a file in one."""

    @classmethod
    def mounted(cls, path: Path, controllers: str = "cpuset cpu memory", real: bool = True) -> "Group":
        """A mounted hierarchy; `real`: the machine's, not what a container sees as the root."""
        group = cls(path)
        PosixPath.mkdir(group)
        group._furnish(controllers, real)
        return group

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if exist_ok and self.is_dir():
            return
        super().mkdir(mode)
        self._furnish((self.parent / "cgroup.subtree_control").read_text(), real_root=False)

    def rmdir(self) -> None:
        if self.processes or any(child.is_dir() for child in self.iterdir()):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        for file in self.iterdir():
            file.unlink()
        super().rmdir()

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        if not self.exists():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        effect = {"cgroup.procs": _move, "cgroup.subtree_control": _hand_on, "cpu.max": _limit}[self.name]
        effect(self.parent, data)  # pyright: ignore[reportArgumentType]
        return len(data)

    @property
    def processes(self) -> list[str]:
        return (self / "cgroup.procs").read_text().split()

    @property
    def handed_on(self) -> list[str]:
        """Controllers that its children get."""
        return (self / "cgroup.subtree_control").read_text().split()

    @property
    def is_root(self) -> bool:
        return not (self / "cgroup.type").exists()

    def put(self, name: str, text: str) -> None:
        """Write as the kernel does: without asking."""
        PosixPath.write_text(self / name, text)

    def _furnish(self, controllers: str, real_root: bool) -> None:
        for name, text in (("procs", ""), ("controllers", controllers), ("subtree_control", "")):
            self.put(f"cgroup.{name}", text)
        if not real_root:
            self.put("cgroup.type", "domain")
        if "cpu" in controllers.split() and not real_root:
            self.put("cpu.max", "max 100000")


def _move(group: Group, process: str) -> None:
    if group.handed_on and not group.is_root:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(group))
    top = group
    while (top.parent / "cgroup.procs").exists():
        top = top.parent
    for other in (top, *(file.parent for file in top.glob("**/cgroup.procs"))):
        other.put("cgroup.procs", "\n".join(number for number in other.processes if number != process))
    group.put("cgroup.procs", "\n".join([*group.processes, process]))


def _hand_on(group: Group, change: str) -> None:
    assert change.startswith("+"), "the only change that is played"
    name = change[1:]
    if name not in (group / "cgroup.controllers").read_text().split():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(group))
    if group.processes and not group.is_root:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(group))
    if name in group.handed_on:
        return
    group.put("cgroup.subtree_control", " ".join([*group.handed_on, name]))
    for child in (child for child in group.iterdir() if child.is_dir()):
        child.put("cgroup.controllers", " ".join(group.handed_on))
        if name == "cpu":
            child.put("cpu.max", "max 100000")


def _limit(group: Group, limit: str) -> None:
    quota, period = map(int, limit.split())
    if quota < 1_000 or not 1_000 <= period <= 1_000_000:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(group))
    group.put("cpu.max", limit)
