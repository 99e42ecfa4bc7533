"""One worker's part in training: its stage of the model, its rows of each step, its share of the state.

    rows of the step ─▶ shares ─▶ own rows ─▶ lane (passes of all micro-batches) ─▶ shards (sum over holders) ─▶ norm
                          ▲                        │ seconds                                │
                          └──── everyone's ◀───────┘                     optimizer ◀────────┘ ─▶ spread weights

The step that a crew of any layout takes is the step of a single process: all sums are divided by counts over the whole
step, and every worker sees the same losses, norm and router loads, so that all decide alike.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from motley.data.stream import NO_LOSS, PADDING, Batch, TokenStream
from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig, Transformer
from motley.parallel.communicator import Communicator
from motley.parallel.consistency import CopyCheck
from motley.parallel.expert.dispatch import ExpertParallel
from motley.parallel.full_state import State, gather, scatter
from motley.parallel.layout import Layout, coordinates_of
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.memory_fit import MemoryBudgets
from motley.parallel.pipeline.runner import PipelineRunner, build_stage
from motley.parallel.telemetry.step_stats import StepStats, measured_here
from motley.parallel.zero.flat_buffers import FlatBuffers
from motley.parallel.zero.partition import trained
from motley.parallel.zero.stage2 import Zero2, Zero3
from motley.plan.search.pool_packing import apportion
from motley.train.config import TrainingConfig
from motley.train.loss_scaler import LossScaler, culprits
from motley.train.mixed_precision import check_formats, wire_dtype
from motley.train.ngram_targets import NgramTargets, NgramCounts
from motley.train.optimizer import Optimizer, by_muon
from motley.train.step import Counts, LossWeights, StepLosses, Tally


class Worker:
    """This process among the crew.

    Args:
        config: of the whole model.
        settings: of the training stage.
        layout: who holds and computes what.
        crew: all workers; they call the same methods in the same order.
        model: the whole model with its weights, for a crew of one; None, or another crew: memory for its own stage.
        formats: that each worker computes in; None: all in fp32.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainingConfig,
        layout: Layout,
        comm: Communicator,
        model: Transformer | None = None,
        formats: Sequence[Format] | None = None,
    ) -> None:
        layout.check(config, comm.size)
        all_formats: Sequence[Format] = formats or ("fp32",) * comm.size
        check_formats(all_formats, layout)
        self.scales = LossScaler.of(all_formats)
        dtype, wire = ACTIVATIONS[all_formats[comm.rank]], wire_dtype(all_formats)
        self.config, self.settings, self.layout, self.comm = config, settings, layout, comm
        self.place = place = coordinates_of(layout, comm.rank)
        if comm.alone:
            self.model = Transformer(config).to(comm.device) if model is None else model
        else:
            self.model = build_stage(config, place, comm.device)
        self.model.compute_dtype, self.model.recompute = dtype, settings.recompute or place.group.recompute
        self.model.train_in_fp8(all_formats[comm.rank] == "fp8")
        self.weights = LossWeights(settings.mtp_weight, settings.balance_weight)
        self.depths = config.num_nextn_predict_layers if self.weights.mtp else 0
        self._form_expert_groups()
        self.shards = FlatBuffers(
            self.model, config, layout, comm, lambda name: trained(name, bool(self.depths)), settings.optimizer
        )
        self.copies = CopyCheck(self.model, self.shards, comm)
        # Where several workers update the same weights, they must do it alike.
        products = torch.bfloat16 if torch.bfloat16 in ((dtype,) if self.shards.zero else (wire,)) else torch.float32
        named = [(part.label, self.shards.view(part)) for part in self.shards.kept]
        self.optimizer = Optimizer(
            named, settings.optimizer, settings.weight_decay, products, settings.embedding_rate, settings.moments
        )
        self.replica = PipelineRunner(self.model, config, place, comm, wire)
        if layout.zero >= 2 and not comm.alone:
            exchange = Zero2 if layout.zero == 2 else Zero3
            self.replica.exchange = exchange(self.model, self.shards, watched=bool(self.scales.workers))
        self.shares = LoadBalancer(list(layout.rates or [1.0] * len(layout.replicas)))
        self.timing = StepStats()
        self.budgets: MemoryBudgets | None = None
        self.before_step: Callable[[int], None] = lambda step: None
        self._rows: list[int] = []

    @property
    def replica_tokens(self) -> int:
        """In the rows that this worker's lane took in the last step."""
        return self._rows[self.place.replica_number] * self.settings.seq_len

    @property
    def loss_scale(self) -> float:
        """This worker's own."""
        return self.scales.values[self.comm.rank]

    # ----------------------------------------------------------------------------------------------- a step

    def learn_ngrams(self, ngrams: NgramCounts) -> None:
        """Learn from these counts too, in all steps; only who holds the head needs them."""
        self.weights = replace(self.weights, hints=NgramTargets(ngrams, self.settings.ngram_share()))

    def gradient(self, stream: TokenStream, step: int, rows: range | None = None) -> tuple[StepLosses, float]:
        """(losses, gradient norm) of a step, the same on every worker; the summed gradient lies in the shards.

        rows: of the stream; None: the next batch_rows behind those of the steps before.
        """
        self.before_step(step)
        self.comm.watch.begin()
        scale = self.loss_scale
        if rows is None:
            rows = range(step * self.settings.batch_rows, (step + 1) * self.settings.batch_rows)
        self._rows = self.shares.rows(len(rows))
        batch, length = self._own_rows(stream, rows.start, self._rows), self.settings.length(step)
        own = Counts.of(batch.cut(length), self.depths) if self.place.first else Counts(0, (0,) * self.depths, 0)
        counts = own.added_up(lambda values: self.comm.sum(self.comm.outgoing(values)).cpu())
        self.shards.clear()
        confined = self.settings.confine_to_document
        tally = self.replica.run(batch, self._micro_batches(), counts, self.weights, confined, length, scale)
        made, received, received_gradient = (self.replica.broken > 0).tolist()
        overflowed = bool(self.scales.workers) and not self._own_gradient_is_finite()  # only loss scales ask who it was
        broken = [made, received, overflowed, received_gradient]
        if scale != 1 and self.replica.exchange is None:
            self.shards.scale(1 / scale)
        self.shards.reduce()
        return self._losses(tally, counts, broken), self.shards.norm()

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        """One step of the optimizer on the clipped gradient, and of the routers' biases."""
        self.shards.clip(self.settings.clip, norm)
        with self.replica.working("optimizer"):
            self.optimizer.step(learning_rate)
        self.shards.spread()
        for gate, layer in zip(self.model.gates(), self._moe_numbers(), strict=True):
            if layer < len(losses.expert_counts):
                gate.rebalance(losses.expert_counts[layer].to(self.model.device), self.settings.bias_speed)

    def share_again(self, compared_after: int | None = None) -> None:
        """Tell everyone what this worker did and how long it took, and follow that in the next step's shares.

        Rows balance what lies between two waits for everyone. Owners (ZeRO) wait for each other's updates anyway; where
        each updates all by itself, that is part of what its rows must leave time for.

        compared_after: the step after which copies of weights are compared; None: not now.
        """
        span = self.replica.span_seconds + (0.0 if self.layout.zero else self.comm.watch.seconds["optimizer"])
        own = [] if compared_after is None else self.copies.fingerprints()
        numbers = self.comm.everyone([*own, span, *measured_here(self.comm)])
        if compared_after is not None:
            self.copies.check(numbers, compared_after)
            numbers = [row[len(own) :] for row in numbers]
        spans = [row[0] for row in numbers]
        replicas = [max(spans[rank] for rank in self.layout.groups[group].replicas[replica]) for group, replica in self.layout.replicas]
        self.timing = StepStats.of(self._rows, self.layout, self.settings.seq_len, [row[1:] for row in numbers])
        rows, spent = [float(count) for count in self._rows], replicas
        number = 0
        for group in self.layout.groups:  # lanes that share experts keep step: they have one rate
            for _ in range(0, len(group.replicas), group.expert_replicas):
                group = range(number, number + group.expert_replicas)
                mean, longest = sum(rows[i] for i in group) / len(group), max(spent[i] for i in group)
                for i in group:
                    rows[i], spent[i] = mean, longest
                number += group.expert_replicas
        self.shares.measured(rows, spent)

    @torch.no_grad()
    def held_out_loss(self, stream: TokenStream, rows: int, start: int = 0) -> float:
        """Summed loss in nats of `rows` rows of a stream from row `start` on, the same on every worker."""
        self.model.eval()
        shares = apportion(rows, self.shares.rates)
        batch = self._own_rows(stream, start, shares)
        nats = self.replica.evaluate(batch, self._micro_batches(shares), self.settings.confine_to_document)
        self.model.train()
        return float(self.comm.sum(self.comm.outgoing(torch.tensor(nats, dtype=torch.float64))))

    # ----------------------------------------------------------------------------------------------- state

    def compare_copies(self, step: int) -> None:
        """Raises InputError, on every worker, where copies of weights differ after `step`."""
        if self.copies.groups:
            self.copies.check(self.comm.everyone(self.copies.fingerprints()), step)

    def whole_state(self) -> tuple[State, State] | None:
        """(weights, optimizer state) of the whole model at worker 0, None elsewhere."""
        if self.comm.alone:  # it is all here, and need not be copied
            return dict(self.model.state_dict()), self.optimizer.state_tensors()
        return gather(self.model, self.shards, self.optimizer, self.comm)

    def take_state(self, state: tuple[State, State] | None) -> None:
        """The inverse of `whole_state`; an empty optimizer state leaves the optimizer new."""
        scatter(state, self.model, self.shards, self.optimizer, self.comm)

    def fragment(self, names: Collection[str]) -> State | None:
        """These weights and buffers of the whole model at worker 0, None elsewhere."""
        found = gather(self.model, self.shards, self.optimizer, self.comm, names)
        return None if found is None else found[0]

    def take_fragment(self, weights: State | None, names: Collection[str], keep: float) -> None:
        """Move all weights and buffers `names` to those that worker 0 has, but for a share `keep` of the way."""
        scatter(
            None if weights is None else (weights, {}), self.model, self.shards, self.optimizer, self.comm, names, keep
        )

    def momentum_names(self) -> set[str]:
        """Parameters of the whole model that have a momentum: all that Muon updates."""
        with torch.device("meta"):
            whole = Transformer(self.config).named_parameters()
            return {name for name, parameter in whole if by_muon(self.settings.optimizer, name, parameter.dim())}

    # ----------------------------------------------------------------------------------------------- pieces

    def _form_expert_groups(self) -> None:
        self.comm.form(self.layout.expert_groups())
        for module in self.model.modules():
            if isinstance(module, ExpertParallel):
                module.connect(self.comm, self.place.expert_ranks)

    def _own_gradient_is_finite(self) -> bool:
        """What this worker made of the step's gradient, before anything is added to it."""
        return self.shards.finite() if self.replica.exchange is None else self.replica.exchange.finite

    def _own_rows(self, stream: TokenStream, start: int, shares: list[int]) -> Batch:
        number = self.place.replica_number
        count = shares[number]
        if count:
            return stream.rows(start + sum(shares[:number]), count)
        ids = torch.empty(0, stream.seq_len, dtype=torch.int64)
        return Batch(ids, torch.full_like(ids, NO_LOSS), torch.full_like(ids, PADDING))

    def _micro_batches(self, shares: list[int] | None = None) -> int:
        """How many this worker computes: what its rows make, or what the busiest of the lanes in step with it needs."""
        shares = shares or self._rows
        number, group = self.place.replica_number, self.place.group
        first = number - self.place.replica % group.expert_replicas
        in_step = range(len(shares)) if self.replica.exchange else range(first, first + group.expert_replicas)
        sizes = [self.layout.groups[group].micro_batch for group, _ in self.layout.replicas]
        return max(math.ceil(shares[replica] / sizes[replica]) for replica in in_step)

    def _moe_numbers(self) -> list[int]:
        """Number among the model's MoE layers (MTP's last) of each router of this stage."""
        config = self.config
        everything = range(config.num_hidden_layers + config.num_nextn_predict_layers)
        moe = [layer for layer in everything if config.is_moe_layer(layer)]
        own = set(self.place.group.stage_layers(self.place.stage))
        if self.place.last:
            own |= set(range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers))
        return [number for number, layer in enumerate(moe) if layer in own]

    def _losses(self, tally: Tally, counts: Counts, broken: list[bool]) -> StepLosses:
        """The whole step's, from everyone's part; `broken` as `culprits` reads it."""
        config = self.config
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        moe = sum(config.is_moe_layer(layer) for layer in range(layers))
        experts = config.n_routed_experts or 1
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
        used = moe if self.depths else sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        return StepLosses(main, mtp, balance, list(counted[:used]), counts.tokens, found)
