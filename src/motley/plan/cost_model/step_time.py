"""Seconds of one optimizer step of a layout on equal chips.

|F F F F|B F B F B F ...|B B B B|  all-reduce  optimizer       1F1B, m micro-batches over p stages
step = (m - 1) x slowest stage + sum of stages (x what the schedule leaves of its bubble)
     + exposed gradient exchange + optimizer + fixed cost
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from motley.plan.cost_model.configs import SCHEDULES, Floats, Ints, ParallelConfigs
from motley.plan.cost_model.framework import Framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.cost_model.operators import (
    VALUE_BYTES,
    LayerSeconds,
    embedding_seconds,
    head_seconds,
    layer_seconds,
    mtp_seconds,
    muon_seconds,
    summed,
)
from motley.plan.cost_model.stage_balance import balanced
from motley.plan.network.spec import BlockSpec, NetworkSpec


@dataclass(frozen=True)
class StepSeconds:
    """Arrays [candidates] of seconds; they add up to `total`."""

    compute: Floats
    communication: Floats
    bubble: Floats
    optimizer: Floats

    @property
    def total(self) -> Floats:
        return self.compute + self.communication + self.bubble + self.optimizer


@dataclass(frozen=True)
class HeldParameters:
    """What a piece, or a stage of them, holds before any parallelism, in dense parts and in routed experts.

    `muon` seconds: orthogonalising its updates on one chip. Numbers, or arrays of candidates.
    """

    dense: Floats | float
    experts: Floats | float
    dense_muon: Floats | float = 0.0
    expert_muon: Floats | float = 0.0

    def __add__(self, other: "HeldParameters") -> "HeldParameters":
        return HeldParameters(
            self.dense + other.dense,
            self.experts + other.experts,
            self.dense_muon + other.dense_muon,
            self.expert_muon + other.expert_muon,
        )

    def __mul__(self, factor: Floats | float) -> "HeldParameters":
        return HeldParameters(
            self.dense * factor, self.experts * factor, self.dense_muon * factor, self.expert_muon * factor
        )


PieceKind = tuple[str, BlockSpec | None]
"""What a piece is ("embedding", "layer", "mtp", "head"), and its layer if it has one."""


@dataclass(frozen=True)
class NetworkPieces:
    """The pieces that stages are made of, in order: embedding, layers, MTP modules, head. Seconds per micro-batch.

    `kinds[i]` is (what, block or None); equal kinds share their arrays. The last `together` pieces are never parted.
    """

    kinds: tuple[PieceKind, ...]
    seconds: tuple[LayerSeconds, ...]
    held: tuple["HeldParameters", ...]
    together: int

    def cut(self, pp: int, framework: Framework, candidate: int) -> list[slice]:
        """The stages into which a framework cuts them for a candidate."""
        if not framework.balanced_stages or pp == 1:
            return even_stages(self, pp)
        return balanced([float(piece.total[candidate]) for piece in self.seconds], pp, self.together)

    def held_by_stage(self, cut: list[slice], shape: NetworkSpec) -> list[HeldParameters]:
        """Parameters of each stage. On a single one, a tied head and the embedding are one table."""
        held = [sum(self.held[part], start=HeldParameters(0.0, 0.0)) for part in cut]
        if shape.tied and len(cut) == 1:
            held[0] = held[0] + HeldParameters(-float(shape.head.parameters), 0.0)
        return held


def network_pieces(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework, precision: str
) -> NetworkPieces:
    """Cost every piece of the network once per kind."""
    costed: dict[BlockSpec, LayerSeconds] = {
        block: layer_seconds(block, shape, configs, seq, hardware, framework, precision) for block, _ in shape.runs
    }
    kinds: list[PieceKind] = [("embedding", None)]
    seconds = [embedding_seconds(shape, configs, seq, hardware, framework)]
    held = [HeldParameters(float(shape.embedding_parameters), 0.0)]
    for block in shape.blocks:
        kinds.append(("layer", block))
        seconds.append(costed[block])
        held.append(_held_parameters(block, hardware, framework, precision))
    for block in shape.mtp:
        kinds.append(("mtp", block))
        seconds.append(mtp_seconds(block, shape, configs, seq, hardware, framework, precision))
        around = shape.mtp_projection().parameters + 3 * shape.hidden_size
        held.append(_held_parameters(block, hardware, framework, precision) + HeldParameters(float(around), 0.0))
    kinds.append(("head", None))
    seconds.append(head_seconds(shape, configs, seq, hardware, framework, precision))
    # A tied head is the embedding's table: the last stage keeps a copy of it when the first is another one.
    held.append(HeldParameters(float(shape.head.parameters) + shape.final_norm, 0.0))
    together = 1 + len(shape.mtp) if framework.mtp_with_head else 1
    return NetworkPieces(tuple(kinds), tuple(seconds), tuple(held), together)


def _held_parameters(block: BlockSpec, hardware: Hardware, framework: Framework, precision: str) -> HeldParameters:
    experts = float(block.expert_parameters)
    return HeldParameters(block.parameters - experts, experts, *muon_seconds(block, hardware, framework, precision))


def even_stages(pieces: NetworkPieces, pp: int) -> list[slice]:
    """Megatron's split: equal numbers of layers, one more on the first stages where they do not divide."""
    layers = sum(1 for what, _ in pieces.kinds if what == "layer")
    base, extra = divmod(layers, pp)
    bounds = np.cumsum([0] + [base + (stage < extra) for stage in range(pp)]) + 1
    bounds[0], bounds[-1] = 0, len(pieces.kinds)
    return [slice(int(start), int(stop)) for start, stop in pairwise(bounds)]


def step_seconds(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework, precision: str
) -> StepSeconds:
    """Steps of layouts, cut into stages as the framework does. All layouts must share the same `pp`."""
    pp = int(configs.pp[0])
    if not (configs.pp == pp).all():
        raise ValueError("step_seconds takes layouts of one pipeline depth at a time")
    pieces = network_pieces(shape, configs, seq, hardware, framework, precision)
    if not framework.balanced_stages or pp == 1:
        return _of_stages(shape, configs, hardware, framework, pieces, pieces.cut(pp, framework, 0), seq)
    rows = []
    for index in range(len(configs)):
        cut = pieces.cut(pp, framework, index)
        own = replace(pieces, seconds=tuple(piece.at(index) for piece in pieces.seconds))
        rows.append(_of_stages(shape, configs[index], hardware, framework, own, cut, seq))
    names = ("compute", "communication", "bubble", "optimizer")
    return StepSeconds(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))


def _of_stages(
    shape: NetworkSpec,
    configs: ParallelConfigs,
    hardware: Hardware,
    framework: Framework,
    pieces: NetworkPieces,
    cut: list[slice],
    seq: int,
) -> StepSeconds:
    total = [summed(pieces.seconds[part]) for part in cut]
    return combine(shape, configs, seq, hardware, framework, total, pieces.held_by_stage(cut, shape))


def combine(
    shape: NetworkSpec,
    configs: ParallelConfigs,
    seq: int,
    hardware: Hardware,
    framework: Framework,
    stages: list[LayerSeconds],
    held: list[HeldParameters],
) -> StepSeconds:
    """From seconds per micro-batch and stage to the whole step."""
    pp, m = len(stages), configs.micro_batches.astype(np.float64)
    tokens = configs.micro_batch * seq / configs.cp
    if pp > 1 and (configs.schedule == SCHEDULES.index("dualpipe")).all():
        # A chip holds stages i and p-1-i, and works on both directions in turn.
        stages = [(stage + twin) * 0.5 for stage, twin in zip(stages, reversed(stages), strict=True)]
        held = [(own + twin) * 0.5 for own, twin in zip(held, reversed(held), strict=True)]
    slowest = np.max([stage.total for stage in stages], axis=0)
    busiest = stages[int(np.argmax([float(np.max(stage.total)) for stage in stages]))]
    compute = m * (busiest.forward + busiest.backward)
    exposed = m * busiest.communication
    uneven = m * slowest - compute - exposed
    hop = np.zeros(len(configs))
    if pp > 1:
        message = tokens * shape.hidden_size * VALUE_BYTES / configs.tp
        one = hardware.send(message, _stages_leave_node(configs, hardware), framework)
        hop = 2 * (pp - 1) * one
        slowest = np.maximum(slowest, one)  # messages run beside computing, unless the link is slower than that
    free = slowest - np.max([stage.hidden for stage in stages], axis=0)
    gradients = gradient_seconds(shape, configs, hardware, framework, held, m * slowest, np.maximum(free, 0.0))
    nodes = np.maximum(configs.chips / hardware.chips_per_node, 1)
    waiting = (compute + exposed) * framework.skew * np.log2(nodes)
    return StepSeconds(
        compute,
        exposed + hop + gradients + waiting,
        bubble_seconds(configs, stages) + np.maximum(uneven, 0),
        optimizer_seconds(shape, configs, hardware, framework, held),
    )


def _stages_leave_node(configs: ParallelConfigs, hardware: Hardware) -> NDArray[np.bool_]:
    """Whether neighbouring stages sit on different nodes: pipelines are the outermost dimension."""
    return configs.tp * configs.cp * configs.dp >= hardware.chips_per_node


def bubble_seconds(configs: ParallelConfigs, stages: list[LayerSeconds]) -> Floats:
    """Idle seconds of the pipeline's schedule.

    1F1B: (p-1)(F+B), cut by interleaved chunks; zero bubble: `zero_bubble_seconds`; DualPipe: (p/2-1)(F&B+B-3W), with
    B the whole backward pass and F&B a forward and a backward that overlap (DualPipe README; V3 report, table 2).
    """
    pp = len(stages)
    if pp == 1:
        return np.zeros(len(configs))
    mean = summed(stages) * (1 / pp)
    slowest = np.max([stage.total for stage in stages], axis=0)
    through = np.sum([stage.total for stage in stages], axis=0)
    whole = through - slowest  # (p-1)(F+B) when stages are equal
    weight = np.minimum(mean.weight, mean.total / 3)
    both, backward = mean.total, mean.backward + mean.communication / 2
    dual = np.maximum((pp / 2 - 1) * (both + backward - 3 * weight), 0.0)
    once = configs.schedule == SCHEDULES.index("1f1b")
    zero = configs.schedule == SCHEDULES.index("zero_bubble")
    unequal = zero_bubble_seconds(configs, stages) if zero.any() else dual
    return np.select([once, zero], [whole / configs.chunks, unequal], dual)


def zero_bubble_seconds(configs: ParallelConfigs, stages: list[LayerSeconds]) -> Floats:
    """Idle seconds of unequal stages under ZB-H1, with at least as many micro-batches as stages.

    Of the paths through each stage s, with F, B, W its forward pass and the gradients of inputs and of weights:

        F of earlier stages | hole | m (F + B + W) | hole | B and W of the first, beside which s does what W it put off

    A hole is what a micro-batch needs to go through later stages and back, less what stage s does meanwhile. Exact for
    two stages, a few percent low for more; for equal ones (p-1)(F+B-W), as in Zero Bubble Pipeline Parallelism
    (arXiv 2401.10241).
    """
    pp = len(stages)
    total = np.stack([stage.total for stage in stages])
    weight = np.minimum(np.stack([stage.weight for stage in stages]), total / 3)
    forward = np.stack([stage.forward + stage.communication / 3 for stage in stages])
    inputs = total - forward - weight
    number = np.arange(pp)[:, None]
    behind, m = pp - 1 - number, np.maximum(configs.micro_batches, pp)

    def earlier(values: Floats) -> Floats:
        """Of each stage: the sum over those before it."""
        return np.cumsum(values, axis=0) - values

    round_trip = np.sum(forward + inputs, axis=0) - np.cumsum(forward + inputs, axis=0)
    filling = np.maximum(round_trip - behind * forward, 0.0)
    draining = np.maximum(round_trip - behind * (inputs + weight), 0.0)
    last = np.maximum(earlier(inputs) + weight[0] - (number + 1) * weight, 0.0) * (number > 0)
    paths = earlier(forward) + filling + m * total + draining + last
    return np.max(paths, axis=0) - m * np.max(total, axis=0)


def gradient_seconds(
    shape: NetworkSpec,
    configs: ParallelConfigs,
    hardware: Hardware,
    framework: Framework,
    held: list[HeldParameters],
    behind: Floats,
    free: Floats,
) -> Floats:
    """What the exchange of gradients over the data-parallel group adds to the step (busiest stage).

    It hides behind `behind`, the seconds of computing in the step; what ZeRO-3 gathers for each micro-batch only
    behind `free`, those of one micro-batch that hide nothing else yet.
    """
    once = np.zeros(len(configs))
    each = np.zeros(len(configs))
    for stage in held:
        one, every = exchange_seconds(stage, configs, hardware, framework)
        once, each = np.maximum(once, one), np.maximum(each, every)
    sharded = configs.micro_batches * (each - framework.hidden_shards * np.minimum(each, free))
    return (
        sharded
        + once
        - framework.hidden_gradients * np.minimum(once, behind)
        + tied_seconds(shape, configs, hardware, framework)
    )


def exchange_seconds(
    held: HeldParameters, configs: ParallelConfigs, hardware: Hardware, framework: Framework
) -> tuple[Floats, Floats]:
    """Seconds (once a step, with every micro-batch) to exchange what a stage with so many parameters has to.

    Once: gradients are all-reduced over the group. ZeRO-3 instead all-gathers weights for the forward and for the
    backward pass of every micro-batch and reduce-scatters gradients. Under DualPipe a chip's two stages hold so much on
    average, and each is on a mirrored chip too, with which its gradients are summed. Where ZeRO shards over an island,
    gradients are reduce-scattered (from ZeRO 2 on with every micro-batch), and weights all-gathered once, or with ZeRO
    3 twice a micro-batch.
    """
    span = configs.tp * configs.cp * configs.dp
    group = configs.dp * configs.cp
    copies = np.maximum(group // configs.ep, 1)
    own, routed = held.dense / configs.tp, held.experts / (configs.tp * configs.ep)
    size = framework.gradient_bytes
    if framework.zero_over == "island":

        def one_way(bytes_each: float) -> Floats:
            dense = np.where(group > 1, hardware.all_gather(group, span, own * bytes_each, framework), 0.0)
            return dense + np.where(copies > 1, hardware.all_gather(copies, span, routed * bytes_each, framework), 0.0)

        return once_and_each(configs.zero, one_way(size), one_way(framework.weight_bytes))
    once = np.where(group > 1, hardware.all_reduce(group, span, own * size, framework), 0.0)
    once = once + np.where(copies > 1, hardware.all_reduce(copies, span, routed * size, framework), 0.0)
    whole = (own + routed) * framework.weight_bytes
    each = np.where(group > 1, 3 * hardware.all_gather(group, span, whole, framework), 0.0)
    sharded = configs.zero == 3
    dual = configs.schedule == SCHEDULES.index("dualpipe")
    mirrored = 2 * (own / group + routed / copies) * size
    pair = np.where(dual, hardware.all_reduce(*_two_ends(configs, hardware), mirrored, framework), 0.0)
    return np.where(sharded, 0.0, np.where(dual, 2.0, 1.0) * once) + pair, np.where(sharded, each, 0.0)


def once_and_each(zero: Ints, gradients: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """(once a step, with every micro-batch) seconds, of those of one reduce-scatter of gradients, one all-gather."""
    once = np.where(zero < 2, gradients, 0.0) + np.where(zero < 3, weights, 0.0)
    return once, np.where(zero >= 2, gradients, 0.0) + np.where(zero >= 3, 2 * weights, 0.0)


def _two_ends(configs: ParallelConfigs, hardware: Hardware) -> tuple[Ints, Ints]:
    """(degree, span) of a group of two chips at opposite stages of a pipeline."""
    two = np.full(len(configs), 2)
    return two, np.where(configs.chips > hardware.chips_per_node, 2 * hardware.chips_per_node, 2)


def tied_seconds(shape: NetworkSpec, configs: ParallelConfigs, hardware: Hardware, framework: Framework) -> Floats:
    """All-reduce of a tied table's gradients between the first and the last stage."""
    if not shape.tied:
        return np.zeros(len(configs))
    table = shape.head.parameters / configs.tp * framework.gradient_bytes
    return np.where(configs.pp > 1, hardware.all_reduce(*_two_ends(configs, hardware), table, framework), 0.0)


def optimizer_seconds(
    shape: NetworkSpec, configs: ParallelConfigs, hardware: Hardware, framework: Framework, held: list[HeldParameters]
) -> Floats:
    """Of the busiest stage, with what every step costs besides."""
    slowest = np.max([update_seconds(stage, configs, hardware, framework) for stage in held], axis=0)
    return slowest + framework.optimizer_seconds * shape.num_layers / configs.pp + framework.step_seconds


def update_seconds(held: HeldParameters, configs: ParallelConfigs, hardware: Hardware, framework: Framework) -> Floats:
    """Reading and writing parameters, gradients, states once, and Muon's products; sharded states divide the work."""
    group: Ints = configs.dp * configs.cp
    sharded = configs.zero > 0
    twice = np.where(configs.schedule == SCHEDULES.index("dualpipe"), 2.0, 1.0)  # two stages; shards halve them
    dense_over = configs.tp * np.where(sharded, group, 1)
    experts_over = configs.tp * configs.ep * np.where(sharded, np.maximum(group // configs.ep, 1), 1)
    rate = hardware.memory_bandwidth * framework.stream_efficiency / framework.optimizer_passes
    own = held.dense / dense_over + held.experts / experts_over
    muon = held.dense_muon / dense_over + held.expert_muon / experts_over
    return np.where(sharded, 1.0, twice) * (own / rate + muon)


def whole_update_seconds(pieces: NetworkPieces, hardware: Hardware, framework: Framework) -> float:
    """Of one chip that updates the whole model by itself."""
    whole = sum(pieces.held, start=HeldParameters(0.0, 0.0))
    alone = ParallelConfigs.of(
        tp=1, cp=1, ep=1, dp=1, pp=1, micro_batch=1, micro_batches=1, recompute=0, schedule=0, chunks=1, zero=0
    )
    return float(np.squeeze(update_seconds(whole, alone, hardware, framework)))
