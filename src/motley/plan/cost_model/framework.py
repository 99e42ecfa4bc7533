"""Training frameworks as the cost model sees them: efficiencies, overheads and defaults, as data with their provenance.

Published systems differ by a factor of two to three on the same chips, so the numbers belong to the framework, not
to the chip. Each file in `frameworks/` holds one; `fitted` says on which measurements, by which command.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import yaml

from motley.errors import InputError
from motley.plan.cost_model.configs import Floats, Ints

NEAR_OCTAVES = 0.35
FADE = 0.02
FRAMEWORKS = (
    "motley",
    "motley-cpu",
    "motley-cpu-plain",
    "megatron",
    "megatron-core",
    "megatron-deepspeed",
    "megatron-unfused",
    "torchtitan",
    "torchtitan-eager",
    "deepseek",
)
ALIASES = {
    "megatron-lm": "megatron",
    "megatron-class": "megatron",
    "deepspeed": "megatron-deepspeed",
    "mcore": "megatron-core",
    "nemo": "megatron-core",
    "torchtitan-class": "torchtitan",
    "fsdp": "torchtitan-eager",
    "fsdp2": "torchtitan-eager",
    "pytorch": "torchtitan-eager",
    "our-runtime": "motley",
    "ours": "motley",
}
HOST_SECONDS = (
    *("kernel_seconds", "head_seconds", "host_forward_seconds", "host_backward_seconds", "expert_seconds"),
    *("optimizer_seconds", "step_seconds"),
)
"""Fixed costs of computing, which a slower machine pays in proportion."""


@dataclass(frozen=True)
class Framework:
    """Constants of the cost model for one training system.

    Attributes:
        matmul_efficiency: share of the chip's dense rate that large products reach, per number format.
        half_inner, half_outer: side of a matrix (after tensor parallelism) at which half of that is reached.
        half_rows: the same for the rows (tokens) of a product.
        kernel_seconds: time a product takes however small it is.
        attention_efficiency: share of the dense rate inside fused attention, forward; 0: not fused.
        attention_backward: cost of attention's backward pass, in forwards.
        score_bytes: bytes moved per attention score, forward (0 where attention is fused).
        stream_passes: how often a layer's forward pass reads or writes a hidden vector per token, outside products.
        stream_efficiency: share of the memory bandwidth those reach.
        gradient_passes: bytes per parameter that each micro-batch moves to add its gradient to the others'.
        sequence_parallel: when tensor parallelism also divides those: "always", "never" or "unless full recompute".
        logit_bytes: bytes the loss moves per logit, forward and backward.
        head_seconds: what the host needs to launch head and loss.
        host_forward_seconds, host_backward_seconds: what the host needs to launch a layer's kernels.
        overlap_power: how host and device times combine, (h^p + d^p)^(1/p).
        collective_seconds: latency of a collective inside a node, per rank beyond the first (a ring's steps).
        network_seconds: the same between nodes, per doubling of the nodes.
        link_efficiency, network_efficiency: share of the links' rate that large collectives reach.
        message_seconds: latency of a message between pipeline stages.
        hidden_gradients: share of the gradient exchange that runs behind the backward pass.
        hidden_experts: share of the expert exchange that runs behind computing.
        hidden_shards: share of ZeRO-3's gathering of weights that runs behind computing.
        expert_imbalance: tokens of the busiest expert group over the mean.
        expert_padding: rows added to each expert's tokens, on average, to suit the kernels.
        expert_seconds: fixed cost of choosing and sorting, per layer with experts.
        expert_bytes: bytes per number sent to experts (dispatch, combine).
        gradient_bytes, weight_bytes: bytes per gradient and per weight (ZeRO) on the wire.
        optimizer_passes: bytes per parameter that the optimizer reads and writes.
        muon: whether matrices are trained with Muon, whose products are costed besides.
        muon_efficiency: how fast those are, against products of layers of the same size.
        optimizer_seconds, step_seconds: fixed costs: per layer of the optimizer, per step.
        skew: share of a step lost in waiting for the slowest rank, per doubling of the nodes.
        waiting: share of a step that groups wait for each other, because speeds vary from step to step.
        most_tensor, most_context: largest degrees of tensor and context parallelism it can run.
        most_zero: highest ZeRO stage it has.
        zero_over: over which chips ZeRO shards: equal chips of a pipeline "group", or all of an "island", in proportion
            to speed within memory. Over an island stages 2 and 3 are for chips that each hold the whole model.
        schedules: of pipelines that it can run: 1f1b, interleaved (1f1b of several chunks), zero_bubble, dualpipe.
        mtp_with_head: whether MTP modules stay on the last stage, with the head that they share.
        balanced_stages: whether pipelines are cut where the times balance (else: equal numbers of layers).
        recomputes: kinds of activation recomputation it has, of "none", "selective" and "full".
        recompute: its default.
        zero: its default ZeRO stage.
        state_bytes: weights, gradients, optimizer states per parameter in training, in bytes.
        measured_on: chip of the `measured` points.
        measured: (rows, hidden_size, tp, factor): how a layer's measured time there compares with the formula's.
        fitted: where the constants come from.
    """

    name: str
    description: str
    matmul_efficiency: dict[str, float]
    half_rows: float
    half_inner: float
    half_outer: float
    kernel_seconds: float
    attention_efficiency: float
    attention_backward: float
    score_bytes: float
    stream_passes: float
    stream_efficiency: float
    gradient_passes: float
    sequence_parallel: str
    logit_bytes: float
    head_seconds: float
    host_forward_seconds: float
    host_backward_seconds: float
    overlap_power: float
    collective_seconds: float
    network_seconds: float
    link_efficiency: float
    network_efficiency: float
    message_seconds: float
    hidden_gradients: float
    hidden_experts: float
    hidden_shards: float
    expert_imbalance: float
    expert_padding: float
    expert_seconds: float
    expert_bytes: tuple[float, float]
    gradient_bytes: float
    weight_bytes: float
    optimizer_passes: float
    muon: bool
    muon_efficiency: float
    optimizer_seconds: float
    step_seconds: float
    skew: float
    waiting: float
    most_tensor: int
    most_context: int
    most_zero: int
    zero_over: Literal["group", "island"]
    schedules: tuple[str, ...]
    mtp_with_head: bool
    balanced_stages: bool
    recomputes: tuple[str, ...]
    recompute: str
    zero: int
    state_bytes: dict[str, float]
    measured_on: str
    measured: tuple[tuple[float, float, float, float], ...]
    fitted: tuple[str, ...]

    def sharded_bytes(self, zero: int) -> float:
        """Per parameter, of states that are sharded at this ZeRO stage."""
        kinds = ("optimizer", "gradient", "weight")
        return sum(self.state_bytes[kind] for kind in (kinds[:zero] if self.zero_over == "island" else kinds[:1]))

    def at_speed(self, speed: float) -> "Framework":
        """The same on chips slowed down to a share of their speed, host included."""
        return replace(self, **{name: getattr(self, name) / speed for name in HOST_SECONDS})

    def correction(self, chip: str, rows: Floats, hidden_size: int, tp: Ints) -> Floats:
        """Factor on a layer's seconds from points measured nearby; 1 far from them.

        Libraries pick other kernels at other sizes, so measured curves have steps that no formula has. A Gaussian in
        octaves of (rows, hidden size, tp) weighs the points; a small constant in the sum lets them fade with distance.
        """
        if chip != self.measured_on or not self.measured:
            return np.ones(len(rows))
        points = np.log2(np.asarray(self.measured))
        asked = np.stack([np.log2(rows), np.full(len(rows), np.log2(hidden_size)), np.log2(tp)], axis=1)
        distance = ((asked[:, None, :] - points[None, :, :3]) ** 2).sum(axis=2)
        weight = np.exp(-distance / (2 * NEAR_OCTAVES**2))
        return 2 ** ((weight * points[:, 3]).sum(axis=1) / (weight.sum(axis=1) + FADE))


@cache
def load_framework(name: str) -> Framework:
    """Read `frameworks/NAME.yaml`. Raises InputError for a name that is none."""
    name = ALIASES.get(name, name)
    if name not in FRAMEWORKS:
        raise InputError(f"there is no framework {name!r}; there are {', '.join(FRAMEWORKS)}")
    return framework_from(
        yaml.safe_load(files("motley.plan.cost_model").joinpath(f"frameworks/{name}.yaml").read_text("utf-8"))
    )


def framework_from(values: dict[str, Any]) -> Framework:
    names = {field.name for field in fields(Framework)}
    if set(values) != names:
        raise InputError(f"framework {values.get('name')}: fields missing or unknown: {sorted(names ^ set(values))}")
    lists = {name: tuple(values[name]) for name in ("fitted", "expert_bytes", "schedules", "recomputes")}
    return Framework(**{**values, **lists, "measured": tuple(tuple(point) for point in values["measured"])})
