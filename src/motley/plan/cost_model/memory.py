"""Bytes on one chip: weights, gradients, optimizer states, activations of the micro-batches in flight, buffers.

    stage i of p holds the activations of      1F1B: p - i micro-batches      zero bubble: p      DualPipe: p + 1
    of each layer it keeps per token           none: inputs and outputs of every product (GPT: 36 h, as Megatron)
                                               selective: inputs only       full: the layer's input only

Weights and states follow the framework's `state_bytes`; ZeRO 1, 2, 3 shards states, gradients, weights over the
data-parallel group, or over all chips of an island. A margin covers what the allocator fragments. `stage_bytes` is the
sum of all these; the search (`search/step_lines.py`) takes the same terms apart by piece, because it looks for the cut.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, Floats, Ints, ParallelConfigs
from motley.plan.cost_model.framework import Framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.cost_model.operators import VALUE_BYTES
from motley.plan.cost_model.step_time import HeldParameters, NetworkPieces, PieceKind, network_pieces
from motley.plan.network.spec import BlockSpec, NetworkSpec

FRAGMENTATION = 0.07  # of everything else (6 to 8 % are usual with PyTorch's allocator)
BUCKET_BYTES = 100e6  # of gradients that are exchanged together
LOGIT_BYTES = 8  # per logit while the loss is computed: 16-bit logits and gradient, an fp32 copy
SHARDED_FROM = (3, 2, 1)  # ZeRO stage from which weights, gradients, optimizer states are sharded


@dataclass(frozen=True)
class StageBytes:
    """Bytes on one chip of a stage by what they are for: arrays [candidates]."""

    weights: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    buffers: Floats

    @property
    def fragmentation(self) -> Floats:
        return FRAGMENTATION * (self.weights + self.gradients + self.optimizer + self.activations + self.buffers)

    @property
    def total(self) -> Floats:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.fragmentation


def stage_bytes(
    kinds: Sequence[PieceKind],
    held: HeldParameters,
    stage: int,
    shape: NetworkSpec,
    configs: ParallelConfigs,
    framework: Framework,
    seq: int,
) -> StageBytes:
    """What a chip of one stage holds.

    Args:
        kinds: of the pieces that the stage computes.
        held: parameters of these pieces.
        stage: its number, from 0.
        shape: the network.
        configs: how it is laid out.
        framework: that trains it.
        seq: tokens in a sequence.
    """
    weights, gradients, optimizer = state_bytes(
        held.dense / configs.tp, held.experts / (configs.tp * configs.ep), configs, framework
    )
    blocks = [block for _, block in kinds if block is not None]
    losses = sum(what in ("head", "mtp") for what, _ in kinds)
    activations = (
        in_flight_bytes(blocks, stage, shape, configs, framework, seq)
        + widest_working_bytes(shape, configs, seq)
        + losses * logit_bytes(shape, configs, seq)
    )
    return StageBytes(weights, gradients, optimizer, activations, buffer_bytes(shape, configs, framework, seq))


def fullest_bytes(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework, precision: str
) -> Floats:
    """[candidates] bytes on the fullest chip, stages cut as the framework does; all must share the same `pp`."""
    pp = int(configs.pp[0])
    pieces = network_pieces(shape, configs, seq, hardware, framework, precision)
    if not framework.balanced_stages or pp == 1:
        return _fullest(shape, configs, seq, framework, pieces, pieces.cut(pp, framework, 0))
    cuts = [pieces.cut(pp, framework, index) for index in range(len(configs))]
    return np.concatenate(
        [_fullest(shape, configs[index], seq, framework, pieces, cut) for index, cut in enumerate(cuts)]
    )


def _fullest(
    shape: NetworkSpec,
    configs: ParallelConfigs,
    seq: int,
    framework: Framework,
    pieces: NetworkPieces,
    cut: list[slice],
) -> Floats:
    stages = zip(cut, pieces.held_by_stage(cut, shape), strict=True)
    totals = [
        stage_bytes(pieces.kinds[part], held, stage, shape, configs, framework, seq).total
        for stage, (part, held) in enumerate(stages)
    ]
    return np.max(totals, axis=0)


def in_flight_bytes(
    blocks: Iterable[BlockSpec],
    stage: int,
    shape: NetworkSpec,
    configs: ParallelConfigs,
    framework: Framework,
    seq: int,
) -> Floats:
    """Activations of these layers that stage number `stage` keeps for the micro-batches it has in flight."""
    counts = Counter(blocks)
    saved = sum(
        (count * saved_bytes(block, shape, configs, framework, seq) for block, count in counts.items()),
        start=np.zeros(len(configs)),
    )
    return saved * in_flight(configs, np.full(len(configs), stage))


def saved_bytes(
    block: BlockSpec, shape: NetworkSpec, configs: ParallelConfigs, framework: Framework, seq: int
) -> Floats:
    """Activations one layer keeps for its backward pass, per micro-batch on one chip."""
    tokens = configs.micro_batch * seq / configs.cp
    inputs, outputs = np.zeros(len(configs)), np.zeros(len(configs))
    for matmul in block.matmuls:
        copies = matmul.chosen
        inner = matmul.inner / np.where(matmul.split == "row", configs.tp, _replicated(configs, framework))
        outer = matmul.outer / np.where(matmul.split == "column", configs.tp, _replicated(configs, framework))
        inputs, outputs = inputs + copies * inner, outputs + copies * outer
    hidden = shape.hidden_size / _replicated(configs, framework)
    scores = 5 * block.heads / configs.tp * seq if framework.attention_efficiency == 0 else 0.0
    everything = VALUE_BYTES * (inputs + outputs + 2 * hidden) + scores
    selective = VALUE_BYTES * (inputs + hidden)
    kinds = [configs.recompute == RECOMPUTES.index("none"), configs.recompute == RECOMPUTES.index("selective")]
    return tokens * np.select(kinds, [everything, selective], VALUE_BYTES * hidden)


def working_bytes(block: BlockSpec, configs: ParallelConfigs, seq: int) -> Floats:
    """What a layer needs while it runs (or runs again): the intermediate values of one micro-batch."""
    tokens = configs.micro_batch * seq / configs.cp
    widest = max(matmul.chosen * (matmul.inner + matmul.outer) for matmul in block.matmuls)
    return 2 * VALUE_BYTES * tokens * widest / configs.tp


def widest_working_bytes(shape: NetworkSpec, configs: ParallelConfigs, seq: int) -> Floats:
    """The same of the network's widest layer, for which every chip has room."""
    blocks = {block for block, _ in shape.runs} | set(shape.mtp)
    return np.max([working_bytes(block, configs, seq) for block in blocks], axis=0)


def logit_bytes(shape: NetworkSpec, configs: ParallelConfigs, seq: int) -> Floats:
    """Logits and their gradient on the last stage."""
    return configs.micro_batch * seq / configs.cp * shape.vocab_size / configs.tp * LOGIT_BYTES


def in_flight(configs: ParallelConfigs, stage: Ints) -> Floats:
    """Micro-batches whose activations stage number `stage` (from 0) holds at its fullest."""
    plain = np.maximum(configs.pp - stage, 1).astype(float)
    interleaved = plain + configs.pp * (configs.chunks > 1) * (configs.chunks - 1) / configs.chunks
    held = np.where(configs.schedule == SCHEDULES.index("zero_bubble"), configs.pp + 0.0, interleaved)
    return np.where(configs.schedule == SCHEDULES.index("dualpipe"), configs.pp + 1.0, held)


def state_bytes(
    dense: Floats, experts: Floats, configs: ParallelConfigs, framework: Framework
) -> tuple[Floats, Floats, Floats]:
    """(weights, gradients, optimizer) bytes of a chip that holds so many parameters, after ZeRO."""
    group = configs.dp * configs.cp
    copies = np.maximum(group // configs.ep, 1)
    sizes = framework.state_bytes

    def sharded(level: int) -> Floats:
        cut = configs.zero >= level
        return dense / np.where(cut, group, 1) + experts / np.where(cut, copies, 1)

    twice = np.where(configs.schedule == SCHEDULES.index("dualpipe"), 2.0, 1.0)
    return twice * sizes["weight"] * sharded(3), twice * sizes["gradient"] * sharded(2), sizes["optimizer"] * sharded(1)


def unsharded_bytes(states: tuple[Floats, Floats, Floats], configs: ParallelConfigs, framework: Framework) -> Floats:
    """Of (weights, gradients, optimizer): what every chip holds even when others hold all sharded states."""
    if framework.zero_over == "group":
        return states[0] + states[1]
    return sum(
        (np.where(configs.zero < stage, part, 0.0) for part, stage in zip(states, SHARDED_FROM, strict=True)),
        start=np.zeros(len(configs)),
    )


def gathered_bytes(shape: NetworkSpec, configs: ParallelConfigs, framework: Framework) -> Floats:
    """Gradients and gathered weights of the piece being computed: ZeRO 2 and 3 over an island."""
    if framework.zero_over == "group":
        return np.zeros(len(configs))
    blocks = [block.parameters for block, _ in shape.runs] + [block.parameters for block in shape.mtp]
    largest = max(*blocks, shape.embedding_parameters)
    return largest * (
        np.where(configs.zero >= 2, framework.gradient_bytes, 0.0)
        + np.where(configs.zero >= 3, framework.weight_bytes, 0.0)
    )


def buffer_bytes(shape: NetworkSpec, configs: ParallelConfigs, framework: Framework, seq: int) -> Floats:
    """Messages: stage borders, expert exchange, gradient buckets, gathered weights."""
    tokens = configs.micro_batch * seq / configs.cp
    border = 4 * VALUE_BYTES * tokens * shape.hidden_size / _replicated(configs, framework)
    chosen = max(block.chosen for block, _ in shape.runs)
    exchange = np.where(
        configs.ep > 1, tokens * chosen * shape.hidden_size * sum(framework.expert_bytes) / configs.tp, 0.0
    )
    buckets = np.where(configs.dp * configs.cp > 1, BUCKET_BYTES, 0.0)
    return border + exchange + buckets + gathered_bytes(shape, configs, framework)


def _replicated(configs: ParallelConfigs, framework: Framework) -> Floats | float:
    """By how much a hidden vector is cut over the tensor-parallel group (sequence parallelism), else 1."""
    return configs.tp.astype(float) if framework.sequence_parallel != "never" else 1.0
