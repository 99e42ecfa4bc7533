"""Train while ranks join and leave: `motley pretrain --elastic`, started any number of times at any time.

    agree on a generation (rendezvous.py) ──▶ connect ──▶ rank 0 broadcasts its state ──▶ train until a rank fails
          ▲                                                                                or asks to join or leave
          └─────────────── each process keeps its state after a whole number of steps ◀───────────────┘

Each rank holds the whole model and its optimizer state (ZeRO 0), and a step changes them at once, without waiting for
other ranks, after the all-reduce of the gradient. So ranks that lose a peer are at most one step apart. The farthest
becomes rank 0, the others take its state, and the interrupted step is computed again: its rows follow from its number,
so that the gradient is the sum over the same rows whichever ranks compute them.
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
from motley.parallel.communicator import LAST_LOOK_SECONDS, UNKNOWN, Communicator, compare
from motley.parallel.elastic.rendezvous import Rendezvous, joined
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
OwnInputs = Callable[[Any, Path], Mapping[str, str]]
"""(settings of the stage, prepared data in use) → what this rank's own --data and --model come to."""
POLL_SECONDS = 0.2  # between two looks for members that exited, while a message is under way
DATA = "path of the data"


class MembershipChanged(CommunicationError):
    """No rank failed: one asks to join or to leave, so all form the next generation."""


@dataclass(frozen=True)
class ElasticCommunicator(Communicator):
    """The process group of one generation, which ends when a member exits or a newcomer waits.

    Attributes:
        rendezvous: this member's view of the agreement.
        names: of the members, in the order of ranks.
    """

    rendezvous: Rendezvous | None = field(default=None, compare=False)
    names: tuple[str, ...] = ()
    advice: ClassVar[str] = ""

    def talk(self, doing: str, message: Callable[[], Any], whom: Sequence[int] = ()) -> Any:
        """Send or receive, as in any process group, but only while all members are part of the generation.

        gloo cannot cancel a wait, and a wait for a running member does not end when that member left because of a
        failed one. So messages wait on a thread, which is abandoned when the generation ends.
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
            thread.join(POLL_SECONDS)
            assert self.rendezvous is not None
            if not outcome and (missing := self.rendezvous.missing(self.names)):
                raise CommunicationError(f"rank {self.rank}: {doing} failed: {missing}")
        result, error = outcome.pop()
        if error is not None:
            raise error
        return result

    def _lost(self) -> str:
        """Which ranks failed; before all have sent their process ids, by the locks of the rendezvous."""
        found, deadline = super()._lost(), time.monotonic() + LAST_LOOK_SECONDS
        while found == UNKNOWN and time.monotonic() < deadline:
            assert self.rendezvous is not None
            found = self.rendezvous.missing(self.names) or found
            time.sleep(0.05)
        return found

    def stopping(self, asked: bool) -> bool:
        """Whether all ranks were asked to stop. A rank that was asked alone leaves, and the others go on without it."""
        assert self.rendezvous is not None
        newcomers = self.leads and self.rendezvous.has_newcomers()
        leaving, joining = self.sum(torch.tensor([int(asked), int(newcomers)])).tolist()
        if leaving == self.size:
            return True
        if asked:
            raise KeyboardInterrupt("this rank left, the others go on")
        if leaving or joining:
            raise MembershipChanged("a rank leaves" if leaving else "a rank asks to join")
        return False


@dataclass
class Carried:
    """What a process carries from one generation to the next.

    Attributes:
        own_inputs: what its own --data and --model come to.
        inputs: what they came to when it joined; later changes of the files do not matter.
        strategy: of its last generation, with model and optimizer.
        state: where the run stands.
        data: prepared data of its last generation; a new rank 0 goes on with it.
        ngrams: counts of the text, if they were needed.
    """

    own_inputs: OwnInputs
    inputs: Mapping[str, str] | None = None
    strategy: Ranks | None = None
    state: RunState | None = None
    data: Path | None = None
    ngrams: NgramCounts | None = None

    @property
    def step(self) -> int:
        """Of its state; -1 without one."""
        return -1 if self.state is None else self.state.at.step

    def serves(self, comm: Communicator) -> bool:
        """Whether rank 0 has a state to broadcast, so that no checkpoint has to be read."""
        return comm.share(self.state is not None)

    def resume(self, strategy: Ranks, data: Path) -> RunState:
        """Put every rank into the state of rank 0, or of the newest checkpoint. Every rank calls this."""
        comm, config = strategy.comm, strategy.config
        assert isinstance(comm, ElasticCommunicator)
        assert comm.rendezvous is not None
        before = self.strategy if comm.leads else None
        state, rates, scales = comm.share((self.state, self._rates(), before and asdict(before.scaler)))
        if state is None:
            state = resume(strategy)
        else:
            state.asked_to_stop = self.state is not None and self.state.asked_to_stop
            strategy.scaler.restore(scales)
            strategy.take_state(before and (dict(before.model.state_dict()), before.optimizer.state_tensors()))
        self.inputs = self.inputs or self.own_inputs(config, data)
        comm.rendezvous.publish({**_own_facts(config, data, comm.device, self.inputs), DATA: str(data)})
        strategy.balancer = _balancer(comm.names, rates)
        if rates:
            state.news = [_news(comm.names, tuple(rates), state.at.step)]
        self.strategy, self.state, self.data = strategy, state, data
        return state

    def _rates(self) -> dict[str, tuple[float, int]]:
        """Rows a second of each member of the last generation, and how often that was measured."""
        if self.strategy is None:
            return {}
        assert isinstance(self.strategy.comm, ElasticCommunicator)
        balancer = self.strategy.balancer
        return dict(zip(self.strategy.comm.names, zip(balancer.rates, balancer.known, strict=True), strict=True))


def _own_facts(config: TrainingConfig, data: Path, device: torch.device, inputs: Mapping[str, str]) -> dict[str, str]:
    """What must be the same on all ranks; the processor too, as each rank updates its own copy of the model.

    The model is compared by its content (among `inputs`) and by its path, under which the run folder knows it: any
    rank may become the one that opens the run folder.
    """
    path = {"path of --model": str(getattr(config, "model", ""))}
    return {**facts(config, data), "the processor": kind_of_chip(device), **inputs, **path}


def run_elastic(
    config: TrainingConfig, own_inputs: OwnInputs, work: Callable[[Communicator, Carried], Result]
) -> Result:
    """Run `work` with one generation after the other until it returns.

    own_inputs: what this rank's own --data and --model come to.

    Raises InputError for settings that elastic training does not support, and where a job of other settings runs.
    """
    device = choose_device(config.device)
    if config.plan is not None or config.emulate or config.islands != "1":
        raise InputError("with --elastic each rank holds the whole model; leave --plan, --emulate and --islands out")
    if config.zero:
        raise InputError(
            f"--elastic beside --zero {config.zero}: an elastic rank keeps the whole model and its optimizer state, so "
            "that any rank may fail; leave --zero out, or leave --elastic out and start the ranks with torchrun"
        )

    def check(theirs: Mapping[str, str]) -> None:
        data = Path(theirs[DATA])
        begun = as_begun(config, kept_speed(config.out))
        mine = _own_facts(begun, data, device, own_inputs(config, data))
        compare("this rank", mine, "the running job", {name: theirs[name] for name in theirs if name != DATA})

    carried = Carried(own_inputs)
    with claimed(config.out, shared=True), joined(config.out, config.comm_timeout) as rendezvous:
        while True:
            try:
                return work(_connect(rendezvous, carried.step, device, check), carried)
            except CommunicationError as lost:
                reason = str(lost)
            note(f"{reason}; the remaining ranks go on from step {max(0, carried.step)}")
            _disconnect()


def _connect(
    rendezvous: Rendezvous, step: int, device: torch.device, check: Callable[[Mapping[str, str]], None]
) -> ElasticCommunicator:
    """Agree on the next generation and connect its ranks. Raises CommunicationError when one exits meanwhile."""
    host = socket.gethostname()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    agreed = rendezvous.next_generation(step, host, store.port, check)
    rank, size = agreed.members.index(rendezvous.name), len(agreed.members)
    by_host = device.type != "cpu"  # gloo notices members that exit, where NCCL would wait for them
    comm = ElasticCommunicator(
        rank, size, device, timeout=rendezvous.timeout, by_host=by_host, rendezvous=rendezvous, names=agreed.members
    )
    if size == 1:
        return comm
    limit = timedelta(seconds=rendezvous.timeout)

    def connect() -> None:
        theirs = store if rank == 0 else TCPStore(agreed.host, agreed.port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=theirs, rank=rank, world_size=size, timeout=limit)

    comm.talk("connecting", connect)
    return comm.acquainted()


def _disconnect() -> None:
    """Destroy the process group, also one that not all members reached.

    Members connect under a number that PyTorch counts from the first process group of a process, unless the last one
    ended well; a newcomer counts from 0, so all do.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0


def _balancer(names: tuple[str, ...], rates: Mapping[str, tuple[float, int]]) -> LoadBalancer:
    """Rows by measured speed; a newcomer begins with the mean."""
    mean = sum(rate for rate, _ in rates.values()) / len(rates) if rates else 1.0
    now = [rates.get(name, (mean, 0)) for name in names]
    return LoadBalancer([rate for rate, _ in now], [known for _, known in now])


def _news(now: tuple[str, ...], before: tuple[str, ...], step: int) -> str:
    """For the metrics: how the members changed."""
    new, left = len(set(now) - set(before)), len(set(before) - set(now))
    again = "; their part of it is computed again" if left else ""
    return f"{len(now)} ranks go on with step {step + 1} ({new} joined, {left} left){again}"
