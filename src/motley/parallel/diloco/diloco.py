"""DiLoCo: islands of ranks, joined by slow links, train on their own and now and then take an outer step together.

                  a round: 30 steps of the run                                    outer step
    island 0   rank 0 ▏step▕▏step▕ ...          own rows, own optimizer    ┐  change of the fragment, in 8 bits, with
               rank 1 ▏step▕▏step▕ ...          messages stay inside       │  the tokens behind it: leader to leader
    island 1   rank 2 ▏  step  ▕▏  step  ▕      fewer steps if slower      ┘  the same outer step on every island

    inner steps   any layout that ranks can have: uneven rows, pipelines, expert parallelism, sharded optimizer state
    outer step    each leader gathers the fragment from its island, sends how far it moved away from the shared model,
                  reads what the others sent, takes the outer step (outer_optimizer.py), and tells its island the result
    overlap       the fragment leaves some steps early and the exchange runs behind them; the island then goes half-way
                  from where it is to the shared model (Streaming DiLoCo, arXiv 2501.18512)

What rounding took from a message is added to the island's next one (error feedback). After each round all compare a
checksum of the shared model, so that islands that drifted apart stop instead of training different models.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import RenderableType
from safetensors.torch import load_file
from torch import Tensor

from motley.apportion import apportion
from motley.data.stream import Batch, TokenStream
from motley.errors import InputError
from motley.files import read_json, remove_unfinished, whole_folder, write_json
from motley.model import Transformer
from motley.model.checkpoint import write_tensors
from motley.parallel.communicator import Communicator
from motley.parallel.diloco.outer_optimizer import OuterOptimizer, fragments_of
from motley.parallel.diloco.quantize import decode, encode, encoded_bytes
from motley.parallel.diloco.round_stats import RankRound, RoundWatch, spans_of, timing_of
from motley.parallel.diloco.sync_schedule import Round
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.rank import Ranks, ToldOnce
from motley.parallel.telemetry.dashboard import ranks_table
from motley.parallel.telemetry.step_stats import StepStats, introduction, is_drawn, rounded
from motley.parallel.telemetry.step_timer import Span
from motley.progress import note
from motley.train.allocator import memory_bytes
from motley.train.checkpoint import TRAINING_FACTS, TRAINING_TENSORS, remove_folders, step_folder
from motley.train.ngram_targets import NgramCounts
from motley.train.optimizer import State
from motley.train.step import StepLosses, is_trained
from motley.train.strategy import StepEnd, TrainingState

Result = TypeVar("Result")
OUTER_TENSORS = "outer.safetensors"
ROUND_PATIENCE_SECONDS = 1800.0
"""How long an island at least waits for one that is still on its way, as long as their speeds are not known."""
LATE_ROUNDS = 10
"""How many rounds long, beyond its patience, it waits once a round was measured."""
KEPT_IN_OVERLAP = 0.5
"""Share of an island's own weights that stays when an exchange ran behind its steps."""
WORTH_CHANGING = 0.05
"""Rows and inner steps are dealt out anew only where a round then takes so much less: measurements always differ."""


HEAD_BYTES = 16
"""Before each fragment, as float64: the tokens behind it; when it arrives, on the clock of emulated links."""


@dataclass
class _Flight:
    """A fragment on its way: what each island sent, once `work` is done."""

    messages: list[Tensor]
    work: dist.Work | None


@dataclass
class IslandRound:
    """What an island did in a round; seconds and bytes are measured, the rest is exact."""

    tokens: float = 0.0
    learned: float = 0.0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0
    bytes_sent: float = 0.0


@dataclass
class OuterStep:
    """The end of a round as all islands know it.

    Attributes:
        number: of the round, from 1.
        round: who did what.
        islands: what each of them did.
        seconds: that it took, without validation and checkpoints.
        stats: of all ranks, the round in the form of a step; checkpoints count as other things.
        spans: what each rank did when (round_stats.py).
        loss_scales: of each rank.
    """

    number: int
    round: Round
    islands: list[IslandRound]
    seconds: float
    stats: StepStats
    spans: list[list[Span]]
    loss_scales: list[float]

    @property
    def tokens(self) -> int:
        return round(sum(island.tokens for island in self.islands))

    def numbers(self) -> dict[str, Any]:
        """For the metrics: a list entry for each island."""
        columns = {name: [getattr(one, name) for one in self.islands] for name in vars(self.islands[0])}
        columns["island_tokens"] = columns.pop("tokens")  # `tokens` is where in the run
        rows = [self.round.rows_of(island) for island in range(len(self.islands))]
        return {
            "round": self.number, "steps": self.round.steps, "inner_steps": list(self.round.inner),
            "rows": [[own.start, len(own)] for own in rows], **columns, "round_seconds": self.seconds,
        }  # fmt: skip


@dataclass
class _Own:
    """What only this island's leader knows of the exchange: part of the training state."""

    residuals: list[Tensor] = field(default_factory=list)
    learned_since: list[float] = field(default_factory=list)


class Diloco:
    """A strategy (motley.train.strategy): the island of this rank among all, which wraps the strategy of its ranks.

    Args:
        ranks: of this island.
        world: all ranks.
        islands: ranks of each island, by their number in the world.
        speeds: of the islands, to begin with.
        every: steps in a round.
    """

    def __init__(
        self, ranks: Ranks, world: Communicator, islands: Sequence[Sequence[int]], speeds: Sequence[float], every: int
    ) -> None:
        self.ranks, self.world = ranks, world
        self.config, self.shape, self.model, self.scaler = ranks.config, ranks.shape, ranks.model, ranks.scaler
        ranks.told = None
        self._told = ToldOnce()
        self.count, self.every = len(islands), every
        self.number = next(number for number, own in enumerate(islands) if world.rank in own)
        self.leaders = tuple(own[0] for own in islands)
        self._islands = [next(n for n, own in enumerate(islands) if rank in own) for rank in range(world.size)]
        if self.config.batch_rows < self.count:
            raise InputError(f"--batch-rows {self.config.batch_rows} are too few for {self.count} islands")
        self.speeds, self.measured = list(speeds), LoadBalancer(list(speeds))
        self.outer: OuterOptimizer | None = None
        self.rounds = 0
        self.stats = StepStats()
        self._patience = max(world.timeout, ROUND_PATIENCE_SECONDS)
        world.form([self.leaders])
        with torch.device("meta"):
            model = Transformer(self.shape)
        parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
        biases = {name: buffer.shape for name, buffer in model.named_buffers() if name in model.state_dict()}
        self._shapes = parameters | biases
        mtp = bool(ranks.depths)
        self.fragments = fragments_of(
            self.shape,
            {name: shape for name, shape in parameters.items() if is_trained(name, mtp)},
            {name: shape for name, shape in biases.items() if is_trained(name, mtp)},
            self.config.fragments,
        )
        self._own = _Own()
        self._gathered: TrainingState | None = None
        self._flights: dict[int, _Flight] = {}
        self.begin_round(0)

    @property
    def leads(self) -> bool:
        return self.world.leads

    @property
    def micro_batch(self) -> int:
        return self.ranks.micro_batch

    @property
    def holds_head(self) -> bool:
        return self.ranks.holds_head

    def learn_ngrams(self, counts: NgramCounts) -> None:
        self.ranks.learn_ngrams(counts)

    # --------------------------------------------------------------------------------------------- a round

    def begin_round(self, step: int) -> None:
        """Deal out the rows of the round that begins at the run's step `step`."""
        steps = max(1, min(self.every, self.config.steps - step))
        self.round = Round.of(step, steps, self.config.batch_rows, self.speeds)
        self.taken, self.island_round, self._seconds = 0, IslandRound(), 0.0
        self._watch = RoundWatch(self.ranks.comm.timer, len(self.fragments))

    @property
    def between_rounds(self) -> bool:
        """Whether all islands are at the same step, with nothing under way."""
        return self.taken == 0

    @property
    def step(self) -> int:
        """The run's step that this island has reached."""
        return self.round.step(self.number, self.taken)

    def read(self, stream: TokenStream, step: int) -> Batch:
        return self.ranks.read_rows(stream, step, self.round.rows(self.number, self.taken))

    def gradient(self, batch: Batch) -> tuple[StepLosses, float]:
        return self.ranks.gradient(batch)

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        self.ranks.update(losses, norm, learning_rate)

    def finish_step(self, step: int, losses: StepLosses, learned: bool, seconds: Callable[[], float]) -> StepEnd:
        """Exchange fragments with the other islands where it is time."""
        reached, rows = self.round.step(self.number, self.taken + 1), len(self.round.rows(self.number, self.taken))
        lost = self.ranks.balance_rows(step, reached)
        counted = self.island_round.tokens
        outer = self.moved(losses.tokens, learned, seconds())
        tokens = losses.tokens if outer is None else round(outer.tokens - counted)
        end = StepEnd(reached, tokens, rows, self.between_rounds, lost=lost)
        if lost is None:
            drawn = [(kind, {"island": self.number, **values}) for kind, values in self.ranks.drawn_spans(reached)]
            end.records, end.remarks = [*drawn, *self._records(outer)], self._remarks()
            end.busy = self.ranks.stats.own_seconds
        if outer is not None:
            end.round_seconds, end.round_busy = outer.seconds, [one.busy_seconds for one in outer.islands]
        return end

    def moved(self, tokens: int, learned: bool, seconds: float) -> OuterStep | None:
        """The island took one step on `tokens` tokens. At a round's end: how it went.

        learned: whether the step was not skipped.

        Raises InputError when the islands' shared models differ.
        """
        started = time.perf_counter() - seconds
        self.taken += 1
        self.island_round.tokens += tokens
        self.island_round.learned += tokens * learned
        self.island_round.busy_seconds += seconds
        self._own.learned_since = [before + tokens * learned for before in self._own.learned_since]
        self._watch.stepped(self.ranks.replica_tokens, seconds)
        exchanges = self.round.meetings(self.number, len(self.fragments), self.config.overlap)
        for number, (leaves, _) in enumerate(exchanges):
            if leaves == self.taken:
                self._send(number)
                self._watch.rank_round.crossings[number].left = self._watch.now
        for number, (_, arrives) in enumerate(exchanges):
            if arrives == self.taken:
                self._take_in(number)
        self._watch.carried()
        ended = self.taken == self.round.inner[self.number]
        islands, rank_round = self._end_round() if ended else ([], [])
        self._seconds += time.perf_counter() - started
        if not ended:
            return None
        outer = self._outer_step(islands, rank_round)
        self.begin_round(self.round.start + self.round.steps)
        return outer

    def _send(self, number: int) -> None:
        """Begin to tell all islands how far this one's fragment is from the shared one."""
        fragment = self.fragments[number]
        state = self.ranks.fragment(fragment.names)
        if state is None:
            return
        assert self.outer is not None
        change = self.outer.weights[number] - fragment.flat(state)
        count, bits = fragment.parameters, self.config.outer_bits
        wanted = change[:count] + self._own.residuals[number]
        numbers = encode(wanted, bits)
        self._own.residuals[number] = wanted - decode(numbers, count, bits)
        body = torch.cat([numbers, change[count:].view(torch.uint8)])
        head = [self._own.learned_since[number], self._arrival(HEAD_BYTES + len(body))]
        self._own.learned_since[number] = 0.0
        message = torch.cat([torch.tensor(head, dtype=torch.float64).view(torch.uint8), body])
        received = [torch.empty_like(message) for _ in range(self.count)]
        group = self.world.group(self.leaders)
        with self.world.waiting(self._patience, self.leaders):
            work = self._talk(lambda: dist.all_gather(received, message, group=group, async_op=True))
        self._flights[number] = _Flight(received, work)
        self.island_round.bytes_sent += len(message) * (self.count - 1)
        self.world.timer.moved(len(message) * (self.count - 1), len(message) * (self.count - 1))

    def _arrival(self, size: int) -> float:
        """When a message of so many bytes has reached all leaders over emulated links; 0 without any."""
        links = self.world.links
        others = [leader for leader in self.leaders if leader != self.world.rank]
        return max(
            [links.arrival(other, size) for other in others if links.crosses(other)] if links else [], default=0.0
        )

    def _take_in(self, number: int) -> None:
        """Wait for what all islands sent of a fragment; take the outer step; tell this island."""
        fragment, shared = self.fragments[number], None
        seen = self._watch.rank_round.crossings[number]
        seen.came = self._watch.now
        if (flight := self._flights.pop(number, None)) is not None:
            assert self.outer is not None
            started = time.perf_counter()
            self._talk(lambda: flight.work.wait() if flight.work is not None else None)
            heads = [message[:HEAD_BYTES].clone().view(torch.float64).tolist() for message in flight.messages]
            tokens = [learned for learned, _ in heads]
            time.sleep(max(0.0, max(arrival for _, arrival in heads) - time.monotonic()))
            self.island_round.waited_seconds += time.perf_counter() - started
            seen.arrived = self._watch.now
            count, bits = fragment.parameters, self.config.outer_bits
            edge, changes = HEAD_BYTES + encoded_bytes(count, bits), []
            for message in flight.messages:
                biases = message[edge:].clone().view(torch.float32)
                changes.append(torch.cat([decode(message[HEAD_BYTES:edge], count, bits), biases]))
            self.outer.step(number, changes, tokens)
            shared = fragment.named(self.outer.weights[number])
        keep = KEPT_IN_OVERLAP if self.config.overlap else 0.0
        self.ranks.take_fragment(shared, fragment.names, keep)
        seen.taken = self._watch.now
        seen.arrived = seen.arrived or seen.taken

    def _end_round(self) -> tuple[list[IslandRound], list[RankRound]]:
        """All islands compare what they hold and tell what they did; the next round follows their speed."""
        started, rank_round = time.perf_counter(), self._watch.rank_round
        digest = -1.0 if self.outer is None else float(self._digest())
        head = [digest, *dataclasses.astuple(self.island_round)]
        rank_round.replica, rank_round.loss_scale = (
            self.ranks.coordinates.replica_number,
            self.scaler.values[self.ranks.comm.rank],
        )
        rank_round.memory, rank_round.reached = memory_bytes(self.world.device), self._watch.now
        with self.world.waiting(self._patience):
            everyone = self.world.everyone([*head, *rank_round.numbers()])
        self.island_round.waited_seconds += time.perf_counter() - started
        told = [everyone[leader][: len(head)] for leader in self.leaders]
        for island, (theirs, *_) in enumerate(told):
            if theirs != told[0][0]:
                raise InputError(
                    f"the shared model of island {island} differs from island 0's after step "
                    f"{self.round.start + self.round.steps}: a machine computes or transmits wrongly; start the job "
                    "again, it goes on from its newest checkpoint"
                )
        islands = [IslandRound(*values) for _, *values in told]
        self._follow([island.busy_seconds for island in islands])
        self.rounds += 1
        return islands, [RankRound.of(numbers[len(head) :]) for numbers in everyone]

    def _outer_step(self, islands: list[IslandRound], rank_round: list[RankRound]) -> OuterStep:
        """What the islands told at the end of the round in hand."""
        fragments, overlap = len(self.fragments), self.config.overlap
        exchanges = [self.round.meetings(island, fragments, overlap) for island in range(self.count)]
        arrivals = [[arrives for _, arrives in own] for own in exchanges]
        self.stats = timing_of(rank_round, self._islands, self.config.seq_len)
        spans = spans_of(rank_round, self._islands, self.leaders, arrivals)
        scales = [one.loss_scale for one in rank_round]
        return OuterStep(self.rounds, self.round, islands, self._seconds, self.stats, spans, scales)

    def _follow(self, seconds: Sequence[float]) -> None:
        """Deal out later rounds by speed, where that is worth it."""
        self.measured.measured(self.round.shares, seconds)
        self._patience = self.world.timeout + LATE_ROUNDS * max(seconds)
        if self.config.inner_steps == "planned":
            return
        rates = self.measured.rates
        again = Round.of(0, self.round.steps, self.config.batch_rows, rates)
        longest, shortest = (
            max(rows / rate for rows, rate in zip(one.shares, rates, strict=True)) for one in (self.round, again)
        )
        if shortest * (1 + WORTH_CHANGING) < longest:
            self.speeds = list(rates)

    def _digest(self) -> int:
        assert self.outer is not None
        digests = [self.outer.digest(number) for number in range(len(self.fragments))]
        return int.from_bytes(hashlib.sha256(repr(digests).encode()).digest()[:6], "big")

    def _talk(self, message: Any) -> Any:
        return self.world.talk("outer step", message)

    def _records(self, outer: OuterStep | None) -> list[tuple[str, Mapping[str, Any]]]:
        """What the ranks of all islands did in a round that ended."""
        if outer is None:
            return []
        found: list[tuple[str, Mapping[str, Any]]] = [
            ("step_stats", {"round": outer.number, **outer.stats.numbers(), "loss_scales": outer.loss_scales})
        ]
        reached = math.ceil((outer.round.start + outer.round.steps) / self.every)
        if is_drawn(reached, math.ceil(self.config.steps / self.every)):
            spans = [rounded(row) for row in outer.spans]
            drawn = {"round": outer.number, "step_seconds": outer.stats.step_seconds, "spans": spans}
            found.append(("timeline", drawn))
        return [*found, ("outer_step", outer.numbers())]

    def _remarks(self) -> list[str]:
        said = self.ranks.budgets.exceeded(self.ranks.stats.memory) if self.ranks.budgets else []
        if self.world.orphaned and not self._told.orphaned:
            self._told.orphaned = True
            said.append("torchrun exited: the ranks go on, but nothing would start them again")
        return said

    # --------------------------------------------------------------------------------------------- agreement

    def stopping(self, asked: bool) -> bool:
        return self.between_rounds and self.world.stopping(asked)

    def agree(self, holds: bool) -> bool:
        return not bool(self.world.sum(self.world.outgoing(torch.tensor(int(not holds)))))

    def led(self, work: Callable[[], Result]) -> Result:
        return self.world.led(work)

    def check_copies(self, step: int) -> None:
        self.ranks.check_copies(step)

    # -------------------------------------------------------------------------------------- the shared model

    @torch.no_grad()
    def held_out_loss(self, stream: TokenStream, rows: int) -> float:
        """Of the shared model; each island reads its share of the rows."""
        shares = apportion(rows, self.speeds)
        with self._as_shared():
            nats = self.ranks.held_out_rows(stream, shares[self.number], sum(shares[: self.number]))
        own = torch.tensor(nats if self.ranks.comm.leads else 0.0, dtype=torch.float64)
        return float(self.world.sum(self.world.outgoing(own)))

    @property
    def apart(self) -> bool:
        """Whether this island's weights differ from the shared ones between rounds."""
        return len(self.fragments) > 1 or self.config.overlap > 0

    @contextmanager
    def _as_shared(self) -> Iterator[None]:
        """The island holds the shared model for a while."""
        if not self.apart:
            yield
            return
        shards = self.ranks.buffers
        held = [*(shards.view(part) for part in shards.here), *self.ranks.model.buffers()]
        own = [tensor.detach().clone() for tensor in held]
        names = [name for fragment in self.fragments for name in fragment.names]
        self.ranks.take_fragment(None if self.outer is None else self.outer.tensors(), names, 0.0)
        yield
        with torch.no_grad():
            for tensor, before in zip(held, own, strict=True):
                tensor.copy_(before)

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> TrainingState | None:
        """The shared model's weights and island 0's optimizer state, at rank 0."""
        self._gathered = self.ranks.state()
        if self._gathered is None or not self.world.leads:
            return None
        assert self.outer is not None
        momentum = {f"outer.{number}": tensor for number, tensor in enumerate(self.outer.momentum)}
        weights = {**self._gathered.weights, **self.outer.tensors()}
        return TrainingState(weights, self._gathered.optimizer, {OUTER_TENSORS: momentum}, {"islands": self._facts()})

    def _facts(self) -> dict[str, Any]:
        """Numbers that all islands need to resume exactly."""
        measured = dataclasses.asdict(self.measured)
        return {"count": self.count, "rounds": self.rounds, "speeds": self.speeds, "measured": measured}

    def save_own(self, run: Path, step: int, facts: Mapping[str, Any]) -> None:
        """Every island's leader writes what only its island has; a failure of one is raised on all ranks."""
        failure, own = None, self._own_state()
        if own is not None:
            tensors, numbers = own
            try:
                with whole_folder(island_folder(run, self.number) / step_folder(run, step).name) as temporary:
                    write_tensors(tensors, temporary / TRAINING_TENSORS)
                    write_json(temporary / TRAINING_FACTS, {**facts, **numbers})
            except InputError as error:
                failure = str(error)
        for reason in self.world.all_values(failure):
            if reason is not None:
                raise InputError(reason)

    def prune_own(self, run: Path, kept: Callable[[], Sequence[str]]) -> None:
        names = set(self.world.share(kept() if self.world.leads else []))
        if self.ranks.comm.leads:
            folder = island_folder(run, self.number)
            remove_unfinished(folder)
            remove_folders(one for one in folder.glob("step-????????") if one.name not in names)

    def _own_state(self) -> tuple[State, dict[str, Any]] | None:
        """(tensors, numbers) that this island alone needs to resume exactly, at its leader."""
        own = self.ranks.fragment([name for fragment in self.fragments for name in fragment.names])
        if self._gathered is None or own is None:
            return None
        tensors = {f"optimizer.{name}": tensor for name, tensor in self._gathered.optimizer.items()}
        tensors |= {f"residual.{number}": tensor for number, tensor in enumerate(self._own.residuals)}
        tensors |= {f"own.{name}": tensor.clone() for name, tensor in own.items()} if self.apart else {}
        self._gathered = None
        return tensors, {"learned_since": self._own.learned_since}

    def load(self, saved: TrainingState | None, facts: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        own = self._read_own(folder, facts)
        momentum = None if saved is None else saved.others.get(OUTER_TENSORS)
        self.take_state(None if saved is None else (saved.weights, saved.optimizer), momentum, own)
        if (known := facts.get("islands")) is not None and known["count"] == self.count:
            self.rounds, self.speeds = known["rounds"], known["speeds"]
            self.measured = LoadBalancer(**known["measured"])
        self.begin_round(facts["step"])
        return self.ranks.comm.share(facts if own is None else own[1])

    def _read_own(self, run: Path, facts: Mapping[str, Any]) -> tuple[State, dict[str, Any]] | None:
        """What the leader of an island saved for it alone; None where it saved nothing, which is said aloud."""
        folder = island_folder(run, self.number) / step_folder(run, facts["step"]).name
        before = facts["islands"]["count"] if "islands" in facts else 1
        if not self.ranks.comm.leads:
            return None
        # One island writes nothing of its own: what lies there then, a save that was killed left of islands before it.
        if before > 1 and self.number < before and (folder / TRAINING_FACTS).is_file():
            return load_file(folder / TRAINING_TENSORS), read_json(folder / TRAINING_FACTS)
        note(
            f"island {self.number} finds nothing of its own in {folder}: it begins from the shared model, with "
            f"{'the optimizer state of the checkpoint' if self.number == 0 else 'a new optimizer'}"
        )
        return None

    def take_state(
        self,
        state: tuple[State, State] | None,
        momentum: State | None = None,
        own: tuple[State, Mapping[str, Any]] | None = None,
    ) -> None:
        """Put the state that rank 0 of the world has (None elsewhere) on all ranks.

        Args:
            state: (the shared model's weights, optimizer state, for island 0 where it has none of its own).
            momentum: of the outer optimizer; None: it begins anew.
            own: at an island's leader, what `save_own` wrote; None: the island begins from the shared model.
        """
        if not self.ranks.comm.leads:
            self.ranks.take_state(None)
            return
        weights, states = self._from_first(None if state is None else state[0]), {} if state is None else state[1]
        config = self.config
        self.outer = OuterOptimizer(self.fragments, weights, config.outer_learning_rate, config.outer_momentum)
        self._own = _Own([torch.zeros(f.parameters) for f in self.fragments], [0.0 for _ in self.fragments])
        for number, tensor in enumerate(self.outer.momentum):
            if momentum:
                tensor.copy_(momentum[f"outer.{number}"])
            self._copy_of_first(tensor)
        if own is not None:
            tensors, numbers = own
            self._own.residuals = [tensors[f"residual.{number}"] for number in range(len(self.fragments))]
            self._own.learned_since = list(numbers["learned_since"])
            weights = weights | _named_after("own.", tensors)
            states = _named_after("optimizer.", tensors)
        self.ranks.take_state((weights, states))

    # --------------------------------------------------------------------------------------------- telemetry

    def introduction(self) -> dict[str, Any] | None:
        rows = len(self.round.rows_of(self.number))
        return introduction(self.world, self.ranks.coordinates, rows, self.config.plan is not None, self.number)

    def dashboard(self, about: Mapping[str, Any]) -> RenderableType:
        return ranks_table(about, self.stats)

    # -------------------------------------------------------------------------------- messages between leaders

    def _from_first(self, weights: State | None) -> State:
        """The whole weights that rank 0 has, at every island's leader."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        flat = torch.empty(sum(sizes))
        if weights is not None:
            flat = torch.cat([weights[name].detach().reshape(-1).float().cpu() for name in self._shapes])
        self._copy_of_first(flat)
        pieces = zip(self._shapes.items(), flat.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}

    def _copy_of_first(self, tensor: Tensor) -> None:
        """Make `tensor` what it is at rank 0, on all leaders: a message over each slow link."""
        if self.world.leads:
            for leader in self.leaders[1:]:
                self.world.send(tensor, leader)
        else:
            self.world.receive(tensor, self.leaders[0])


def _named_after(start: str, tensors: State) -> State:
    """Those whose names start so, without the start."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def island_folder(run: Path, number: int) -> Path:
    """Where an island keeps what it alone needs.

        islands/1/step-00000100/     training.safetensors, training.json             what island 1 alone needs besides

    Each leader writes its own part where it is: a checkpoint sends nothing over a slow link. The model is the one that
    all share.
    """
    return run / "islands" / str(number)
