"""Seconds of one layer, forward and backward, for one micro-batch on one chip: products, attention, streams, messages.

    device = products + attention between tokens + streams (norms, activations, residuals) + gradients added up
    layer  = (host^p + device^p)^(1/p)         launching kernels runs beside computing: the slower one counts
           + exposed messages                   tensor-parallel sums, expert exchange, ring attention

All arguments of a layout are arrays; so are the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, Floats, Layouts
from motley.plan.cost_model.framework import Engine
from motley.plan.cost_model.hardware import Hardware
from motley.plan.network.spec import Block, Matmul, Shape

VALUE_BYTES = 2  # activations and computing copies of weights are 16 bits wide (fp8 keeps them so between products)


@dataclass(frozen=True)
class LayerSeconds:
    """Arrays of seconds for one micro-batch: computing forward and backward, and what of the messages is exposed.

    `weight` is the part of `backward` that only makes gradients of weights (zero-bubble schedules move it); `hidden`
    are messages that run behind computing, where nothing else can be hidden any more.
    """

    forward: Floats
    backward: Floats
    weight: Floats
    communication: Floats
    hidden: Floats

    @property
    def total(self) -> Floats:
        return self.forward + self.backward + self.communication

    def at(self, index: int) -> "LayerSeconds":
        """One candidate alone, as arrays of length 1."""
        return LayerSeconds(*(getattr(self, f.name)[index : index + 1] for f in fields(self)))

    def __add__(self, other: "LayerSeconds") -> "LayerSeconds":
        return LayerSeconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: Floats | float) -> "LayerSeconds":
        return LayerSeconds(*(getattr(self, f.name) * factor for f in fields(self)))


def summed(values: Sequence[LayerSeconds]) -> LayerSeconds:
    """All of `values` (at least one) added up."""
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def layer_seconds(
    block: Block, shape: Shape, layouts: Layouts, seq: int, hardware: Hardware, engine: Engine, precision: str
) -> LayerSeconds:
    """One block. Args: `seq` tokens a sequence; `precision` of the products with weights."""
    tokens = layouts.micro_batch * seq / layouts.cp
    products = sum(
        (_product_seconds(matmul, tokens, layouts, hardware, engine, precision) for matmul in block.matmuls),
        start=np.zeros(len(layouts)),
    )
    attention = _attention_seconds(block, tokens, seq / 2, layouts, hardware, engine)
    width = _stream_width(block, shape, layouts, engine)
    streams = tokens * width * VALUE_BYTES * engine.stream_passes / _memory_rate(hardware, engine)
    device_forward = products + attention + streams
    experts = block.expert_parameters
    adding = _adding_seconds(block.parameters - experts, experts, layouts, hardware, engine)
    device_backward = 2 * products + engine.attention_backward * attention + 2 * streams + adding
    again = np.select(
        [layouts.recompute == RECOMPUTES.index("none"), layouts.recompute == RECOMPUTES.index("selective")],
        [np.zeros(len(layouts)), (attention if engine.attention_efficiency == 0 else 0 * attention) + streams],
        device_forward,
    )
    host_again = np.where(layouts.recompute == RECOMPUTES.index("full"), engine.host_forward_seconds, 0.0)
    sorting = engine.expert_seconds / 3 if block.experts else 0.0
    forward = _together(device_forward, engine.host_forward_seconds + sorting, engine)
    backward = _together(device_backward + again, engine.host_backward_seconds + host_again + 2 * sorting, engine)
    messages = _tensor_sums(shape, tokens, layouts, hardware, engine) + _ring(block, tokens, layouts, hardware, engine)
    hidden = np.zeros(len(layouts))
    if block.experts:
        exposed, hidden = _expert_exchange(block, shape, tokens, layouts, hardware, engine, forward + backward)
        messages = messages + exposed
    factor = engine.correction(hardware.chip, tokens, shape.hidden_size, layouts.tp)
    return LayerSeconds(forward, backward, products + adding, messages, hidden) * factor


def head_seconds(
    shape: Shape, layouts: Layouts, seq: int, hardware: Hardware, engine: Engine, precision: str
) -> LayerSeconds:
    """Head and loss. The head's products run in the engine's widest training format, not in fp8.

    Logits are too many to be kept, so both gradients are made at once: nothing of them can be put off.
    """
    tokens = layouts.micro_batch * seq / layouts.cp
    wide = hardware.wide(precision)
    product = _product_seconds(shape.head, tokens, layouts, hardware, engine, wide)
    logits = tokens * shape.vocab_size / layouts.tp * engine.logit_bytes / _memory_rate(hardware, engine)
    forward = _together(product + logits / 3, engine.head_seconds / 3, engine)
    adding = _adding_seconds(shape.head.parameters, 0, layouts, hardware, engine)
    backward = _together(2 * product + 2 * logits / 3 + adding, 2 * engine.head_seconds / 3, engine)
    summed = tokens * 3 * 4.0
    messages = np.where(layouts.tp > 1, 3 * hardware.all_reduce(layouts.tp, layouts.tp, summed, engine), 0.0)
    none = np.zeros(len(layouts))
    return LayerSeconds(forward, backward, none, messages, none)


def embedding_seconds(shape: Shape, layouts: Layouts, seq: int, hardware: Hardware, engine: Engine) -> LayerSeconds:
    """Looking tokens up, and adding their gradients to the table."""
    tokens = layouts.micro_batch * seq / layouts.cp
    moved = tokens * shape.hidden_size * VALUE_BYTES / _memory_rate(hardware, engine)
    adding = _adding_seconds(shape.embedding_parameters, 0, layouts, hardware, engine)
    zero = np.zeros(len(layouts))
    return LayerSeconds(2 * moved, 4 * moved + adding, zero, zero, zero)


def mtp_seconds(
    block: Block, shape: Shape, layouts: Layouts, seq: int, hardware: Hardware, engine: Engine, precision: str
) -> LayerSeconds:
    """An MTP module: the embedding again, norms of two hidden vectors, their projection, a block, the head again.

    Source: V3 report, 2.2.
    """
    tokens = layouts.micro_batch * seq / layouts.cp
    projection = _product_seconds(shape.mtp_projection(), tokens, layouts, hardware, engine, hardware.wide(precision))
    norms = tokens * 2 * shape.hidden_size * VALUE_BYTES * engine.stream_passes / _memory_rate(hardware, engine)
    adding = _adding_seconds(shape.mtp_projection().parameters, 0, layouts, hardware, engine)
    none = np.zeros(len(layouts))
    around = LayerSeconds(projection + norms, 2 * (projection + norms) + adding, projection + adding, none, none)
    return (
        around
        + embedding_seconds(shape, layouts, seq, hardware, engine)
        + layer_seconds(block, shape, layouts, seq, hardware, engine, precision)
        + head_seconds(shape, layouts, seq, hardware, engine, precision)
    )


MUON_STEPS = 5  # of the Newton-Schulz iteration


def muon_seconds(block: Block, hardware: Hardware, engine: Engine, precision: str) -> tuple[float, float]:
    """Seconds to orthogonalise the updates of a block's matrices, (dense, experts), on one chip.

    Five times: the Gram matrix, its square, their product with the matrix; 4 r^2 c + 2 r^3 FLOPs for sides r <= c.
    Zero where the engine does not train with Muon.
    """
    if not engine.muon:
        return 0.0, 0.0
    wide = hardware.wide(precision)
    totals = [0.0, 0.0]
    for matmul in block.matmuls:
        if matmul.part == "routers":
            continue
        cut = 2 if block.gated and matmul.split == "column" and matmul.part != "attention projections" else 1
        outer = matmul.outer // cut  # gate and up are orthogonalised apart
        short, long = sorted((matmul.inner, outer))
        flops = MUON_STEPS * matmul.held * cut * (4 * short**2 * long + 2 * short**3)
        sides = [np.array([float(side)]) for side in (short, long, short)]
        share = hardware.curve_factor(wide, matmul.held, *sides)
        if share is None:
            share = short / (short + engine.half_outer)
        rate = hardware.flops[wide] * engine.matmul_efficiency[wide] * engine.muon_efficiency * float(np.squeeze(share))
        moved = MUON_STEPS * 3 * matmul.held * cut * short * long * VALUE_BYTES / _memory_rate(hardware, engine)
        totals[matmul.held > 1] += flops / rate + moved
    return totals[0], totals[1]


# --------------------------------------------------------------------------------------------- computing


def _product_seconds(
    matmul: Matmul, tokens: Floats, layouts: Layouts, hardware: Hardware, engine: Engine, precision: str
) -> Floats:
    """Forward seconds of one product, all the experts a chip holds together.

    Efficiency falls with small sides as side / (side + half): tiles are cut off and pipelines of units run dry.
    """
    inner = matmul.inner / (layouts.tp if matmul.split == "row" else 1)
    outer = matmul.outer / (layouts.tp if matmul.split == "column" else 1)
    flops = 2 * tokens * matmul.chosen * inner * outer
    rows: Floats = tokens
    if matmul.held > 1:
        rows = tokens * layouts.ep * matmul.chosen / matmul.held
        flops = flops * np.where(layouts.ep > 1, engine.expert_imbalance, 1.0) * (1 + engine.expert_padding / rows)
    rate = hardware.flops[precision] * engine.matmul_efficiency[precision]
    efficiency = hardware.curve_factor(precision, matmul.held, rows, inner, outer)
    if efficiency is None:
        efficiency = (
            rows / (rows + engine.half_rows) * inner / (inner + engine.half_inner) * outer / (outer + engine.half_outer)
        )
    computing = flops / (rate * efficiency)
    weights = matmul.held / (layouts.ep if matmul.held > 1 else 1) * inner * outer * VALUE_BYTES
    reading = (weights + tokens * matmul.chosen * (inner + outer) * VALUE_BYTES) / _memory_rate(hardware, engine)
    return engine.kernel_seconds + np.maximum(computing, reading)


def _attention_seconds(
    block: Block, tokens: Floats, visible: float, layouts: Layouts, hardware: Hardware, engine: Engine
) -> Floats:
    """Forward seconds between tokens; `visible` is the mean number of earlier tokens a token attends to."""
    heads = block.heads / layouts.tp
    flops = 2 * tokens * heads * (block.qk_dim + block.v_dim) * visible
    rate = hardware.flops[hardware.wide("bf16")]
    scores = tokens * heads * 2 * visible * engine.score_bytes / _memory_rate(hardware, engine)
    if engine.attention_efficiency:
        return flops / (rate * engine.attention_efficiency) + scores
    # Unfused: every score, the masked half too, is written, turned by softmax and dropout, and read again.
    batched = 2 * flops / (rate * engine.matmul_efficiency[hardware.wide("bf16")])
    narrow = min(block.qk_dim, block.v_dim)
    batched = batched * (narrow + engine.half_inner) / narrow
    return batched + scores


def _stream_width(block: Block, shape: Shape, layouts: Layouts, engine: Engine) -> Floats:
    """Numbers per token that pass through memory once: hidden vectors, the MLP's inside, the heads' inside."""
    inside = sum(matmul.outer * matmul.chosen for matmul in block.matmuls) / 4
    whole = 2.0 * shape.hidden_size
    divided = {
        "always": np.ones(len(layouts), bool),
        "never": np.zeros(len(layouts), bool),
        "unless full recompute": layouts.recompute != RECOMPUTES.index("full"),
    }[engine.sequence_parallel]
    return np.where(divided, whole / layouts.tp, whole) + inside / layouts.tp


def _adding_seconds(dense: float, experts: float, layouts: Layouts, hardware: Hardware, engine: Engine) -> Floats:
    """A micro-batch's gradients of so many parameters, added to those before it."""
    held = dense / layouts.tp + experts / (layouts.tp * layouts.ep)
    return held * engine.gradient_passes / _memory_rate(hardware, engine)


def _together(device: Floats, host: Floats | float, engine: Engine) -> Floats:
    power = engine.overlap_power
    return (device**power + host**power) ** (1 / power)


def _memory_rate(hardware: Hardware, engine: Engine) -> float:
    return hardware.memory_bandwidth * engine.stream_efficiency


# ---------------------------------------------------------------------------------------------- messages


def _tensor_sums(shape: Shape, tokens: Floats, layouts: Layouts, hardware: Hardware, engine: Engine) -> Floats:
    """Two sums over the tensor-parallel group forward, two backward, two more where forward runs again."""
    sums = 4 + 2 * (layouts.recompute == RECOMPUTES.index("full"))
    one = hardware.all_reduce(layouts.tp, layouts.tp, tokens * shape.hidden_size * VALUE_BYTES, engine)
    return np.where(layouts.tp > 1, sums * one, 0.0)


def _ring(block: Block, tokens: Floats, layouts: Layouts, hardware: Hardware, engine: Engine) -> Floats:
    """Context parallelism passes keys and values round once forward, twice backward; half of it hides."""
    passed = tokens * block.heads / layouts.tp * (block.qk_dim + block.v_dim) * VALUE_BYTES
    one = hardware.all_gather(layouts.cp, layouts.tp * layouts.cp, passed * layouts.cp, engine)
    return np.where(layouts.cp > 1, 0.5 * 3 * one, 0.0)


def _expert_exchange(
    block: Block, shape: Shape, tokens: Floats, layouts: Layouts, hardware: Hardware, engine: Engine, behind: Floats
) -> tuple[Floats, Floats]:
    """(exposed, hidden) seconds of dispatch and combine, forward and backward; DualPipe hides all that can be hidden.

    A token travels to each node at most once (V3 report 3.2.2: at most `groups` nodes), inside a node to each expert.
    """
    spread = np.minimum(layouts.ep, block.chosen)
    dispatch, combine = engine.expert_bytes
    sent = tokens / layouts.tp * shape.hidden_size * (dispatch + combine) * 2  # backward sends the same the other way
    exchange = hardware.all_to_all(layouts.ep, layouts.tp * layouts.cp, sent, spread, block.groups, engine)
    share = np.where(layouts.schedule == SCHEDULES.index("dualpipe"), 1.0, engine.hidden_experts)
    exchange = np.where(layouts.ep > 1, exchange, 0.0)
    hidden = share * np.minimum(exchange, behind)
    return exchange - hidden, hidden
