"""Seconds of one layer, forward and backward, for one micro-batch on one chip: products, attention, streams, messages.

    device = products + attention between tokens + streams (norms, activations, residuals) + gradients added up
    layer  = (host^p + device^p)^(1/p)         launching kernels runs beside computing: the slower one counts
           + exposed messages                   tensor-parallel sums, expert exchange, ring attention

All arguments of a layout are arrays; so are the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, Floats, ParallelConfigs
from motley.plan.cost_model.framework import Framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.network.spec import BlockSpec, Matmul, NetworkSpec

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
    block: BlockSpec,
    shape: NetworkSpec,
    configs: ParallelConfigs,
    seq: int,
    hardware: Hardware,
    framework: Framework,
    precision: str,
) -> LayerSeconds:
    """One block. Args: `seq` tokens a sequence; `precision` of the products with weights."""
    tokens = configs.micro_batch * seq / configs.cp
    products = sum(
        (_product_seconds(matmul, tokens, configs, hardware, framework, precision) for matmul in block.matmuls),
        start=np.zeros(len(configs)),
    )
    attention = _attention_seconds(block, tokens, seq / 2, configs, hardware, framework)
    width = _stream_width(block, shape, configs, framework)
    streams = tokens * width * VALUE_BYTES * framework.stream_passes / _memory_rate(hardware, framework)
    device_forward = products + attention + streams
    experts = block.expert_parameters
    adding = _adding_seconds(block.parameters - experts, experts, configs, hardware, framework)
    device_backward = 2 * products + framework.attention_backward * attention + 2 * streams + adding
    again = np.select(
        [configs.recompute == RECOMPUTES.index("none"), configs.recompute == RECOMPUTES.index("selective")],
        [np.zeros(len(configs)), (attention if framework.attention_efficiency == 0 else 0 * attention) + streams],
        device_forward,
    )
    host_again = np.where(configs.recompute == RECOMPUTES.index("full"), framework.host_forward_seconds, 0.0)
    sorting = framework.expert_seconds / 3 if block.experts else 0.0
    forward = _together(device_forward, framework.host_forward_seconds + sorting, framework)
    backward = _together(device_backward + again, framework.host_backward_seconds + host_again + 2 * sorting, framework)
    messages = _tensor_sums(shape, tokens, configs, hardware, framework) + _ring(
        block, tokens, configs, hardware, framework
    )
    hidden = np.zeros(len(configs))
    if block.experts:
        exposed, hidden = _expert_exchange(block, shape, tokens, configs, hardware, framework, forward + backward)
        messages = messages + exposed
    factor = framework.correction(hardware.chip, tokens, shape.hidden_size, configs.tp)
    return LayerSeconds(forward, backward, products + adding, messages, hidden) * factor


def head_seconds(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework, precision: str
) -> LayerSeconds:
    """Head and loss. The head's products run in the framework's widest training format, not in fp8.

    Logits are too many to be kept, so both gradients are made at once: nothing of them can be put off.
    """
    tokens = configs.micro_batch * seq / configs.cp
    wide = hardware.wide(precision)
    product = _product_seconds(shape.head, tokens, configs, hardware, framework, wide)
    logits = tokens * shape.vocab_size / configs.tp * framework.logit_bytes / _memory_rate(hardware, framework)
    forward = _together(product + logits / 3, framework.head_seconds / 3, framework)
    adding = _adding_seconds(shape.head.parameters, 0, configs, hardware, framework)
    backward = _together(2 * product + 2 * logits / 3 + adding, 2 * framework.head_seconds / 3, framework)
    summed = tokens * 3 * 4.0
    messages = np.where(configs.tp > 1, 3 * hardware.all_reduce(configs.tp, configs.tp, summed, framework), 0.0)
    none = np.zeros(len(configs))
    return LayerSeconds(forward, backward, none, messages, none)


def embedding_seconds(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework
) -> LayerSeconds:
    """Looking tokens up, and adding their gradients to the table."""
    tokens = configs.micro_batch * seq / configs.cp
    moved = tokens * shape.hidden_size * VALUE_BYTES / _memory_rate(hardware, framework)
    adding = _adding_seconds(shape.embedding_parameters, 0, configs, hardware, framework)
    zero = np.zeros(len(configs))
    return LayerSeconds(2 * moved, 4 * moved + adding, zero, zero, zero)


def mtp_seconds(
    block: BlockSpec,
    shape: NetworkSpec,
    configs: ParallelConfigs,
    seq: int,
    hardware: Hardware,
    framework: Framework,
    precision: str,
) -> LayerSeconds:
    """An MTP module: the embedding again, norms of two hidden vectors, their projection, a block, the head again.

    Source: V3 report, 2.2.
    """
    tokens = configs.micro_batch * seq / configs.cp
    projection = _product_seconds(
        shape.mtp_projection(), tokens, configs, hardware, framework, hardware.wide(precision)
    )
    norms = tokens * 2 * shape.hidden_size * VALUE_BYTES * framework.stream_passes / _memory_rate(hardware, framework)
    adding = _adding_seconds(shape.mtp_projection().parameters, 0, configs, hardware, framework)
    none = np.zeros(len(configs))
    around = LayerSeconds(projection + norms, 2 * (projection + norms) + adding, projection + adding, none, none)
    return (
        around
        + embedding_seconds(shape, configs, seq, hardware, framework)
        + layer_seconds(block, shape, configs, seq, hardware, framework, precision)
        + head_seconds(shape, configs, seq, hardware, framework, precision)
    )


MUON_STEPS = 5  # of the Newton-Schulz iteration


def muon_seconds(block: BlockSpec, hardware: Hardware, framework: Framework, precision: str) -> tuple[float, float]:
    """Seconds to orthogonalise the updates of a block's matrices, (dense, experts), on one chip.

    Five times: the Gram matrix, its square, their product with the matrix; 4 r^2 c + 2 r^3 FLOPs for sides r <= c.
    Zero where the framework does not train with Muon.
    """
    if not framework.muon:
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
            share = short / (short + framework.half_outer)
        rate = (
            hardware.flops[wide]
            * framework.matmul_efficiency[wide]
            * framework.muon_efficiency
            * float(np.squeeze(share))
        )
        moved = MUON_STEPS * 3 * matmul.held * cut * short * long * VALUE_BYTES / _memory_rate(hardware, framework)
        totals[matmul.held > 1] += flops / rate + moved
    return totals[0], totals[1]


# --------------------------------------------------------------------------------------------- computing


def _product_seconds(
    matmul: Matmul, tokens: Floats, configs: ParallelConfigs, hardware: Hardware, framework: Framework, precision: str
) -> Floats:
    """Forward seconds of one product, all the experts a chip holds together.

    Efficiency falls with small sides as side / (side + half): tiles are cut off and pipelines of units run dry.
    """
    inner = matmul.inner / (configs.tp if matmul.split == "row" else 1)
    outer = matmul.outer / (configs.tp if matmul.split == "column" else 1)
    flops = 2 * tokens * matmul.chosen * inner * outer
    rows: Floats = tokens
    if matmul.held > 1:
        rows = tokens * configs.ep * matmul.chosen / matmul.held
        flops = (
            flops * np.where(configs.ep > 1, framework.expert_imbalance, 1.0) * (1 + framework.expert_padding / rows)
        )
    rate = hardware.flops[precision] * framework.matmul_efficiency[precision]
    efficiency = hardware.curve_factor(precision, matmul.held, rows, inner, outer)
    if efficiency is None:
        efficiency = (
            rows
            / (rows + framework.half_rows)
            * inner
            / (inner + framework.half_inner)
            * outer
            / (outer + framework.half_outer)
        )
    computing = flops / (rate * efficiency)
    weights = matmul.held / (configs.ep if matmul.held > 1 else 1) * inner * outer * VALUE_BYTES
    reading = (weights + tokens * matmul.chosen * (inner + outer) * VALUE_BYTES) / _memory_rate(hardware, framework)
    return framework.kernel_seconds + np.maximum(computing, reading)


def _attention_seconds(
    block: BlockSpec, tokens: Floats, visible: float, configs: ParallelConfigs, hardware: Hardware, framework: Framework
) -> Floats:
    """Forward seconds between tokens; `visible` is the mean number of earlier tokens a token attends to."""
    heads = block.heads / configs.tp
    flops = 2 * tokens * heads * (block.qk_dim + block.v_dim) * visible
    rate = hardware.flops[hardware.wide("bf16")]
    scores = tokens * heads * 2 * visible * framework.score_bytes / _memory_rate(hardware, framework)
    if framework.attention_efficiency:
        return flops / (rate * framework.attention_efficiency) + scores
    # Unfused: every score, the masked half too, is written, turned by softmax and dropout, and read again.
    batched = 2 * flops / (rate * framework.matmul_efficiency[hardware.wide("bf16")])
    narrow = min(block.qk_dim, block.v_dim)
    batched = batched * (narrow + framework.half_inner) / narrow
    return batched + scores


def _stream_width(block: BlockSpec, shape: NetworkSpec, configs: ParallelConfigs, framework: Framework) -> Floats:
    """Numbers per token that pass through memory once: hidden vectors, the MLP's inside, the heads' inside."""
    inside = sum(matmul.outer * matmul.chosen for matmul in block.matmuls) / 4
    whole = 2.0 * shape.hidden_size
    divided = {
        "always": np.ones(len(configs), bool),
        "never": np.zeros(len(configs), bool),
        "unless full recompute": configs.recompute != RECOMPUTES.index("full"),
    }[framework.sequence_parallel]
    return np.where(divided, whole / configs.tp, whole) + inside / configs.tp


def _adding_seconds(
    dense: float, experts: float, configs: ParallelConfigs, hardware: Hardware, framework: Framework
) -> Floats:
    """A micro-batch's gradients of so many parameters, added to those before it."""
    held = dense / configs.tp + experts / (configs.tp * configs.ep)
    return held * framework.gradient_passes / _memory_rate(hardware, framework)


def _together(device: Floats, host: Floats | float, framework: Framework) -> Floats:
    power = framework.overlap_power
    return (device**power + host**power) ** (1 / power)


def _memory_rate(hardware: Hardware, framework: Framework) -> float:
    return hardware.memory_bandwidth * framework.stream_efficiency


# ---------------------------------------------------------------------------------------------- messages


def _tensor_sums(
    shape: NetworkSpec, tokens: Floats, configs: ParallelConfigs, hardware: Hardware, framework: Framework
) -> Floats:
    """Two sums over the tensor-parallel group forward, two backward, two more where forward runs again."""
    sums = 4 + 2 * (configs.recompute == RECOMPUTES.index("full"))
    one = hardware.all_reduce(configs.tp, configs.tp, tokens * shape.hidden_size * VALUE_BYTES, framework)
    return np.where(configs.tp > 1, sums * one, 0.0)


def _ring(
    block: BlockSpec, tokens: Floats, configs: ParallelConfigs, hardware: Hardware, framework: Framework
) -> Floats:
    """Ring attention (context parallelism): keys and values travel once forward, twice backward; half is hidden."""
    passed = tokens * block.heads / configs.tp * (block.qk_dim + block.v_dim) * VALUE_BYTES
    one = hardware.all_gather(configs.cp, configs.tp * configs.cp, passed * configs.cp, framework)
    return np.where(configs.cp > 1, 0.5 * 3 * one, 0.0)


def _expert_exchange(
    block: BlockSpec,
    shape: NetworkSpec,
    tokens: Floats,
    configs: ParallelConfigs,
    hardware: Hardware,
    framework: Framework,
    behind: Floats,
) -> tuple[Floats, Floats]:
    """(exposed, hidden) seconds of dispatch and combine, forward and backward; DualPipe hides all that can be hidden.

    A token travels to each node at most once (V3 report 3.2.2: at most `groups` nodes), inside a node to each expert.
    """
    spread = np.minimum(configs.ep, block.chosen)
    dispatch, combine = framework.expert_bytes
    sent = tokens / configs.tp * shape.hidden_size * (dispatch + combine) * 2  # backward sends the same the other way
    exchange = hardware.all_to_all(
        configs.ep, configs.tp * configs.cp, sent, spread, block.most_expert_groups, framework
    )
    share = np.where(configs.schedule == SCHEDULES.index("dualpipe"), 1.0, framework.hidden_experts)
    exchange = np.where(configs.ep > 1, exchange, 0.0)
    hidden = share * np.minimum(exchange, behind)
    return exchange - hidden, hidden
