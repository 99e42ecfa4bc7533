"""One rank among several that take every step together: its rows, its stage, its parameter shards.

    all ranks    rows of the step, by the speed of each replica       ┐
    replica      its micro-batches through its pipeline               ├  gradient, the sum over all rows of the step
    holders      reduce each parameter's gradient to its owner        ┘
    owners       optimizer step; new weights to all holders
    all ranks    router bias, from the loads of the whole step

A step is what it is for one process, only that sums go over rows of several. Decisions (a broken loss, shares of rows)
are taken from numbers that all ranks have: losses, gradient norm, router loads, so all decide alike.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import RenderableType
from torch import Tensor

from motley.apportion import apportion
from motley.data.stream import NO_LOSS, PADDING, Batch, TokenStream
from motley.errors import CommunicationError
from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig
from motley.parallel.communicator import Communicator
from motley.parallel.consistency import COMPARE_EVERY, CopyCheck
from motley.parallel.expert.dispatch import ExpertParallel
from motley.parallel.full_state import gather, scatter
from motley.parallel.layout import Layout, coordinates_of
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.memory_fit import MemoryBudgets
from motley.parallel.number_formats import check_formats, wire_dtype
from motley.parallel.overflow import culprits
from motley.parallel.pipeline.runner import PipelineRunner
from motley.parallel.pipeline.stage import build_stage
from motley.parallel.telemetry.comm_bound import CommBoundWatch
from motley.parallel.telemetry.dashboard import ranks_table
from motley.parallel.telemetry.step_stats import StepStats, all_spans, introduction, is_drawn, measured_here
from motley.parallel.zero.flat_buffers import FlatBuffers
from motley.parallel.zero.stage2 import Zero2
from motley.parallel.zero.stage3 import Zero3
from motley.train.config import TrainingConfig
from motley.train.loss_scaler import LossScaler
from motley.train.ngram_targets import NgramCounts, NgramTargets
from motley.train.optimizer import Optimizer, State
from motley.train.step import Counts, LossWeights, StepLosses, Tally, is_trained
from motley.train.strategy import StepEnd, TrainingState

Result = TypeVar("Result")


@dataclass
class ToldOnce:
    """What people were told already."""

    exchange: CommBoundWatch = field(default_factory=CommBoundWatch)
    orphaned: bool = False


class Ranks:
    """A strategy (motley.train.strategy): this rank among those of `comm`.

    Args:
        shape: of the whole model.
        config: settings of the stage.
        layout: who holds and computes what.
        comm: all ranks; they call the same methods in the same order.
        formats: that each rank computes in; None: all in fp32.

    Attributes:
        told: whether remarks about the whole job are made here; DiLoCo makes its own.
    """

    count = 1

    def __init__(
        self,
        shape: ModelConfig,
        config: TrainingConfig,
        layout: Layout,
        comm: Communicator,
        formats: Sequence[Format] | None = None,
    ) -> None:
        layout.check(shape, comm.size)
        layout = layout if comm.size > 1 else replace(layout, zero=0)  # there is nobody to share with
        all_formats: Sequence[Format] = formats or ("fp32",) * comm.size
        check_formats(all_formats, layout)
        self.scaler = LossScaler.of(all_formats)
        dtype, wire = ACTIVATIONS[all_formats[comm.rank]], wire_dtype(all_formats)
        self.shape, self.config, self.layout, self.comm = shape, config, layout, comm
        self.coordinates = coordinates = coordinates_of(layout, comm.rank)
        self.model = build_stage(shape, coordinates, comm.device)
        self.model.compute_dtype = dtype
        self.model.recompute = config.recompute or coordinates.group.recompute
        self.model.train_in_fp8(all_formats[comm.rank] == "fp8")
        self.weights = LossWeights(config.mtp_weight, config.balance_weight)
        self.depths = shape.num_nextn_predict_layers if self.weights.mtp else 0
        self._connect_experts()
        mtp = bool(self.depths)
        self.buffers = FlatBuffers(
            self.model, shape, layout, comm, lambda name: is_trained(name, mtp), config.optimizer
        )
        self.copies = CopyCheck(self.model, self.buffers, comm)
        # Ranks that update copies of the same weights must do it alike, so products take the wire's format there.
        products = torch.bfloat16 if torch.bfloat16 in ((dtype,) if self.buffers.zero else (wire,)) else torch.float32
        named = [(shard.label, self.buffers.view(shard)) for shard in self.buffers.kept]
        self.optimizer = Optimizer(
            named, config.optimizer, config.weight_decay, products, config.embedding_rate, config.moments
        )
        self.runner = PipelineRunner(self.model, shape, coordinates, comm, wire)
        if layout.zero >= 2:
            units = Zero2 if layout.zero == 2 else Zero3
            self.runner.zero = units(self.model, self.buffers, watched=bool(self.scaler.ranks))
        self.balancer = LoadBalancer(list(layout.rates or [1.0] * len(layout.replicas)))
        self.stats = StepStats()
        self.budgets: MemoryBudgets | None = None
        self.before_step: Callable[[int], None] = lambda step: None
        self.told: ToldOnce | None = ToldOnce()
        self._rows: list[int] = []
        self._length = config.seq_len

    @property
    def leads(self) -> bool:
        return self.comm.leads

    @property
    def micro_batch(self) -> int:
        return self.coordinates.group.micro_batch

    @property
    def holds_head(self) -> bool:
        """Whether this rank's stage computes the loss."""
        return self.coordinates.last

    @property
    def replica_tokens(self) -> int:
        """In the rows that this rank's replica took in the last step."""
        return self._rows[self.coordinates.replica_number] * self.config.seq_len

    def learn_ngrams(self, counts: NgramCounts) -> None:
        """Blend n-gram soft targets in, in all steps; only the stage that holds the head needs them."""
        self.weights = replace(self.weights, ngrams=NgramTargets(counts, self.config.ngram_share()))

    # ------------------------------------------------------------------------------------------------ a step

    def read(self, stream: TokenStream, step: int) -> Batch:
        rows = self.config.batch_rows
        return self.read_rows(stream, step, range(step * rows, (step + 1) * rows))

    def read_rows(self, stream: TokenStream, step: int, rows: range) -> Batch:
        """This rank's share of some rows of the stream, which are a step of all these ranks."""
        self.before_step(step)
        self.comm.timer.begin()
        self._rows, self._length = self.balancer.rows(len(rows)), self.config.length(step)
        return self._own_rows(stream, rows.start, self._rows)

    def gradient(self, batch: Batch) -> tuple[StepLosses, float]:
        scale, length = self.scaler.values[self.comm.rank], self._length
        first = self.coordinates.first
        own = Counts.of(batch.cut(length), self.depths) if first else Counts(0, (0,) * self.depths, 0)
        counts = own.added_up(lambda values: self.comm.sum(self.comm.outgoing(values)).cpu())
        self.buffers.clear()
        confined = self.config.confine_to_document
        tally = self.runner.run(batch, self._micro_batches(), counts, self.weights, confined, length, scale)
        made, received, received_gradient = (self.runner.broken > 0).tolist()
        overflowed = bool(self.scaler.ranks) and not self._own_gradient_is_finite()  # only loss scales ask where it was
        if scale != 1 and self.runner.zero is None:
            self.buffers.scale(1 / scale)
        self.buffers.reduce()
        losses = self._whole_losses(tally, counts, [made, received, overflowed, received_gradient])
        return losses, self.buffers.norm()

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        self.buffers.clip(self.config.clip, norm)
        with self.runner.working("optimizer"):
            self.optimizer.step(learning_rate)
        self.buffers.broadcast_weights()
        for gate, layer in zip(self.model.gates(), self._moe_numbers(), strict=True):
            if layer < len(losses.expert_counts):
                gate.rebalance(losses.expert_counts[layer].to(self.model.device), self.config.bias_speed)

    def finish_step(self, step: int, losses: StepLosses, learned: bool, seconds: Callable[[], float]) -> StepEnd:
        end = StepEnd(step + 1, losses.tokens, sum(self._rows))
        if (lost := self.balance_rows(step, step + 1)) is not None:
            end.lost = lost
            return end
        end.records = (
            []
            if self.comm.alone
            else [
                ("step_stats", {**self.stats.numbers(), "loss_scales": self.scaler.values}),
                *self.drawn_spans(step + 1),
            ]
        )
        end.remarks, end.busy = self._remarks(), self.stats.own_seconds
        return end

    def balance_rows(self, step: int, reached: int) -> CommunicationError | None:
        """Exchange how long everybody took, and share out the next step's rows by it.

        Returns the error of a rank that exited: the step is learned, and has to be written down first.

        step, reached: of the run, before and after this step; copies of weights are compared now and then.
        """
        compare = step // COMPARE_EVERY < reached // COMPARE_EVERY
        try:
            self.share_rows(reached if compare else None)
        except CommunicationError as error:
            return error
        return None

    def drawn_spans(self, reached: int) -> list[tuple[str, Mapping[str, Any]]]:
        """Of one step out of many, what every rank did when, for a picture."""
        if not is_drawn(reached, self.config.steps):
            return []
        seconds = self.stats.step_seconds
        return [("timeline", {"step_seconds": seconds, "spans": all_spans(self.comm, seconds)})]

    def share_rows(self, compared_after: int | None = None) -> None:
        """Tell everyone how long this rank worked, and share out the next step's rows by what all tell.

        Rows balance what lies between two waits for everyone. Owners (ZeRO) wait for each other's updates anyway; where
        each updates all by itself, that is part of what its rows must leave time for.

        compared_after: the step after which copies of weights are compared; None: not now.
        """
        span = self.runner.span_seconds + (0.0 if self.layout.zero else self.comm.timer.seconds["optimizer"])
        own = [] if compared_after is None else self.copies.checksums()
        numbers = self.comm.everyone([*own, span, *measured_here(self.comm)])
        if compared_after is not None:
            self.copies.check(numbers, compared_after)
            numbers = [row[len(own) :] for row in numbers]
        spans = [row[0] for row in numbers]
        self.stats = StepStats.of(self._rows, self.layout, self.config.seq_len, [row[1:] for row in numbers])
        replicas = self.layout.replicas
        spent = [max(spans[rank] for rank in self.layout.groups[group].replicas[number]) for group, number in replicas]
        rows = [float(count) for count in self._rows]
        number = 0
        for group in self.layout.groups:  # replicas that share experts keep step: they have one rate
            for _ in range(0, len(group.replicas), group.expert_replicas):
                together = range(number, number + group.expert_replicas)
                mean, longest = sum(rows[i] for i in together) / len(together), max(spent[i] for i in together)
                for i in together:
                    rows[i], spent[i] = mean, longest
                number += group.expert_replicas
        self.balancer.measured(rows, spent)

    def _remarks(self) -> list[str]:
        said = self.budgets.exceeded(self.stats.memory) if self.budgets else []
        if self.told is not None:
            said += self.told.exchange.complaint(self.stats, self.config) if self.comm.size > 1 else []
            if self.comm.orphaned and not self.told.orphaned:
                self.told.orphaned = True
                said.append("torchrun exited: the ranks go on, but nothing would start them again")
        return said

    def held_out_loss(self, stream: TokenStream, rows: int) -> float:
        return self.held_out_rows(stream, rows, 0)

    @torch.no_grad()
    def held_out_rows(self, stream: TokenStream, rows: int, start: int) -> float:
        """Summed loss in nats of `rows` rows of a stream from row `start` on, the same on every rank."""
        self.model.eval()
        shares = apportion(rows, self.balancer.rates)
        batch = self._own_rows(stream, start, shares)
        nats = self.runner.evaluate(batch, self._micro_batches(shares), self.config.confine_to_document)
        self.model.train()
        return float(self.comm.sum(self.comm.outgoing(torch.tensor(nats, dtype=torch.float64))))

    # --------------------------------------------------------------------------------------------- agreement

    def stopping(self, asked: bool) -> bool:
        return self.comm.stopping(asked)

    def agree(self, holds: bool) -> bool:
        return holds  # all decide from the same numbers

    def led(self, work: Callable[[], Result]) -> Result:
        return self.comm.led(work)

    def check_copies(self, step: int) -> None:
        if self.copies.groups:
            self.copies.check(self.comm.everyone(self.copies.checksums()), step)

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> TrainingState | None:
        found = gather(self.model, self.buffers, self.optimizer, self.comm)
        return None if found is None else TrainingState(*found)

    def load(self, saved: TrainingState | None, facts: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        self.take_state(None if saved is None else (saved.weights, saved.optimizer))
        return facts

    def take_state(self, state: tuple[State, State] | None) -> None:
        """Take over (weights, optimizer state) that rank 0 has (None elsewhere); an empty optimizer state leaves the
        optimizer new."""
        scatter(state, self.model, self.buffers, self.optimizer, self.comm)

    def fragment(self, names: Collection[str]) -> State | None:
        """These weights and buffers of the whole model at rank 0, None elsewhere."""
        found = gather(self.model, self.buffers, self.optimizer, self.comm, names)
        return None if found is None else found[0]

    def take_fragment(self, weights: State | None, names: Collection[str], keep: float) -> None:
        """Move all weights and buffers `names` to those that rank 0 has, but for a share `keep` of the way."""
        state = None if weights is None else (weights, {})
        scatter(state, self.model, self.buffers, self.optimizer, self.comm, names, keep)

    def save_own(self, run: Path, step: int, facts: Mapping[str, Any]) -> None: ...

    def prune_own(self, run: Path, kept: Callable[[], Sequence[str]]) -> None: ...

    # --------------------------------------------------------------------------------------------- telemetry

    def introduction(self) -> dict[str, Any] | None:
        if self.comm.alone:
            return None
        return introduction(self.comm, self.coordinates, self.config.batch_rows, self.config.plan is not None)

    def dashboard(self, about: Mapping[str, Any]) -> RenderableType:
        return ranks_table(about, self.stats)

    # ------------------------------------------------------------------------------------------------ pieces

    def _connect_experts(self) -> None:
        self.comm.form(self.layout.expert_groups())
        for module in self.model.modules():
            if isinstance(module, ExpertParallel):
                module.connect(self.comm, self.coordinates.expert_ranks)

    def _own_gradient_is_finite(self) -> bool:
        """What this rank made of the step's gradient, before anything is added to it."""
        return self.buffers.finite() if self.runner.zero is None else self.runner.zero.finite

    def _own_rows(self, stream: TokenStream, start: int, shares: list[int]) -> Batch:
        number = self.coordinates.replica_number
        if count := shares[number]:
            return stream.rows(start + sum(shares[:number]), count)
        ids = torch.empty(0, stream.seq_len, dtype=torch.int64)
        return Batch(ids, torch.full_like(ids, NO_LOSS), torch.full_like(ids, PADDING))

    def _micro_batches(self, shares: list[int] | None = None) -> int:
        """How many this rank computes: as its rows need, or those of the busiest replica in step with it."""
        shares = shares or self._rows
        number, group = self.coordinates.replica_number, self.coordinates.group
        first = number - self.coordinates.replica % group.expert_replicas
        in_step = range(len(shares)) if self.runner.zero else range(first, first + group.expert_replicas)
        sizes = [self.layout.groups[group].micro_batch for group, _ in self.layout.replicas]
        return max(math.ceil(shares[replica] / sizes[replica]) for replica in in_step)

    def _moe_numbers(self) -> list[int]:
        """Number among the model's MoE layers (MTP's last) of each router of this stage."""
        shape = self.shape
        everything = range(shape.num_hidden_layers + shape.num_nextn_predict_layers)
        moe = [layer for layer in everything if shape.is_moe_layer(layer)]
        own = set(self.coordinates.group.stage_layers(self.coordinates.stage))
        if self.coordinates.last:
            own |= set(range(shape.num_hidden_layers, shape.num_hidden_layers + shape.num_nextn_predict_layers))
        return [number for number, layer in enumerate(moe) if layer in own]

    def _whole_losses(self, tally: Tally, counts: Counts, broken: list[bool]) -> StepLosses:
        """Those of the whole step, from every rank's part; `broken` as `culprits` reads it."""
        shape = self.shape
        layers = shape.num_hidden_layers + shape.num_nextn_predict_layers
        moe = sum(shape.is_moe_layer(layer) for layer in range(layers))
        experts = shape.n_routed_experts or 1
        loads = torch.zeros(moe, experts, dtype=torch.float64)
        for number, load in zip(self._moe_numbers(), tally.expert_counts, strict=False):
            loads[number] = load.double().cpu()
        sums = torch.stack([tally.main, tally.mtp, tally.balance]).double().cpu()
        seen = torch.zeros(self.comm.size, len(broken), dtype=torch.float64)
        seen[self.comm.rank] = torch.tensor(broken)
        total: Tensor = self.comm.sum(self.comm.outgoing(torch.cat([sums, seen.flatten(), loads.flatten()]))).cpu()
        sums, seen, counted = total.split([len(sums), seen.numel(), loads.numel()])
        main, mtp, balance = sums.tolist()
        counted = counted.view(moe, experts).long()
        found = culprits(seen.view(self.comm.size, len(broken)), self.layout.expert_groups())
        used = moe if self.depths else sum(shape.is_moe_layer(layer) for layer in range(shape.num_hidden_layers))
        return StepLosses(main, mtp, balance, list(counted[:used]), counts.tokens, found)
