"""Workers that come and go while training goes on: `motley pretrain --elastic`, started any number of times.

    agree on a crew (membership.py) ──▶ form it ──▶ worker 0 hands out its state ──▶ train until somebody dies or knocks
          ▲                                                                                      │
          └───────────────── what each remembers: the state after a whole number of steps ◀──────┘

Every worker holds the whole model and its optimizer state (ZeRO 0), and a step changes them in one go, without waiting
for anyone, once the sums over all rows are there. So those who lose a worker are at most one step apart. The farthest
becomes worker 0, the others take its state, and the step that was in flight is computed again: its rows are a function
of its number, so whoever computes them, the gradient is the sum over the same rows.
"""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from motley.errors import CommunicationError, InputError
from motley.fleet.device import choose_device
from motley.parallel.build import facts
from motley.parallel.communicator import LAST_LOOK_SECONDS, OTHERS, Communicator, compare
from motley.parallel.elastic.rendezvous import Door, entered
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.rank import Ranks
from motley.progress import note
from motley.train.checkpoint import resume
from motley.train.chip_kind import kind_of_chip
from motley.train.config import TrainingConfig
from motley.train.ngram_targets import NgramCounts
from motley.train.run_folder import as_begun, claimed, kept_speed
from motley.train.run_state import RunState

Result = TypeVar("Result")
Own = Callable[[Any, Path], Mapping[str, str]]
"""(the stage's settings, the prepared data in use) → what this worker's own --data and --model come to."""
LOOK_SECONDS = 0.2  # between two looks whether all are still there, while a message keeps one waiting


class Regroup(CommunicationError):
    """Nobody is lost: somebody wants to join or to leave, so all meet again."""


@dataclass(frozen=True)
class ElasticCommunicator(Communicator):
    """A crew that ends when somebody waits at its door.

    Attributes:
        door: this worker's view of the meeting place.
        names: of the members, in the order of ranks.
    """

    door: Door | None = field(default=None, compare=False)
    names: tuple[str, ...] = ()
    advice: ClassVar[str] = ""

    def talk(self, doing: str, message: Callable[[], Any], whom: Sequence[int] = ()) -> Any:
        """Send or receive, as in any crew, but no longer than all members are at it.

        A wait for messages cannot be broken off, and one that waits for a living member would not notice that this one
        left because of a dead one. So messages wait on a thread, which is left alone when the crew has ended.
        """
        outcome: list[Any] = []

        def wait() -> None:
            try:
                outcome.append((super(ElasticCommunicator, self).talk(doing, message, whom), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = Thread(target=wait, daemon=True)
        thread.start()
        while not outcome:
            thread.join(LOOK_SECONDS)
            assert self.door is not None
            if not outcome and (parted := self.door.parted(self.names)):
                raise CommunicationError(f"worker {self.rank} lost {parted} while {doing}")
        result, error = outcome.pop()
        if error is not None:
            raise error
        return result

    def _lost(self) -> str:
        """Who is gone. One that dies before all have met has not told its process, but its place is empty."""
        found, deadline = super()._lost(), time.monotonic() + LAST_LOOK_SECONDS
        while found == OTHERS and time.monotonic() < deadline:
            assert self.door is not None
            found = self.door.parted(self.names) or found
            time.sleep(0.05)
        return found

    def stopping(self, asked: bool) -> bool:
        """Whether all were asked to stop. One that was asked alone leaves, and the others go on without it."""
        assert self.door is not None
        knocked = self.leads and self.door.knocked()
        asking, knocking = self.sum(torch.tensor([int(asked), int(knocked)])).tolist()
        if asking == self.size:
            return True
        if asked:
            raise KeyboardInterrupt("this worker left, the others go on")
        if asking or knocking:
            raise Regroup("somebody leaves" if asking else "somebody waits to be let in")
        return False


@dataclass
class Carried:
    """What a rank keeps when its ranks regroup.

    Attributes:
        own: what this rank's own --data and --model come to.
        told: what they came to when it joined; what happens to copies afterwards does not matter.
        strategy: its last one, with model and optimizer.
        kept: where its run stands.
        data: the prepared data of the last group: whoever becomes rank 0 goes on with it.
        ngrams: counts of its text, if they were needed.
    """

    own: Own
    told: Mapping[str, str] | None = None
    strategy: Ranks | None = None
    kept: RunState | None = None
    data: Path | None = None
    ngrams: NgramCounts | None = None

    @property
    def step(self) -> int:
        """How far it is; -1 before it has any state."""
        return -1 if self.kept is None else self.kept.at.step

    def serves(self, comm: Communicator) -> bool:
        """Whether rank 0 has a state to go on from, so that none need be read."""
        return comm.share(self.kept is not None)

    def resume(self, strategy: Ranks, data: Path) -> RunState:
        """Where the run stands, with its state in the strategy; every rank calls this."""
        comm, before = strategy.comm, self.strategy
        assert isinstance(comm, ElasticCommunicator)
        assert comm.door is not None
        old = None if before is None or not comm.leads else before
        kept, rates, scales = comm.share((self.kept, self._rates(), None if old is None else asdict(old.scaler)))
        if kept is None:
            kept = resume(strategy)
        else:
            kept.asked_to_stop = self.kept is not None and self.kept.asked_to_stop
            strategy.scaler.restore(scales)
            strategy.take_state(None if old is None else (dict(old.model.state_dict()), old.optimizer.state_tensors()))
        self.told = self.told or self.own(strategy.config, data)
        comm.door.introduce({**_own_facts(strategy.config, data, comm.device, self.told), DATA: str(data)})
        strategy.balancer = _balancer(comm.names, rates)
        if rates:
            kept.news = [_news(comm.names, tuple(rates), kept.at.step)]
        self.strategy, self.kept, self.data = strategy, kept, data
        return kept

    def _rates(self) -> dict[str, tuple[float, int]]:
        """Rows a second of each member of the last group, and how often that was measured."""
        if self.strategy is None:
            return {}
        comm, balancer = self.strategy.comm, self.strategy.balancer
        assert isinstance(comm, ElasticCommunicator)
        return dict(zip(comm.names, zip(balancer.rates, balancer.known, strict=True), strict=True))


DATA = "path of the data"


def _own_facts(config: TrainingConfig, data: Path, device: torch.device, inputs: Mapping[str, str]) -> dict[str, str]:
    """What must be the same on all: how they round too, as every copy of the model is updated where it lies.

    The model by what it is (among `inputs`: `Carried.own`) and by its path: whoever leads opens the run folder, which
    knows it by that.
    """
    path = {"path of --model": str(getattr(config, "model", ""))}
    return {**facts(config, data), "the processor": kind_of_chip(device), **inputs, **path}


def run_elastic(config: TrainingConfig, own: Own, work: Callable[[Communicator, Carried], Result]) -> Result:
    """`work`, with one crew after the other, until it returns; what it keeps in the memory goes from crew to crew.

    own: what this worker's own --data and --model come to.

    Raises InputError for what a live crew cannot do, and when one is at work that runs something else.
    """
    device = choose_device(config.device)
    if config.plan is not None or config.emulate or config.islands != "1":
        raise InputError("--elastic workers each hold the whole model; leave --plan, --emulate and --islands out")
    if config.zero:
        raise InputError(
            f"--elastic beside --zero {config.zero}: a live worker keeps the whole model and its optimizer state, so that "
            "any may be lost; leave --zero out, or leave --elastic out and start the crew with torchrun"
        )

    def check(theirs: Mapping[str, str]) -> None:
        data = Path(theirs[DATA])
        begun = as_begun(config, kept_speed(config.out))
        mine = _own_facts(begun, data, device, own(config, data))
        compare("this worker", mine, "the crew at work", {name: theirs[name] for name in theirs if name != DATA})

    carried = Carried(own)
    with claimed(config.out, shared=True), entered(config.out / "elastic", config.comm_timeout) as door:
        while True:
            try:
                return work(_form(door, carried.step, device, check), carried)
            except CommunicationError as lost:
                reason = str(lost)
            note(f"{reason}; going on from step {max(0, carried.step)} with those who are here")
            _part()


def _form(
    door: Door, step: int, device: torch.device, check: Callable[[Mapping[str, str]], None]
) -> ElasticCommunicator:
    """Agree on a crew and meet it. Raises CrewError when somebody dies on the way."""
    host = socket.gethostname()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    agreed = door.agree(step, host, store.port, check)
    rank, size = agreed.members.index(door.name), len(agreed.members)
    by_host = device.type != "cpu"  # members come and go: gloo notices, where NCCL would wait for the dead
    comm = ElasticCommunicator(
        rank, size, device, timeout=door.timeout, by_host=by_host, door=door, names=agreed.members
    )
    if size == 1:
        return comm
    limit = timedelta(seconds=door.timeout)

    def meet() -> None:
        theirs = store if rank == 0 else TCPStore(agreed.host, agreed.port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=theirs, rank=rank, world_size=size, timeout=limit)

    comm.talk("meeting", meet)
    return comm.acquainted()


def _part() -> None:
    """Let go of the crew, also of one that was never complete.

    Members meet under a number that PyTorch counts up from the first crew of a process, unless the last one ended well.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0


def _balancer(names: tuple[str, ...], rates: Mapping[str, tuple[float, int]]) -> LoadBalancer:
    """Rows by the speeds that were measured; a newcomer begins with their mean."""
    mean = sum(rate for rate, _ in rates.values()) / len(rates) if rates else 1.0
    now = [rates.get(name, (mean, 0)) for name in names]
    return LoadBalancer([rate for rate, _ in now], [known for _, known in now])


def _news(now: tuple[str, ...], before: tuple[str, ...], step: int) -> str:
    """What the metrics say of a change of members."""
    joined, gone = len(set(now) - set(before)), len(set(before) - set(now))
    again = "; what the gone had computed of it is computed again" if gone else ""
    return f"{len(now)} workers go on with step {step + 1} ({joined} new, {gone} gone){again}"
