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
from motley.parallel.communicator import Crew
from motley.parallel.consistency import Copies
from motley.parallel.expert.dispatch import SpreadExperts
from motley.parallel.full_state import State, gather, scatter
from motley.parallel.layout import Layout, place_of
from motley.parallel.load_balance import Shares
from motley.parallel.memory_fit import Budgets
from motley.parallel.pipeline.runner import Lane, build_stage
from motley.parallel.telemetry.step_stats import Timing, measured_here
from motley.parallel.zero.flat_buffers import Shards
from motley.parallel.zero.partition import trained
from motley.parallel.zero.stage2 import Turns, Visits
from motley.plan.search.pool_packing import apportion
from motley.train.config import TrainingConfig
from motley.train.loss_scaler import LossScales, culprits
from motley.train.mixed_precision import check_formats, wire_dtype
from motley.train.ngram_targets import Hints, Ngrams
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
        crew: Crew,
        model: Transformer | None = None,
        formats: Sequence[Format] | None = None,
    ) -> None:
        layout.check(config, crew.size)
        all_formats: Sequence[Format] = formats or ("fp32",) * crew.size
        check_formats(all_formats, layout)
        self.scales = LossScales.of(all_formats)
        dtype, wire = ACTIVATIONS[all_formats[crew.rank]], wire_dtype(all_formats)
        self.config, self.settings, self.layout, self.crew = config, settings, layout, crew
        self.place = place = place_of(layout, crew.rank)
        if crew.alone:
            self.model = Transformer(config).to(crew.device) if model is None else model
        else:
            self.model = build_stage(config, place, crew.device)
        self.model.compute_dtype, self.model.recompute = dtype, settings.recompute or place.team.recompute
        self.model.train_in_fp8(all_formats[crew.rank] == "fp8")
        self.weights = LossWeights(settings.mtp_weight, settings.balance_weight)
        self.depths = config.num_nextn_predict_layers if self.weights.mtp else 0
        self._form_expert_groups()
        self.shards = Shards(
            self.model, config, layout, crew, lambda name: trained(name, bool(self.depths)), settings.optimizer
        )
        self.copies = Copies(self.model, self.shards, crew)
        # Where several workers update the same weights, they must do it alike.
        products = torch.bfloat16 if torch.bfloat16 in ((dtype,) if self.shards.zero else (wire,)) else torch.float32
        named = [(part.label, self.shards.view(part)) for part in self.shards.kept]
        self.optimizer = Optimizer(
            named, settings.optimizer, settings.weight_decay, products, settings.embedding_rate, settings.moments
        )
        self.lane = Lane(self.model, config, place, crew, wire)
        if layout.zero >= 2 and not crew.alone:
            turns = Turns if layout.zero == 2 else Visits
            self.lane.turns = turns(self.model, self.shards, watched=bool(self.scales.workers))
        self.shares = Shares(list(layout.rates or [1.0] * len(layout.lanes)))
        self.timing = Timing()
        self.budgets: Budgets | None = None
        self.before_step: Callable[[int], None] = lambda step: None
        self._rows: list[int] = []

    @property
    def lane_tokens(self) -> int:
        """In the rows that this worker's lane took in the last step."""
        return self._rows[self.place.lane_number] * self.settings.seq_len

    @property
    def loss_scale(self) -> float:
        """This worker's own."""
        return self.scales.values[self.crew.rank]

    # ----------------------------------------------------------------------------------------------- a step

    def take_hints(self, ngrams: Ngrams) -> None:
        """Learn from these counts too, in all steps; only who holds the head needs them."""
        self.weights = replace(self.weights, hints=Hints(ngrams, self.settings.hint_weight()))

    def gradient(self, stream: TokenStream, step: int, rows: range | None = None) -> tuple[StepLosses, float]:
        """(losses, gradient norm) of a step, the same on every worker; the summed gradient lies in the shards.

        rows: of the stream; None: the next batch_rows behind those of the steps before.
        """
        self.before_step(step)
        self.crew.watch.begin()
        scale = self.loss_scale
        if rows is None:
            rows = range(step * self.settings.batch_rows, (step + 1) * self.settings.batch_rows)
        self._rows = self.shares.rows(len(rows))
        batch, length = self._own_rows(stream, rows.start, self._rows), self.settings.length(step)
        own = Counts.of(batch.cut(length), self.depths) if self.place.first else Counts(0, (0,) * self.depths, 0)
        counts = own.added_up(lambda values: self.crew.sum(self.crew.outgoing(values)).cpu())
        self.shards.clear()
        confined = self.settings.confine_to_document
        tally = self.lane.run(batch, self._micro_batches(), counts, self.weights, confined, length, scale)
        made, received, received_gradient = (self.lane.broken > 0).tolist()
        overflowed = bool(self.scales.workers) and not self._own_gradient_is_finite()  # only loss scales ask who it was
        broken = [made, received, overflowed, received_gradient]
        if scale != 1 and self.lane.turns is None:
            self.shards.scale(1 / scale)
        self.shards.reduce()
        return self._losses(tally, counts, broken), self.shards.norm()

    def update(self, losses: StepLosses, norm: float, learning_rate: float) -> None:
        """One step of the optimizer on the clipped gradient, and of the routers' biases."""
        self.shards.clip(self.settings.clip, norm)
        with self.lane.working("optimizer"):
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
        span = self.lane.span_seconds + (0.0 if self.layout.zero else self.crew.watch.seconds["optimizer"])
        own = [] if compared_after is None else self.copies.fingerprints()
        numbers = self.crew.everyone([*own, span, *measured_here(self.crew)])
        if compared_after is not None:
            self.copies.check(numbers, compared_after)
            numbers = [row[len(own) :] for row in numbers]
        spans = [row[0] for row in numbers]
        lanes = [max(spans[rank] for rank in self.layout.teams[team].lanes[lane]) for team, lane in self.layout.lanes]
        self.timing = Timing.of(self._rows, self.layout, self.settings.seq_len, [row[1:] for row in numbers])
        rows, spent = [float(count) for count in self._rows], lanes
        number = 0
        for team in self.layout.teams:  # lanes that share experts keep step: they have one rate
            for _ in range(0, len(team.lanes), team.expert_lanes):
                group = range(number, number + team.expert_lanes)
                mean, longest = sum(rows[i] for i in group) / len(group), max(spent[i] for i in group)
                for i in group:
                    rows[i], spent[i] = mean, longest
                number += team.expert_lanes
        self.shares.measured(rows, spent)

    @torch.no_grad()
    def held_out_loss(self, stream: TokenStream, rows: int, start: int = 0) -> float:
        """Summed loss in nats of `rows` rows of a stream from row `start` on, the same on every worker."""
        self.model.eval()
        shares = apportion(rows, self.shares.rates)
        batch = self._own_rows(stream, start, shares)
        nats = self.lane.evaluate(batch, self._micro_batches(shares), self.settings.confine_to_document)
        self.model.train()
        return float(self.crew.sum(self.crew.outgoing(torch.tensor(nats, dtype=torch.float64))))

    # ----------------------------------------------------------------------------------------------- state

    def compare_copies(self, step: int) -> None:
        """Raises InputError, on every worker, where copies of weights differ after `step`."""
        if self.copies.groups:
            self.copies.check(self.crew.everyone(self.copies.fingerprints()), step)

    def whole_state(self) -> tuple[State, State] | None:
        """(weights, optimizer state) of the whole model at worker 0, None elsewhere."""
        if self.crew.alone:  # it is all here, and need not be copied
            return dict(self.model.state_dict()), self.optimizer.state_tensors()
        return gather(self.model, self.shards, self.optimizer, self.crew)

    def take_state(self, state: tuple[State, State] | None) -> None:
        """The inverse of `whole_state`; an empty optimizer state leaves the optimizer new."""
        scatter(state, self.model, self.shards, self.optimizer, self.crew)

    def fragment(self, names: Collection[str]) -> State | None:
        """These weights and buffers of the whole model at worker 0, None elsewhere."""
        found = gather(self.model, self.shards, self.optimizer, self.crew, names)
        return None if found is None else found[0]

    def take_fragment(self, weights: State | None, names: Collection[str], keep: float) -> None:
        """Move all weights and buffers `names` to those that worker 0 has, but for a share `keep` of the way."""
        scatter(
            None if weights is None else (weights, {}), self.model, self.shards, self.optimizer, self.crew, names, keep
        )

    def momentum_names(self) -> set[str]:
        """Parameters of the whole model that have a momentum: all that Muon updates."""
        with torch.device("meta"):
            whole = Transformer(self.config).named_parameters()
            return {name for name, parameter in whole if by_muon(self.settings.optimizer, name, parameter.dim())}

    # ----------------------------------------------------------------------------------------------- pieces

    def _form_expert_groups(self) -> None:
        self.crew.form(self.layout.expert_groups())
        for module in self.model.modules():
            if isinstance(module, SpreadExperts):
                module.connect(self.crew, self.place.expert_ranks)

    def _own_gradient_is_finite(self) -> bool:
        """What this worker made of the step's gradient, before anything is added to it."""
        return self.shards.finite() if self.lane.turns is None else self.lane.turns.finite

    def _own_rows(self, stream: TokenStream, start: int, shares: list[int]) -> Batch:
        number = self.place.lane_number
        count = shares[number]
        if count:
            return stream.rows(start + sum(shares[:number]), count)
        ids = torch.empty(0, stream.seq_len, dtype=torch.int64)
        return Batch(ids, torch.full_like(ids, NO_LOSS), torch.full_like(ids, PADDING))

    def _micro_batches(self, shares: list[int] | None = None) -> int:
        """How many this worker computes: what its rows make, or what the busiest of the lanes in step with it needs."""
        shares = shares or self._rows
        number, team = self.place.lane_number, self.place.team
        first = number - self.place.lane % team.expert_lanes
        in_step = range(len(shares)) if self.lane.turns else range(first, first + team.expert_lanes)
        sizes = [self.layout.teams[team].micro_batch for team, _ in self.layout.lanes]
        return max(math.ceil(shares[lane] / sizes[lane]) for lane in in_step)

    def _moe_numbers(self) -> list[int]:
        """Number among the model's MoE layers (MTP's last) of each router of this stage."""
        config = self.config
        everything = range(config.num_hidden_layers + config.num_nextn_predict_layers)
        moe = [layer for layer in everything if config.is_moe_layer(layer)]
        own = set(self.place.team.stage_layers(self.place.stage))
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
        seen = torch.zeros(self.crew.size, len(broken), dtype=torch.float64)
        seen[self.crew.rank] = torch.tensor(broken)
        total: Tensor = self.crew.sum(self.crew.outgoing(torch.cat([sums, seen.flatten(), loads.flatten()]))).cpu()
        sums, seen, counted = total.split([len(sums), seen.numel(), loads.numel()])
        main, mtp, balance = sums.tolist()
        counted = counted.view(moe, experts).long()
        found = culprits(seen.view(self.crew.size, len(broken)), self.layout.expert_groups())
        used = moe if self.depths else sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        return StepLosses(main, mtp, balance, list(counted[:used]), counts.tokens, found)
