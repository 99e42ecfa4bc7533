"""Islands: crews joined by slow links, which train on their own and meet now and then.

                  a round: 30 steps of the run                                    meeting
    island 0   worker 0 ▏step▕▏step▕ ...        own rows, own optimizer    ┐  change of the fragment, in 8 bits, with
               worker 1 ▏step▕▏step▕ ...        messages stay inside       │  the tokens behind it: leader to leader
    island 1   worker 2 ▏  step  ▕▏  step  ▕    fewer steps if slower      ┘  the same outer step on every island

    inner steps   any layout that one crew can have: uneven rows, pipelines, spread experts, sharded optimizer state
    meeting       each leader gathers the fragment from its island, sends how far it moved away from the shared model,
                  reads what the others sent, takes the outer step (outer.py), and tells its island the result
    overlap       the fragment leaves some steps early and the exchange runs behind them; the island then goes half-way
                  from where it is to the shared model (Streaming DiLoCo, arXiv 2501.18512)

What rounding took from a message is added to the island's next one (error feedback). After each round all compare a
fingerprint of the shared model, so that islands that drifted apart stop instead of training different models. A run of
one crew is a run of one island whose rounds are single steps and need no meeting.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from motley.data.stream import TokenStream
from motley.errors import InputError
from motley.model import Transformer
from motley.parallel.communicator import Communicator
from motley.parallel.diloco.outer_optimizer import OuterOptimizer, fragments_of
from motley.parallel.diloco.quantize import decode, encode, encoded_bytes
from motley.parallel.diloco.round_stats import RankRound, RoundWatch, spans_of, timing_of
from motley.parallel.diloco.sync_schedule import Round
from motley.parallel.full_state import State
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.rank import Worker
from motley.parallel.telemetry.step_stats import StepStats, memory_bytes
from motley.parallel.telemetry.step_timer import Span
from motley.parallel.zero.partition import trained
from motley.plan.search.pool_packing import apportion

USUAL_ROUND = 30
"""Steps between two meetings where nothing says how many."""
ROUND_PATIENCE_SECONDS = 1800.0
"""How long an island at least waits for one that is still on its way, as long as their speeds are not known."""
LATE_ROUNDS = 10
"""How many rounds long, beyond its patience, it waits once a round showed them."""
KEPT_IN_OVERLAP = 0.5
"""Share of an island's own weights that stays when an exchange ran behind its steps."""
WORTH_CHANGING = 0.05
"""Rows and inner steps are dealt out anew only where a round then takes so much less: measurements always differ."""


HEAD_BYTES = 16
"""Before each fragment, as float64: the tokens behind it; when it arrives, on the clock of pretended cables."""


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
        ledgers: of each island.
        seconds: that it took, without validation and checkpoints.
        timing: of all workers, the round in the form of a step; checkpoints count as other things.
        spans: what each worker did when (doings.py).
        loss_scales: of each worker.
    """

    number: int
    round: Round
    ledgers: list[IslandRound]
    seconds: float
    timing: StepStats
    spans: list[list[Span]]
    loss_scales: list[float]

    @property
    def tokens(self) -> int:
        return round(sum(ledger.tokens for ledger in self.ledgers))

    def numbers(self) -> dict[str, Any]:
        """For the metrics: a list entry for each island."""
        columns = {name: [getattr(one, name) for one in self.ledgers] for name in vars(self.ledgers[0])}
        columns["island_tokens"] = columns.pop("tokens")  # `tokens` is where in the run
        rows = [self.round.rows_of(island) for island in range(len(self.ledgers))]
        return {
            "round": self.number, "steps": self.round.steps, "inner_steps": list(self.round.inner),
            "rows": [[own.start, len(own)] for own in rows], **columns, "round_seconds": self.seconds,
        }  # fmt: skip


@dataclass
class _Own:
    """What only this island's leader knows of the exchange: part of the training state."""

    residuals: list[Tensor] = field(default_factory=list)
    learned_since: list[float] = field(default_factory=list)


class Island:
    """This worker's island among all.

    Args:
        worker: this process in its island's crew.
        world: all workers.
        parts: workers of each island, by their rank in the world.
        speeds: of the islands, to begin with.
        every: steps in a round.
    """

    def __init__(
        self, worker: Worker, world: Communicator, parts: Sequence[Sequence[int]], speeds: Sequence[float], every: int
    ) -> None:
        self.worker, self.world = worker, world
        self.settings, self.config = worker.settings, worker.config
        self.count = len(parts)
        self.number = next(number for number, part in enumerate(parts) if world.rank in part)
        self.leaders = tuple(part[0] for part in parts)
        self._islands = [next(n for n, part in enumerate(parts) if rank in part) for rank in range(world.size)]
        self.every = every if self.count > 1 else 1
        if self.settings.batch_rows < self.count:
            raise InputError(f"--batch-rows {self.settings.batch_rows} are too few for {self.count} islands")
        self.speeds, self.measured = list(speeds), LoadBalancer(list(speeds))
        self.outer: OuterOptimizer | None = None
        self.rounds = 0
        self._patience = max(world.timeout, ROUND_PATIENCE_SECONDS)
        if self.count > 1:
            world.form([self.leaders])
        with torch.device("meta"):
            model = Transformer(self.config)
        parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
        biases = {name: buffer.shape for name, buffer in model.named_buffers() if name in model.state_dict()}
        self._shapes = parameters | biases
        depths = bool(worker.depths)
        self.fragments = fragments_of(
            self.config,
            {name: shape for name, shape in parameters.items() if trained(name, depths)},
            {name: shape for name, shape in biases.items() if trained(name, depths)},
            self.settings.fragments,
        )
        self._own = _Own()
        self._flights: dict[int, _Flight] = {}
        self._round_timing = StepStats()
        self.begin_round(0)

    # ---------------------------------------------------------------------------------------------- a round

    def begin_round(self, step: int) -> None:
        """Deal out the rows of the round that begins at the run's step `step`."""
        steps = max(1, min(self.every, self.settings.steps - step))
        self.round = Round.of(step, steps, self.settings.batch_rows, self.speeds)
        self.taken, self.ledger, self._seconds = 0, IslandRound(), 0.0
        self._watch = RoundWatch(self.worker.comm.watch, len(self.fragments))

    @property
    def between_rounds(self) -> bool:
        """Whether all islands are at the same step, with nothing under way."""
        return self.taken == 0

    @property
    def rows(self) -> range:
        """Of the stream: those of this island's next step."""
        return self.round.rows(self.number, self.taken)

    @property
    def timing(self) -> StepStats:
        """Of all workers: of one crew the last step, of islands the last round; empty before the first."""
        return self.worker.timing if self.count == 1 else self._round_timing

    @property
    def step(self) -> int:
        """The run's step that this island has reached."""
        return self.round.step(self.number, self.taken)

    def moved(self, tokens: int, learned: bool, seconds: float) -> OuterStep | None:
        """The island took one step on `tokens` tokens; meet the others where it is time. At a round's end: how it went.

        Every worker calls this. learned: whether the step was not skipped.

        Raises InputError when the islands' shared models differ.
        """
        started = time.perf_counter() - seconds
        self.taken += 1
        self.ledger.tokens += tokens
        self.ledger.learned += tokens * learned
        self.ledger.busy_seconds += seconds
        self._own.learned_since = [before + tokens * learned for before in self._own.learned_since]
        if self.count > 1:
            self._watch.stepped(self.worker.replica_tokens, seconds)
            meetings = self.round.meetings(self.number, len(self.fragments), self.settings.overlap)
            for number, (leaves, _) in enumerate(meetings):
                if leaves == self.taken:
                    self._send(number)
                    self._watch.rank_round.crossings[number].left = self._watch.now
            for number, (_, arrives) in enumerate(meetings):
                if arrives == self.taken:
                    self._take_in(number)
            self._watch.carried()
        ended = self.taken == self.round.inner[self.number]
        ledgers, rank_round = self._end_round() if ended and self.count > 1 else ([], [])
        self._seconds += time.perf_counter() - started
        meeting = self._meeting(ledgers, rank_round) if ledgers else None
        if ended:
            self.begin_round(self.round.start + self.round.steps)
        return meeting

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on all islands, which are between rounds; within an island all decide alike."""
        if self.count == 1:
            return holds
        return not bool(self.world.sum(self.world.outgoing(torch.tensor(int(not holds)))))

    def _send(self, number: int) -> None:
        """Begin to tell all islands how far this one's fragment is from the shared one."""
        fragment = self.fragments[number]
        state = self.worker.fragment(fragment.names)
        if state is None:
            return
        assert self.outer is not None
        change = self.outer.weights[number] - fragment.flat(state)
        count, bits = fragment.parameters, self.settings.outer_bits
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
        self.ledger.bytes_sent += len(message) * (self.count - 1)
        self.world.watch.moved(len(message) * (self.count - 1), len(message) * (self.count - 1))

    def _arrival(self, size: int) -> float:
        """When a message of so many bytes has reached all leaders over pretended cables (links.py); 0 without any."""
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
            self.ledger.waited_seconds += time.perf_counter() - started
            seen.arrived = self._watch.now
            count, bits = fragment.parameters, self.settings.outer_bits
            edge, changes = HEAD_BYTES + encoded_bytes(count, bits), []
            for message in flight.messages:
                biases = message[edge:].clone().view(torch.float32)
                changes.append(torch.cat([decode(message[HEAD_BYTES:edge], count, bits), biases]))
            self.outer.step(number, changes, tokens)
            shared = fragment.named(self.outer.weights[number])
        keep = KEPT_IN_OVERLAP if self.settings.overlap else 0.0
        self.worker.take_fragment(shared, fragment.names, keep)
        seen.taken = self._watch.now
        seen.arrived = seen.arrived or seen.taken

    def _end_round(self) -> tuple[list[IslandRound], list[RankRound]]:
        """All islands compare what they hold and tell what they did; the next round follows their speed."""
        started, rank_round = time.perf_counter(), self._watch.rank_round
        digest = -1.0 if self.outer is None else float(self._digest())
        head = [digest, *dataclasses.astuple(self.ledger)]
        rank_round.replica, rank_round.loss_scale = self.worker.place.replica_number, self.worker.loss_scale
        rank_round.memory, rank_round.reached = memory_bytes(self.world.device), self._watch.now
        with self.world.waiting(self._patience):
            everyone = self.world.everyone([*head, *rank_round.numbers()])
        self.ledger.waited_seconds += time.perf_counter() - started
        told = [everyone[leader][: len(head)] for leader in self.leaders]
        for island, (theirs, *_) in enumerate(told):
            if theirs != told[0][0]:
                raise InputError(
                    f"the shared model of island {island} differs from island 0's after step "
                    f"{self.round.start + self.round.steps}: a machine computes or transmits wrongly; start the job "
                    "again, it goes on from its newest checkpoint"
                )
        ledgers = [IslandRound(*values) for _, *values in told]
        self._follow([ledger.busy_seconds for ledger in ledgers])
        self.rounds += 1
        return ledgers, [RankRound.of(numbers[len(head) :]) for numbers in everyone]

    def _meeting(self, ledgers: list[IslandRound], rank_round: list[RankRound]) -> OuterStep:
        """What the islands told at the end of the round in hand."""
        fragments, overlap = len(self.fragments), self.settings.overlap
        meetings = [self.round.meetings(island, fragments, overlap) for island in range(self.count)]
        arrivals = [[arrives for _, arrives in own] for own in meetings]
        self._round_timing = timing_of(rank_round, self._islands, self.settings.seq_len)
        spans = spans_of(rank_round, self._islands, self.leaders, arrivals)
        scales = [one.loss_scale for one in rank_round]
        return OuterStep(self.rounds, self.round, ledgers, self._seconds, self._round_timing, spans, scales)

    def _follow(self, seconds: Sequence[float]) -> None:
        """Deal out later rounds by speed, where that is worth it."""
        self.measured.measured(self.round.shares, seconds)
        self._patience = self.world.timeout + LATE_ROUNDS * max(seconds)
        if self.settings.inner_steps == "planned":
            return
        rates = self.measured.rates
        again = Round.of(0, self.round.steps, self.settings.batch_rows, rates)
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
        return self.world.talk("meeting the other islands", message)

    # ------------------------------------------------------------------------------------- the shared model

    @torch.no_grad()
    def held_out_loss(self, stream: TokenStream, rows: int) -> float:
        """Summed loss in nats of the shared model on the first `rows` rows of a stream, the same on every worker.

        Each island reads its share of the rows.
        """
        if self.count == 1:
            return self.worker.held_out_loss(stream, rows)
        shares = apportion(rows, self.speeds)
        with self._as_shared():
            nats = self.worker.held_out_loss(stream, shares[self.number], sum(shares[: self.number]))
        own = torch.tensor(nats if self.worker.comm.leads else 0.0, dtype=torch.float64)
        return float(self.world.sum(self.world.outgoing(own)))

    @property
    def apart(self) -> bool:
        """Whether this island's weights differ from the shared ones between rounds."""
        return self.count > 1 and (len(self.fragments) > 1 or self.settings.overlap > 0)

    @contextmanager
    def _as_shared(self) -> Iterator[None]:
        """The island holds the shared model for a while."""
        if not self.apart:
            yield
            return
        shards = self.worker.shards
        held = [*(shards.view(part) for part in shards.here), *self.worker.model.buffers()]
        own = [tensor.detach().clone() for tensor in held]
        names = [name for fragment in self.fragments for name in fragment.names]
        self.worker.take_fragment(None if self.outer is None else self.outer.tensors(), names, 0.0)
        yield
        with torch.no_grad():
            for tensor, before in zip(held, own, strict=True):
                tensor.copy_(before)

    # ------------------------------------------------------------------------------------------------ state

    def whole_state(self) -> tuple[State, State] | None:
        """(the shared model's weights, this island's optimizer state) at the leader of each island, None elsewhere."""
        state = self.worker.whole_state()
        if state is None or self.outer is None:
            return state
        return {**state[0], **self.outer.tensors()}, state[1]

    def take_state(
        self,
        state: tuple[State, State] | None,
        momentum: State | None = None,
        own: tuple[State, dict[str, Any]] | None = None,
    ) -> None:
        """Put the state that worker 0 of the world has (None elsewhere) on all workers.

        Args:
            state: (the shared model's weights, optimizer state, for island 0 where it has none of its own).
            momentum: of the outer optimizer; None: it begins anew.
            own: at an island's leader, what `own_state` gave; None: the island begins from the shared model.
        """
        if self.count == 1:
            self.worker.take_state(state)
            return
        if not self.worker.comm.leads:
            self.worker.take_state(None)
            return
        weights, states = self._from_first(None if state is None else state[0]), {} if state is None else state[1]
        settings = self.settings
        self.outer = OuterOptimizer(self.fragments, weights, settings.outer_learning_rate, settings.outer_momentum)
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
        self.worker.take_state((weights, states))

    def facts(self) -> dict[str, Any]:
        """Numbers that all islands need to go on exactly; none of a run that has one."""
        if self.count == 1:
            return {}
        measured = dataclasses.asdict(self.measured)
        return {"islands": {"count": self.count, "rounds": self.rounds, "speeds": self.speeds, "measured": measured}}

    def go_on(self, facts: dict[str, Any]) -> None:
        """Begin the round behind a checkpoint with these facts."""
        if (known := facts.get("islands")) is not None and known["count"] == self.count > 1:
            self.rounds, self.speeds, self.measured = known["rounds"], known["speeds"], LoadBalancer(**known["measured"])
        self.begin_round(facts["step"])

    def momentum(self) -> State:
        """The outer momentum, by fragment."""
        assert self.outer is not None
        return {f"outer.{number}": tensor for number, tensor in enumerate(self.outer.momentum)}

    def own_state(self, state: tuple[State, State] | None) -> tuple[State, dict[str, Any]] | None:
        """(tensors, numbers) that this island alone needs to go on exactly, at its leader.

        state: of `whole_state`.
        """
        own = self.worker.fragment([name for fragment in self.fragments for name in fragment.names])
        if state is None or own is None:
            return None
        tensors = {f"optimizer.{name}": tensor for name, tensor in state[1].items()}
        tensors |= {f"residual.{number}": tensor for number, tensor in enumerate(self._own.residuals)}
        tensors |= {f"own.{name}": tensor.clone() for name, tensor in own.items()} if self.apart else {}
        return tensors, {"learned_since": self._own.learned_since}

    def _from_first(self, weights: State | None) -> State:
        """The whole weights that worker 0 has, at every island's leader."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        flat = torch.empty(sum(sizes))
        if weights is not None:
            flat = torch.cat([weights[name].detach().reshape(-1).float().cpu() for name in self._shapes])
        self._copy_of_first(flat)
        pieces = zip(self._shapes.items(), flat.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}

    def _copy_of_first(self, tensor: Tensor) -> None:
        """Make `tensor` what it is at worker 0, on all leaders: a message over each slow link."""
        if self.world.leads:
            for leader in self.leaders[1:]:
                self.world.send(tensor, leader)
        else:
            self.world.receive(tensor, self.leaders[0])


def _named_after(start: str, tensors: State) -> State:
    """Those whose names start so, without the start."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
