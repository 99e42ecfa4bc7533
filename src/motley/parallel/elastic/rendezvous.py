"""Who works together in a live crew: an agreement in files that nobody's death can spoil.

    RUN/crew/crew-00000003.json    crew 3: its members in the order of ranks and where they meet; never changed
    RUN/crew/member-NAME.json      a member: the crew it waits for, how far it is, what program and data it has
    RUN/crew/member-NAME.lock      locked by the member; the system lets go of it however the process ends

    loss       a worker of crew 3 dies, the others' sums fail ──▶ each writes "waiting for crew 4", and once all who
               live have, the first of them writes crew-00000004.json ──▶ they meet and go on
    newcomer   writes "waiting for crew 4" ──▶ worker 0 sees it before its next step, all of crew 3 leave, and as above

Whoever is farthest comes first, so worker 0 always has the newest state. A crew works only as long as all of its
members do, and only one of them (or a newcomer, when all of them are dead) writes the next: two crews never work at
once. A member that stays silent for longer than the patience of the others is left out, and a newcomer when it wakes.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from motley.errors import InputError
from motley.files import temporary_name, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOOK_SECONDS = 0.02
LIMIT = 10
"""A newcomer waits so many times the patience for a crew that is at work."""


@dataclass(frozen=True)
class Agreement:
    """Crew `number`: its members in the order of ranks; they meet at a store on `host`, `port`."""

    number: int = 0
    members: tuple[str, ...] = ()
    host: str = ""
    port: int = 0


@dataclass
class Door:
    """This member's view of the meeting place.

    Attributes:
        folder: RUN/crew.
        name: of this member; those that came earlier sort first.
        timeout: seconds to wait for a silent member.
        facts: what must be the same for all: program, settings, data.
        number: of the crew it works in; 0: none yet.
    """

    folder: Path
    name: str
    timeout: float
    facts: Mapping[str, str] | None = None
    number: int = 0
    _said: dict[str, Any] = field(default_factory=dict)

    def introduce(self, facts: Mapping[str, str]) -> None:
        """Tell newcomers what this crew works with."""
        self.facts = facts
        self._say(**self._said)

    def parted(self, names: Sequence[str]) -> str:
        """Who of a crew's members is dead or has left it for the next; empty when all are at work."""
        here = self.members()
        dead = [f"worker {rank}, who is gone," for rank, name in enumerate(names) if name not in here]
        left = [
            f"worker {rank}, who left,"
            for rank, name in enumerate(names)
            if name in here and here[name]["waits"] > self.number
        ]
        return " and ".join(dead or left)

    def knocked(self) -> bool:
        """Whether somebody waits to be let in."""
        return self.knocking(self.number + 1) > 0

    def knocking(self, number: int) -> int:
        """How many wait for crew `number`."""
        return sum(values.get("waits") == number for values in self.members().values())

    def agree(self, step: int, host: str, port: int, check: Callable[[Mapping[str, str]], None]) -> Agreement:
        """The next crew that this member belongs to, once all who live are ready for it or silent for too long.

        Args:
            step: how far this member is; -1 before it has any state.
            host: of this machine.
            port: where this member would let the others meet.
            check: of what a crew at work works with; raises InputError when it is not what this member has.

        Raises InputError when a crew that is at work does not answer.
        """
        began = time.monotonic()
        checked = False
        while True:
            newest, members = self.newest(), self.members()
            if newest.number > self.number and self.name in newest.members:
                self.number = newest.number
                return newest
            waited = time.monotonic() - began
            at_work = [name for name in newest.members if name in members]
            outside = bool(at_work) and self.name not in at_work
            if outside and not checked and (facts := members[at_work[0]]["facts"]) is not None:
                check(facts)
                checked = True
            if outside and waited > LIMIT * self.timeout:
                raise InputError(
                    f"the crew at work in {self.folder.parent} let nobody in for {waited:.0f} s; see whether its "
                    "processes are stopped, end them and start again"
                )
            if checked or not outside:
                wanted = newest.number + 1
                self._say(waits=wanted, step=step, host=host)
                if not outside and self._my_turn(wanted, self.members(), at_work, waited):
                    self._write(wanted, self.members(), host, port)
            time.sleep(LOOK_SECONDS)

    def _my_turn(self, wanted: int, members: dict[str, dict[str, Any]], at_work: list[str], waited: float) -> bool:
        """Whether to write the next crew: the first of those who are ready does, once nobody is missing.

        Patience runs out for those who are missing, and then for each who should have written and did not.
        """
        ready = self._in_order(wanted, members)
        missing = any(name not in ready for name in at_work)
        return self.name in ready and waited >= (missing + ready.index(self.name)) * self.timeout

    def newest(self) -> Agreement:
        """The newest crew; one of nobody before the first."""
        found = sorted(self.folder.glob("crew-*.json"))
        for file in reversed(found):
            with suppress(FileNotFoundError):  # the next one was just written
                values = json.loads(file.read_text(encoding="utf-8"))
                return Agreement(int(file.stem[5:]), tuple(values["members"]), values["host"], values["port"])
        return Agreement()

    def members(self) -> dict[str, dict[str, Any]]:
        """What each living member last said, by name. Files of the dead are removed."""
        found = {}
        for file in self.folder.glob("member-*.json"):
            lock = file.with_suffix(".lock")
            with suppress(FileNotFoundError):  # it left while we looked
                values = json.loads(file.read_text(encoding="utf-8"))
                if _held(lock):
                    found[file.stem[7:]] = values
                else:
                    file.unlink()
                    lock.unlink(missing_ok=True)
        return found

    def _in_order(self, wanted: int, members: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Those who wait for crew `wanted`, the farthest first, then by age."""
        ready = [(-values["step"], name) for name, values in members.items() if values.get("waits") == wanted]
        return [name for _, name in sorted(ready)]

    def _write(self, number: int, members: Mapping[str, Mapping[str, Any]], host: str, port: int) -> None:
        """Write crew `number`, unless somebody was faster."""
        order = self._in_order(number, members)
        order = order[order.index(self.name) :]  # those before kept silent when it was their turn
        here = all(members[name]["host"] == host for name in order)
        file = self.folder / f"crew-{number:08d}.json"
        temporary = temporary_name(file)
        agreed = {"members": order, "host": "127.0.0.1" if here else host, "port": port}
        temporary.write_text(json.dumps(agreed), encoding="utf-8")
        with suppress(FileExistsError):  # a link is made whole and once
            os.link(temporary, file)
        temporary.unlink()
        for old in self.folder.glob("crew-*.json"):
            if int(old.stem[5:]) < number:
                old.unlink(missing_ok=True)

    def _say(self, **values: Any) -> None:
        whole = {**values, "facts": self.facts}
        if whole != self._said:
            write_json(self.folder / f"member-{self.name}.json", whole)
            self._said = whole


@contextmanager
def entered(folder: Path, timeout: float) -> Iterator[Door]:
    """A member's place in `folder` for as long as this lasts or the process lives."""
    if fcntl is None:
        raise InputError("--live needs a system that locks files; this one has no flock")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}"
    lock, file = folder / f"member-{name}.lock", folder / f"member-{name}.json"
    with lock.open("a") as held:
        _lock(held, fcntl.LOCK_EX)
        try:
            yield Door(folder, name, timeout)
        finally:
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def _held(lock: Path) -> bool:
    """Whether the process that locked a file still lives."""
    assert fcntl is not None
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _lock(file: TextIO, how: int) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"{file.name} cannot be locked ({error.strerror}), which --live needs; choose another --out"
        ) from None
