"""Bytes on one chip: weights, gradients, optimizer states, activations of the micro-batches in flight, buffers.

    stage i of p holds the activations of      1F1B: p - i micro-batches      zero bubble: p      DualPipe: p + 1
    of each layer it keeps per token           none: inputs and outputs of every product (GPT: 36 h, as Megatron)
                                               selective: inputs only       full: the layer's input only

Weights and states follow the engine's `state_bytes`; ZeRO 1, 2, 3 shards states, gradients, weights over the
data-parallel group, or over all chips of an island. A margin covers what the allocator fragments.
"""

from dataclasses import dataclass

import numpy as np

from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, Floats, Ints, Layouts
from motley.plan.cost_model.framework import Engine
from motley.plan.cost_model.operators import VALUE_BYTES
from motley.plan.network.spec import Block, Shape

FRAGMENTATION = 0.07  # of everything else (6 to 8 % are usual with PyTorch's allocator)
BUCKET_BYTES = 100e6  # gradients wait in buckets of this size to be exchanged
LOGIT_BYTES = 8  # per logit while the loss is computed: 16-bit logits and gradient, an fp32 copy


KEPT_ONCE_FROM = (3, 2, 1)  # ZeRO stage from which weights, gradients, optimizer states are


@dataclass(frozen=True)
class StageBytes:
    """Arrays [candidates] of bytes on one chip of a stage."""

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

    @property
    def without_states(self) -> Floats:
        """What must lie on the chip even when other chips hold its optimizer states."""
        return self.total - (1 + FRAGMENTATION) * self.optimizer


def saved_bytes(block: Block, shape: Shape, layouts: Layouts, engine: Engine, seq: int) -> Floats:
    """Activations one layer keeps for its backward pass, per micro-batch on one chip."""
    tokens = layouts.micro_batch * seq / layouts.cp
    inputs, outputs = np.zeros(len(layouts)), np.zeros(len(layouts))
    for matmul in block.matmuls:
        copies = matmul.chosen
        inner = matmul.inner / np.where(matmul.split == "row", layouts.tp, _replicated(layouts, engine))
        outer = matmul.outer / np.where(matmul.split == "column", layouts.tp, _replicated(layouts, engine))
        inputs, outputs = inputs + copies * inner, outputs + copies * outer
    hidden = shape.hidden_size / _replicated(layouts, engine)
    scores = 5 * block.heads / layouts.tp * seq if engine.attention_efficiency == 0 else 0.0
    everything = VALUE_BYTES * (inputs + outputs + 2 * hidden) + scores
    selective = VALUE_BYTES * (inputs + hidden)
    kinds = [layouts.recompute == RECOMPUTES.index("none"), layouts.recompute == RECOMPUTES.index("selective")]
    return tokens * np.select(kinds, [everything, selective], VALUE_BYTES * hidden)


def working_bytes(block: Block, shape: Shape, layouts: Layouts, engine: Engine, seq: int) -> Floats:
    """What a layer needs while it runs (or runs again): the intermediate values of one micro-batch."""
    tokens = layouts.micro_batch * seq / layouts.cp
    widest = max(matmul.chosen * (matmul.inner + matmul.outer) for matmul in block.matmuls)
    return 2 * VALUE_BYTES * tokens * widest / layouts.tp


def logit_bytes(shape: Shape, layouts: Layouts, seq: int) -> Floats:
    """Logits and their gradient on the last stage."""
    return layouts.micro_batch * seq / layouts.cp * shape.vocab_size / layouts.tp * LOGIT_BYTES


def in_flight(layouts: Layouts, stage: Ints) -> Floats:
    """Micro-batches whose activations stage number `stage` (from 0) holds at its fullest."""
    plain = np.maximum(layouts.pp - stage, 1).astype(float)
    interleaved = plain + layouts.pp * (layouts.chunks > 1) * (layouts.chunks - 1) / layouts.chunks
    held = np.where(layouts.schedule == SCHEDULES.index("zero_bubble"), layouts.pp + 0.0, interleaved)
    return np.where(layouts.schedule == SCHEDULES.index("dualpipe"), layouts.pp + 1.0, held)


def state_bytes(dense: Floats, experts: Floats, layouts: Layouts, engine: Engine) -> tuple[Floats, Floats, Floats]:
    """(weights, gradients, optimizer) bytes of a chip that holds so many parameters, after ZeRO."""
    group = layouts.dp * layouts.cp
    copies = np.maximum(group // layouts.ep, 1)
    sizes = engine.state_bytes

    def sharded(level: int) -> Floats:
        cut = layouts.zero >= level
        return dense / np.where(cut, group, 1) + experts / np.where(cut, copies, 1)

    twice = np.where(layouts.schedule == SCHEDULES.index("dualpipe"), 2.0, 1.0)
    return twice * sizes["weight"] * sharded(3), twice * sizes["gradient"] * sharded(2), sizes["optimizer"] * sharded(1)


def at_home(states: tuple[Floats, Floats, Floats], layouts: Layouts, engine: Engine) -> Floats:
    """What of (weights, gradients, optimizer) stays on a chip although others keep what may lie with any of them."""
    if engine.zero_over == "team":
        return states[0] + states[1]
    return sum(
        (np.where(layouts.zero < stage, part, 0.0) for part, stage in zip(states, KEPT_ONCE_FROM, strict=True)),
        start=np.zeros(len(layouts)),
    )


def visiting_bytes(shape: Shape, layouts: Layouts, engine: Engine) -> Floats:
    """Weights and gradients of the piece that is being computed where others keep them: ZeRO 2 and 3 of an island."""
    if engine.zero_over == "team":
        return np.zeros(len(layouts))
    blocks = [block.parameters for block, _ in shape.runs] + [block.parameters for block in shape.mtp]
    largest = max(*blocks, shape.embedding_parameters)
    return largest * (
        np.where(layouts.zero >= 2, engine.gradient_bytes, 0.0) + np.where(layouts.zero >= 3, engine.weight_bytes, 0.0)
    )


def buffer_bytes(shape: Shape, layouts: Layouts, engine: Engine, seq: int) -> Floats:
    """Messages on their way: stage borders, expert exchange, gradient buckets, weights that visit."""
    tokens = layouts.micro_batch * seq / layouts.cp
    border = 4 * VALUE_BYTES * tokens * shape.hidden_size / _replicated(layouts, engine)
    chosen = max(block.chosen for block, _ in shape.runs)
    exchange = np.where(
        layouts.ep > 1, tokens * chosen * shape.hidden_size * sum(engine.expert_bytes) / layouts.tp, 0.0
    )
    buckets = np.where(layouts.dp * layouts.cp > 1, BUCKET_BYTES, 0.0)
    return border + exchange + buckets + visiting_bytes(shape, layouts, engine)


def _replicated(layouts: Layouts, engine: Engine) -> Floats | float:
    """By how much a hidden vector is cut over the tensor-parallel group (sequence parallelism), else 1."""
    return layouts.tp.astype(float) if engine.sequence_parallel != "never" else 1.0
