"""Process groups of a training job, and their collectives and messages.

    torchrun --nproc-per-node 4 -m motley pretrain ...        every rank runs the same command

      rank 0     1   2   3        all collectives and messages go through `Communicator`
         └───┴───┴───┘            if a rank exits, the others fail with an error and never hang

A process that was started without torchrun is a group of one rank, for which an all-reduce changes nothing.
`part` makes a communicator of some of the ranks: they are numbered from 0 again, and their collectives stay among them.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, ClassVar, Protocol, Self

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from motley.errors import CommunicationError, InputError
from motley.parallel.telemetry.step_timer import StepTimer

COMM_TIMEOUT_SECONDS = 300.0
"""How long a rank waits for a silent one before it fails. One that exited is noticed at once."""
PREPARING_SECONDS = 1800.0
"""The same while rank 0 works for all: it may be preparing data or writing a checkpoint."""
LAST_LOOK_SECONDS = 2.0
"""How long a rank whose message failed looks for ranks that exited."""
UNKNOWN = "another rank exited or is silent"
"""Why a message failed, where it cannot be seen which rank failed."""


class LinkModel(Protocol):
    """Delays of emulated links between ranks, as one of them sees them."""

    def among(self, members: tuple[int, ...]) -> "LinkModel":
        """The same links for some of the ranks, numbered from 0 again."""
        ...

    def crosses(self, other: int) -> bool:
        """Whether messages between this rank and `other` are delayed."""
        ...

    def arrival(self, to: int, size: int) -> float:
        """When (monotonic clock, seconds) a message of `size` bytes that is sent now arrives at rank `to`."""
        ...

    def collectives(self, messages: Sequence[tuple[Sequence[int], int | None, int]]) -> None:
        """Sleep as long as collectives take that run at once: (ranks, root or None for all, bytes) of each."""
        ...

    def exchange(self, ranks: Collection[int], leaving: float, entering: float) -> None:
        """Sleep as long as an all-to-all among `ranks` takes that sends and receives so many bytes."""
        ...


@dataclass(frozen=True)
class Communicator:
    """This rank among all, or among those of a part.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: what it computes on.
        groups: process groups made so far, by their ranks' numbers among all.
        timer: what this rank does with its time; all messages are waits.
        timeout: seconds to wait for a silent rank.
        processes: (host, process id) of each rank, where they are known.
        members: of a part, its ranks' numbers among all.
        whole: the process group that a part belongs to.
        links: delays of emulated links between the ranks, where there are any.
        by_host: whether sums travel through the host's memory, as CPUs and GPUs together need it, and ranks that
            share a GPU. Messages between two ranks always do: over NCCL those that cross could block each other.
        launcher: process id of the torchrun that started this rank, if one did.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False)
    timer: StepTimer = field(default_factory=StepTimer, compare=False)
    timeout: float = COMM_TIMEOUT_SECONDS
    processes: tuple[tuple[str, int], ...] = ()
    members: tuple[int, ...] = ()
    whole: "Communicator | None" = None
    links: LinkModel | None = field(default=None, compare=False)
    by_host: bool = False
    launcher: int | None = field(default=None, compare=False)
    advice: ClassVar[str] = "; start the job again, it goes on from its newest checkpoint"
    """What to do when a message failed."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that would restart these ranks exited; they have another parent process then."""
        return self.launcher is not None and self.launcher != os.getppid()

    def part(self, parts: Sequence[Sequence[int]]) -> "Communicator":
        """The communicator of this rank's part of all ranks; every rank calls this with the same `parts`."""
        self.form(parts)
        own = tuple(next(part for part in parts if self.rank in part))
        links = self.links and self.links.among(own)
        processes = tuple(self.processes[rank] for rank in own) if self.processes else ()
        place = own.index(self.rank)
        return Communicator(
            place, len(own), self.device, self.groups, self.timer, self.timeout, processes, own, self, links,
            self.by_host,
        )  # fmt: skip

    def form(self, groups: Iterable[Sequence[int]]) -> None:
        """Make process groups of these ranks; every rank calls this with the same groups.

        Groups are made by all ranks in one order, whoever is in them; so all parts call this together.
        """
        wanted = {tuple(sorted(map(self.among_all, ranks))) for ranks in groups if 1 < len(ranks) < self.size}
        if self.whole is not None:
            wanted = set[tuple[int, ...]]().union(*self.whole.all_values(wanted))
        for ranks in sorted(wanted):
            if ranks not in self.groups:
                self.groups[ranks] = dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout))

    def among_all(self, rank: int) -> int:
        """The number of one of these ranks among all, which torch.distributed goes by."""
        return self.members[rank] if self.members else rank

    def group(self, ranks: Sequence[int] | None = None) -> Any:
        """The process group of these ranks (made by `form`); None: all of these ranks."""
        if ranks is None or len(ranks) == self.size:
            return None if self.whole is None else self.whole.group(self.members)
        return self.groups[tuple(sorted(map(self.among_all, ranks)))]

    def sum(self, values: Tensor, ranks: Sequence[int] | None = None) -> Tensor:
        """All-reduce `values` in place over `ranks` (default: all)."""
        if not self.alone and (ranks is None or len(ranks) > 1):
            travelling = self.posted(values)
            self.talk("all-reduce", lambda: dist.all_reduce(travelling, group=self.group(ranks)), ranks or ())
            if travelling is not values:
                values.copy_(travelling)
            self.timer.summed(values.nbytes, len(ranks or range(self.size)))
            self.crossed("all-reduce", [(ranks, None, values.nbytes)])
        return values

    def posted(self, tensor: Tensor) -> Tensor:
        """What travels of a tensor that takes part in a sum: itself, or a copy in the host's memory."""
        return tensor.cpu() if self.by_host else tensor

    def outgoing(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device that collectives use; as it is where there is only one rank."""
        return tensor if self.alone else tensor.to(self.device)

    def everyone(self, values: Sequence[float]) -> list[list[float]]:
        """Each rank's `values`, in the order of ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.alone:
            return [mine.tolist()]
        mine = mine if self.by_host else mine.to(self.device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self.talk("all-gather of numbers", lambda: dist.all_gather(rows, mine, group=self.group()))
        self.timer.moved((self.size - 1) * mine.nbytes, (self.size - 1) * mine.nbytes)
        self.crossed("all-gather of numbers", [(None, None, mine.nbytes)])
        return [row.tolist() for row in rows]

    def share(self, value: Any, source: int = 0) -> Any:
        """What rank `source` has, on all: any picklable value of our own making."""
        if self.alone:
            return value
        box = [value]
        with self.waiting(max(self.timeout, PREPARING_SECONDS)):
            self.talk(
                "broadcast of settings", lambda: dist.broadcast_object_list(box, self.among_all(source), self.group())
            )
        self.crossed("broadcast of settings", [(None, source, 0)])
        return box[0]

    def acquainted(self) -> Self:
        """This communicator, with the process of each rank, and from now on with its own timeout."""
        processes = tuple(self.all_values((socket.gethostname(), os.getpid())))
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(timedelta(seconds=self.timeout))
        return replace(self, processes=processes)

    def led(self, work: Callable[[], Any]) -> Any:
        """What `work` returns at rank 0, on all ranks. An error there is raised on all, so that none waits."""
        result, failure, cause = None, None, None
        if self.leads:
            try:
                result = work()
            except Exception as error:
                failure, cause = (type(error) is InputError, str(error)), error
        result, failure = self.share((result, failure))
        if failure is None:
            return result
        if cause is not None:
            raise cause
        raise InputError(failure[1]) if failure[0] else CommunicationError(f"rank 0 failed: {failure[1]}")

    def all_values(self, value: Any) -> list[Any]:
        """Each rank's `value`, in the order of ranks: any picklable value of our own making."""
        gathered: list[Any] = [value] * self.size
        if not self.alone:
            self.talk("all-gather of values", lambda: dist.all_gather_object(gathered, value, self.group()))
            self.crossed("all-gather of values", [(None, None, 0)])
        return gathered

    def begin_to_send(self, tensor: Tensor, to: int) -> list[tuple[Any, Tensor]]:
        """(what can be waited for, the tensor until then) of each message under way; the receiver calls `receive`."""
        messages, there = [tensor.contiguous().cpu()], self.among_all(to)
        if self.links is not None and self.links.crosses(to):
            arrival = self.links.arrival(to, tensor.nbytes)
            messages.insert(0, torch.tensor([arrival], dtype=torch.float64))
        self.timer.moved(tensor.nbytes, 0)
        return [(self.talk(f"sending to rank {to}", lambda m=m: dist.isend(m, dst=there), [to]), m) for m in messages]

    def send(self, tensor: Tensor, to: int) -> None:
        for work, _ in self.begin_to_send(tensor, to):
            self.talk(f"sending to rank {to}", work.wait, [to])

    def receive(self, tensor: Tensor, source: int, seconds: float = PREPARING_SECONDS) -> Tensor:
        """Fill `tensor` with what rank `source` sends, for which this one waits at most so many seconds.

        The time limits of groups do not hold between two ranks.
        """
        here = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")

        def take(tensor: Tensor, there: int) -> None:
            work = dist.irecv(tensor, src=there)
            assert work is not None
            work.wait(timedelta(seconds=seconds))

        def message() -> None:
            arrival, there = torch.zeros(1, dtype=torch.float64), self.among_all(source)
            if self.links is not None and self.links.crosses(source):
                take(arrival, there)
            take(here, there)
            time.sleep(max(0.0, float(arrival) - time.monotonic()))

        self.talk(f"receiving from rank {source}", message, [source])
        if here is not tensor:
            tensor.copy_(here)
        self.timer.moved(0, tensor.nbytes)
        return tensor

    def crossed(self, doing: str, messages: Iterable[tuple[Sequence[int] | None, int | None, int]]) -> None:
        """After collectives that ran at once: wait as long as emulated links take for them.

        Args:
            doing: as in `talk`.
            messages: of each the ranks (None: all), the one that alone sends or receives (None: all do), bytes.
        """
        if (links := self.links) is not None:
            whole = [(ranks or range(self.size), root, size) for ranks, root, size in messages]
            self.talk(doing, lambda: links.collectives(whole))

    def stopping(self, asked: bool) -> bool:
        """Whether any rank was asked to stop; all of them then do."""
        return bool(self.sum(self.outgoing(torch.tensor(int(asked)))))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError, on every rank, naming the first rank and fact that differ from rank 0's."""
        gathered = self.all_values(facts)
        for rank, theirs in enumerate(gathered):
            compare(f"rank {rank}", theirs, "rank 0", gathered[0])

    def talk(self, doing: str, message: Callable[[], Any], whom: Sequence[int] = ()) -> Any:
        """Send or receive; a dead or silent peer becomes a CommunicationError that says what was going on.

        Args:
            doing: for people, and for the step timer.
            message: sends, receives or waits.
            whom: ranks it may have to wait for; empty: all.
        """
        try:
            with self.timer.waiting(doing, whom):
                return message()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.distributed raises nothing finer
            first = str(error).strip().splitlines()[0][:200]
        # Raised out here, where the first error is released: its frames hold messages, which hold connections open.
        raise CommunicationError(f"rank {self.rank}: {doing} failed: {self._lost()}: {first}{self.advice}")

    @contextmanager
    def waiting(self, seconds: float, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, wait so long for messages among these ranks (None: all) instead of `timeout`."""
        group: Any = self.group(ranks) or dist.group.WORLD
        if group is None:  # nobody to wait for
            yield
            return
        group.set_timeout(timedelta(seconds=seconds))
        yield
        group.set_timeout(timedelta(seconds=self.timeout))

    def _lost(self) -> str:
        """Which ranks exited or are stopped, as far as this machine can see."""
        host, deadline = socket.gethostname(), time.monotonic() + LAST_LOOK_SECONDS
        here = {rank: pid for rank, (where, pid) in enumerate(self.processes) if where == host and rank != self.rank}
        while True:
            states = {rank: _state(pid) for rank, pid in here.items()}
            found = [f"rank {rank} (pid {here[rank]}) {state}" for rank, state in states.items() if state]
            if found or not here or time.monotonic() > deadline:
                return " and ".join(found) or UNKNOWN
            time.sleep(0.05)  # a process that was killed a moment ago may still look alive

    def leave(self) -> None:
        """End talking; the process may exit afterwards."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


def compare(one: str, facts: Mapping[str, Any], other: str, expected: Mapping[str, Any]) -> None:
    """Raises InputError naming the first of the facts of `one` that differs from what `other` has."""
    for name, value in expected.items():
        if facts.get(name) != value:
            raise InputError(
                f"{one} has {name} {facts.get(name)}, {other} has {value}; "
                "all ranks need the same code, data and settings, and with --elastic the same kind of processor; "
                "without --elastic ranks of any kind train together"
            )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _state(pid: int) -> str | None:
    """For people: why a process of this machine does not run; None: it runs."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "exited"
    return {psutil.STATUS_ZOMBIE: "exited", psutil.STATUS_STOPPED: "is stopped"}.get(status)


def _fresh(store: Store, rank: int, size: int) -> Store:
    """A part of `store` that nobody wrote to before: when torchrun starts ranks again, it keeps the old addresses.

    rank 0     start = its name                              start/all = all names that came
    others     read start, start/RANK = own name             own name in start/all: yes, this is the new start
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mine)
        names = [store.get(f"{mine}/{other}").decode() for other in range(1, size)]
        store.set(f"{mine}/all", " ".join(names))
        return PrefixStore(mine, store)
    deadline = time.monotonic() + PREPARING_SECONDS
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/all"]) and mine in store.get(f"{start}/all").decode().split():
            return PrefixStore(start, store)
        time.sleep(0.05)
    raise CommunicationError(f"rank {rank} waited {PREPARING_SECONDS:.0f} s for rank 0 to begin; start the job again")


def seat_of(device: torch.device) -> str:
    """A device by its kind, and a GPU by its serial number: NCCL needs one of its own for each rank."""
    return f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else device.type


def join(device: torch.device, timeout: float = COMM_TIMEOUT_SECONDS) -> Communicator:
    """Join the other ranks of this job, if torchrun (or anything that sets its variables) started one.

    Args:
        device: what this rank computes on.
        timeout: seconds to wait for a silent rank, once all have joined.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Communicator(device=device)
    by_host = False
    if not dist.is_initialized():
        limit = timedelta(seconds=PREPARING_SECONDS)
        store, rank, _ = next(rendezvous("env://", timeout=limit))
        store = _fresh(store, rank, size)
        store.set(f"device/{rank}", seat_of(device))
        devices = [store.get(f"device/{other}").decode() for other in range(size)]
        apart = len(set(devices)) == size and all(name.startswith("cuda") for name in devices)
        backend, by_host = ("cpu:gloo,cuda:nccl", False) if apart else ("gloo", set(devices) != {"cpu"})
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    comm = Communicator(dist.get_rank(), size, device, timeout=timeout, by_host=by_host, launcher=launcher)
    return comm.acquainted()
