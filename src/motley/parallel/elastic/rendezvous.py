"""Which processes train together in an elastic job: an agreement in files that survives the exit of any process.

    RUN/elastic/generation-00000003.json   generation 3: its members by rank and where they connect; never changed
    RUN/elastic/member-NAME.json           a member: the generation it waits for, its step, its program and data
    RUN/elastic/member-NAME.lock           locked by the member; the system releases it however the process ends

    failure    a member of generation 3 exits, the all-reduce of the others fails ──▶ each writes "waits for 4"; once
               all that run have, the first of them writes generation-00000004.json ──▶ they connect and go on
    newcomer   writes "waits for 4" ──▶ rank 0 sees it before its next step, all leave generation 3, then as above

Ranks are ordered by step, farthest first, so that rank 0 always has the newest state. A generation trains only while
all of its members run, and only one of them (or a newcomer, when all have exited) writes the next, so that never two
generations train at once. A member that is silent beyond the timeout is left out and later joins as a newcomer.
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

FOLDER = "elastic"
POLL_SECONDS = 0.02
NEWCOMER_TIMEOUTS = 10
"""A newcomer waits for this multiple of the timeout to be admitted to a running job."""


@dataclass(frozen=True)
class Generation:
    """Members in the order of ranks; they connect to a store at `host`, `port`."""

    number: int = 0
    members: tuple[str, ...] = ()
    host: str = ""
    port: int = 0


@dataclass
class Rendezvous:
    """One member's view of the agreement.

    Attributes:
        folder: RUN/elastic.
        name: of this member; those that started earlier sort first.
        timeout: seconds to wait for a silent member.
        facts: what must be the same for all: program, settings, data.
        number: of the generation it is part of; 0: none yet.
    """

    folder: Path
    name: str
    timeout: float
    facts: Mapping[str, str] | None = None
    number: int = 0
    _published: dict[str, Any] = field(default_factory=dict)

    def publish(self, facts: Mapping[str, str]) -> None:
        """Tell newcomers what this generation trains with."""
        self.facts = facts
        self._publish(**self._published)

    def missing(self, names: Sequence[str]) -> str:
        """Which members of a generation exited, or left it for the next; empty when none did."""
        members = self.members()
        exited = [f"rank {rank} exited" for rank, name in enumerate(names) if name not in members]
        left = [
            f"rank {rank} left"
            for rank, name in enumerate(names)
            if name in members and members[name]["waits"] > self.number
        ]
        return " and ".join(exited or left)

    def has_newcomers(self) -> bool:
        """Whether a process waits to be admitted."""
        return self.waiting(self.number + 1) > 0

    def waiting(self, number: int) -> int:
        """How many processes wait for generation `number`."""
        return sum(values.get("waits") == number for values in self.members().values())

    def next_generation(
        self, step: int, host: str, port: int, check: Callable[[Mapping[str, str]], None]
    ) -> Generation:
        """The next generation with this member, once all running members wait for it or are silent for too long.

        Args:
            step: of this member's state; -1 without one.
            host: of this machine.
            port: where this member would let the others connect.
            check: of what a running job trains with; raises InputError when this member has something else.

        Raises InputError when a running job does not admit this member.
        """
        began = time.monotonic()
        checked = False
        while True:
            newest, members = self.newest(), self.members()
            if newest.number > self.number and self.name in newest.members:
                self.number = newest.number
                return newest
            waited = time.monotonic() - began
            running = [name for name in newest.members if name in members]
            outside = bool(running) and self.name not in running
            if outside and not checked and (facts := members[running[0]]["facts"]) is not None:
                check(facts)
                checked = True
            if outside and waited > NEWCOMER_TIMEOUTS * self.timeout:
                raise InputError(
                    f"the job running in {self.folder.parent} admitted no rank for {waited:.0f} s; see whether its "
                    "processes are stopped, end them and start again"
                )
            if checked or not outside:
                wanted = newest.number + 1
                self._publish(waits=wanted, step=step, host=host)
                if not outside and self._is_my_turn(wanted, self.members(), running, waited):
                    self._write(wanted, self.members(), host, port)
            time.sleep(POLL_SECONDS)

    def _is_my_turn(self, wanted: int, members: dict[str, dict[str, Any]], running: list[str], waited: float) -> bool:
        """Whether to write the next generation: the first of the waiting members does, once none is missing.

        One timeout passes for members that are missing, and one for each that should have written and did not.
        """
        ready = self._in_order(wanted, members)
        missing = any(name not in ready for name in running)
        return self.name in ready and waited >= (missing + ready.index(self.name)) * self.timeout

    def newest(self) -> Generation:
        """The newest generation; an empty one before the first."""
        found = sorted(self.folder.glob("generation-*.json"))
        for file in reversed(found):
            with suppress(FileNotFoundError):  # the next one was just written
                values = json.loads(file.read_text(encoding="utf-8"))
                return Generation(_number(file), tuple(values["members"]), values["host"], values["port"])
        return Generation()

    def members(self) -> dict[str, dict[str, Any]]:
        """What each running member published last, by name. Files of processes that exited are removed."""
        found = {}
        for file in self.folder.glob("member-*.json"):
            lock = file.with_suffix(".lock")
            with suppress(FileNotFoundError):  # it left in the meantime
                values = json.loads(file.read_text(encoding="utf-8"))
                if _is_locked(lock):
                    found[file.stem.removeprefix("member-")] = values
                else:
                    file.unlink()
                    lock.unlink(missing_ok=True)
        return found

    def _in_order(self, wanted: int, members: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Members that wait for generation `wanted`: the farthest first, then the oldest."""
        ready = [(-values["step"], name) for name, values in members.items() if values.get("waits") == wanted]
        return [name for _, name in sorted(ready)]

    def _write(self, number: int, members: Mapping[str, Mapping[str, Any]], host: str, port: int) -> None:
        """Write generation `number`, unless another member was faster."""
        order = self._in_order(number, members)
        order = order[order.index(self.name) :]  # those before were silent when it was their turn
        on_one_host = all(members[name]["host"] == host for name in order)
        file = self.folder / f"generation-{number:08d}.json"
        temporary = temporary_name(file)
        agreed = {"members": order, "host": "127.0.0.1" if on_one_host else host, "port": port}
        temporary.write_text(json.dumps(agreed), encoding="utf-8")
        with suppress(FileExistsError):  # linking is atomic and fails if the file exists
            os.link(temporary, file)
        temporary.unlink()
        for old in self.folder.glob("generation-*.json"):
            if _number(old) < number:
                old.unlink(missing_ok=True)

    def _publish(self, **values: Any) -> None:
        whole = {**values, "facts": self.facts}
        if whole != self._published:
            write_json(self.folder / f"member-{self.name}.json", whole)
            self._published = whole


@contextmanager
def joined(run: Path, timeout: float) -> Iterator[Rendezvous]:
    """This process as a member of the elastic job in a run folder, inside the context or until the process ends.

    Raises InputError where files cannot be locked.
    """
    if fcntl is None:
        raise InputError("--elastic needs a system that locks files; this one has no flock")
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}"
    lock, file = folder / f"member-{name}.lock", folder / f"member-{name}.json"
    with lock.open("a") as held:
        _lock(held, fcntl.LOCK_EX)
        try:
            yield Rendezvous(folder, name, timeout)
        finally:
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("generation-"))


def _is_locked(lock: Path) -> bool:
    """Whether the process that locked a file still runs."""
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
            f"{file.name} cannot be locked ({error.strerror}), which --elastic needs; choose another --out"
        ) from None
