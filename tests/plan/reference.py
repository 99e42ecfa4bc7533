"""A plan's step time the slow, plain way: one pipeline at a time, in floats, without the planner's arrays.

It shares with the planner only the cost of single operators (`network_pieces`, `exchange_seconds`, ...), not how
pipelines are cut, batches divided or plans searched.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from motley.apportion import apportion
from motley.fleet import Fleet, Pool
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, ParallelConfigs
from motley.plan.cost_model.memory import (
    FRAGMENTATION,
    buffer_bytes,
    in_flight,
    logit_bytes,
    saved_bytes,
    state_bytes,
    working_bytes,
)
from motley.plan.cost_model.operators import VALUE_BYTES
from motley.plan.cost_model.step_time import (
    HeldParameters,
    NetworkPieces,
    PieceKind,
    bubble_seconds,
    exchange_seconds,
    network_pieces,
    tied_seconds,
    update_seconds,
)
from motley.plan.network.spec import BlockSpec
from motley.plan.search.candidates import GroupMember, members_of
from motley.plan.workload import Workload


@dataclass(frozen=True)
class Pipeline:
    """One way for a group to run: everything explicit. `cuts` are the stages' pieces as (first, last + 1)."""

    members: tuple[GroupMember, ...]
    tp: tuple[int, ...]
    stages: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    dp: int
    ep: int
    micro_batch: int
    recompute: int
    schedule: int
    zero: int

    def configs(self, member: int) -> ParallelConfigs:
        return ParallelConfigs.of(
            tp=self.tp[member],
            cp=1,
            ep=self.ep,
            dp=self.dp,
            pp=sum(self.stages),
            micro_batch=self.micro_batch,
            micro_batches=1,
            recompute=self.recompute,
            schedule=self.schedule,
            chunks=1,
            zero=self.zero,
        )

    def member_of(self, stage: int) -> int:
        return int(np.searchsorted(np.cumsum(self.stages), stage, side="right"))


@dataclass(frozen=True)
class OperatorCosts:
    """Costs of single operators on one pool for one way to run, whatever the cut.

    Attributes:
        saved: bytes of activations of each layer and micro-batch.
        logits: bytes for each piece with a loss.
        around: bytes that every chip needs besides.
    """

    configs: ParallelConfigs
    pieces: NetworkPieces
    saved: Mapping[BlockSpec, float]
    logits: float
    around: float


_KNOWN: dict[tuple[Any, ...], tuple[Pipeline, Workload, list[OperatorCosts]]] = {}
"""With the pipelines and workloads whose identities are in the key, so that none is given to another object."""


def operator_costs(pipeline: Pipeline, workload: Workload) -> list[OperatorCosts]:
    """Of each member. Pipelines that differ in their cuts only share them."""
    key = (id(workload), id(pipeline.members), *astuple(replace(pipeline, members=(), cuts=())))
    if key not in _KNOWN:
        _KNOWN[key] = (pipeline, workload, [_operator_costs(pipeline, workload, i) for i in range(len(pipeline.tp))])
    return _KNOWN[key][2]


def _operator_costs(pipeline: Pipeline, workload: Workload, index: int) -> OperatorCosts:
    configs, member, shape, seq = pipeline.configs(index), pipeline.members[index], workload.shape, workload.seq_len
    blocks = {block for block, _ in shape.runs} | set(shape.mtp)
    saved = {block: float(saved_bytes(block, shape, configs, member.framework, seq)[0]) for block in blocks}
    working = max(float(working_bytes(block, configs, seq)[0]) for block in blocks)
    buffers = float(buffer_bytes(shape, configs, member.framework, seq)[0])
    pieces = network_pieces(shape, configs, seq, member.hardware, member.framework, member.precision)
    return OperatorCosts(configs, pieces, saved, float(logit_bytes(shape, configs, seq)[0]), working + buffers)


@dataclass(frozen=True)
class Line:
    """As in step_lines.py; seconds, but for `hidden`."""

    fixed: float
    slow: float
    once: float
    hidden: float
    cross: float
    cross_each: float
    each: float
    update: float

    def seconds(self, micro_batches: float, crossing: bool, update: float | None = None) -> float:
        """Of a step; `update`: of the whole island together, where it shares what it keeps."""
        running = micro_batches * (self.slow + crossing * self.cross_each)
        once = self.once + crossing * self.cross
        fixed = self.fixed if update is None else self.fixed - self.update + update
        return fixed + running + once - self.hidden * min(once, running)


def line(pipeline: Pipeline, workload: Workload) -> Line | None:
    """What a pipeline costs, or None where a chip's memory would overflow."""
    members, shape = pipeline.members, workload.shape
    pp = sum(pipeline.stages)
    costed = operator_costs(pipeline, workload)
    fixed, border = 0.0, 0.0
    totals, onces, eaches, updates, crosses, each_crosses = [], [], [], [], [], []
    stages, chips = [], [0] * len(members)
    for number, (first, last) in enumerate(pipeline.cuts):
        index = pipeline.member_of(number)
        member, configs, pieces = members[index], costed[index].configs, costed[index].pieces
        seconds = pieces.seconds[first]
        held = pieces.held[first]
        for piece in range(first + 1, last):
            seconds, held = seconds + pieces.seconds[piece], held + pieces.held[piece]
        if _memory(costed[index], member, number, pieces.kinds[first:last], held) > member.hardware.memory_bytes:
            return None
        stages.append(seconds)
        total = float(seconds.total[0])
        one, every = exchange_seconds(held, configs, member.hardware, member.framework)
        onces.append(float(one[0]))
        eaches.append(
            float(every[0])
            - member.framework.hidden_shards * min(float(every[0]), max(total - float(seconds.hidden[0]), 0.0))
        )
        updates.append(float(update_seconds(held, configs, member.hardware, member.framework)[0]))
        totals.append(total)
        chips[index] += pipeline.tp[index] * pipeline.dp
        if number + 1 < pp:
            ends = [(index, index != pipeline.member_of(number + 1))]
            if ends[0][1]:
                ends.append((pipeline.member_of(number + 1), True))
            message = max(_message(costed[end].configs, members[end], workload, far) for end, far in ends)
            fixed += 2 * message
            border = max(border, message)
        network = member.hardware.network_per_chip * member.framework.network_efficiency
        own = (held.dense / pipeline.tp[index] + held.experts / (pipeline.tp[index] * pipeline.ep)) / pipeline.dp
        gradient, weight = (
            size * own / network + 2 * member.hardware.latency
            for size in (member.framework.gradient_bytes, member.framework.weight_bytes)
        )
        if member.framework.zero_over == "group":
            crosses.append(2 * gradient)
            each_crosses.append(0.0)
        else:  # what is kept once travels once a step, or from its stage on with every micro-batch
            crosses.append((pipeline.zero < 2) * gradient + (pipeline.zero < 3) * weight)
            each_crosses.append((pipeline.zero > 1) * gradient + (pipeline.zero > 2) * 2 * weight)
    slowest, once, each, update, cross, cross_each = (
        _busiest(pipeline, values) for values in (totals, onces, eaches, updates, crosses, each_crosses)
    )
    nodes = max(1.0, *(count / m.hardware.chips_per_node for count, m in zip(chips, members, strict=True)))
    slow = max(slowest * (1 + max(m.framework.skew for m in members) * float(np.log2(nodes))) + each, border)
    fixed += (
        float(bubble_seconds(costed[0].configs, stages)[0]) + update + max(m.framework.step_seconds for m in members)
    )
    fixed += max(
        float(tied_seconds(shape, costs.configs, m.hardware, m.framework)[0])
        for costs, m in zip(costed, members, strict=True)
    )
    return Line(fixed, slow, once, max(m.framework.hidden_gradients for m in members), cross, cross_each, each, update)


def _busiest(pipeline: Pipeline, values: list[float]) -> float:
    """DualPipe puts stages i and p-1-i on one chip."""
    if pipeline.schedule == SCHEDULES.index("dualpipe"):
        return max((a + b) / 2 for a, b in zip(values, reversed(values), strict=True))
    return max(values)


def micro_batches(pipeline: Pipeline, sequences: int) -> int:
    """Of each replica when the group takes so many sequences."""
    return max(-(-sequences // (pipeline.dp * pipeline.micro_batch)), least(pipeline))


def least(pipeline: Pipeline) -> int:
    """Micro-batches that the schedule needs for its bubble to be its formula's."""
    pp = sum(pipeline.stages)
    return 1 if pp == 1 else {"1f1b": 1, "zero_bubble": pp, "dualpipe": 2 * pp}[SCHEDULES[pipeline.schedule]]


def _message(configs: ParallelConfigs, member: GroupMember, workload: Workload, far: bool) -> float:
    size = configs.micro_batch * workload.seq_len * workload.shape.hidden_size * VALUE_BYTES / configs.tp
    leaves = far or int(configs.tp[0] * configs.dp[0]) >= member.hardware.chips_per_node
    return float(member.hardware.send(size, np.array([leaves]), member.framework)[0])


def _memory(
    costs: OperatorCosts, member: GroupMember, stage: int, kinds: Sequence[PieceKind], held: HeldParameters
) -> float:
    configs = costs.configs
    states = sum(
        float(np.squeeze(part))
        for part in state_bytes(
            held.dense / configs.tp, held.experts / (configs.tp * configs.ep), configs, member.framework
        )
    )
    flights = float(in_flight(configs, np.array([stage]))[0])
    kept = sum(costs.saved[block] for _, block in kinds if block)
    heads = sum(1 for what, _ in kinds if what in ("head", "mtp"))
    return (1 + FRAGMENTATION) * (states + kept * flights + heads * costs.logits + costs.around)


def _last_cut(members: Sequence[GroupMember], pieces: int, workload: Workload) -> int:
    """The last piece at which a stage may begin: the head, or the first of the MTP modules that stay with it."""
    return pieces - 1 - len(workload.shape.mtp) * any(member.framework.mtp_with_head for member in members)


def every_pipeline(pools: Sequence[Pool], workload: Workload, micro_batches: Sequence[int]) -> Iterator[Pipeline]:
    """All pipelines of a group: every degree, number of stages and replicas, and every way to cut the layers."""
    members = members_of(pools, workload)
    heads = workload.shape.blocks[0].heads
    pieces = workload.shape.num_layers + len(workload.shape.mtp) + 2
    last = _last_cut(members, pieces, workload)
    experts = [ep for ep in (1, 2, 4, 8) if (workload.shape.experts or 1) % ep == 0]
    for tp in product(*[[t for t in (1, 2, 4, 8) if t <= m.pool.per_node and heads % t == 0] for m in members]):
        slots = [m.pool.nodes * (m.pool.per_node // t) for m, t in zip(members, tp, strict=True)]
        for dp in range(1, min(slots) + 1):
            for stages in product(*[range(1, slot // dp + 1) for slot in slots]):
                pp = sum(stages)
                if pp > workload.shape.num_layers:
                    continue
                for bounds in combinations(range(1, last + 1), pp - 1):
                    cuts = tuple(zip((0, *bounds), (*bounds, pieces), strict=True))
                    schedules = (0,) if pp == 1 else (0, 1, 2) if pp % 2 == 0 and len(members) == 1 else (0, 1)
                    zeros = (0,) if dp == 1 else (0, 1, 2, 3) if pp == 1 else (0, 1, 3)
                    for ep, micro, recompute, schedule, zero in product(
                        experts, micro_batches, range(3), schedules, zeros
                    ):
                        if dp % ep == 0:
                            yield Pipeline(members, tp, stages, cuts, dp, ep, micro, recompute, schedule, zero)


def random_pipeline(pools: list[Pool], workload: Workload, random: np.random.Generator) -> Pipeline | None:
    """Any valid pipeline of a group: random degrees, random cuts."""
    members = members_of(pools, workload)
    most = [min(m.pool.per_node, m.framework.most_tensor) for m in members]
    tp = tuple(int(random.choice([t for t in (1, 2, 4, 8) if t <= limit])) for limit in most)
    slots = [m.pool.nodes * (m.pool.per_node // t) for m, t in zip(members, tp, strict=True)]
    dp = int(random.integers(1, min(slots) + 1))
    stages = tuple(int(random.integers(1, slot // dp + 1)) for slot in slots)
    pieces = workload.shape.num_layers + len(workload.shape.mtp) + 2
    pp = sum(stages)
    if pp > workload.shape.num_layers:
        return None
    bounds = sorted(
        random.choice(np.arange(1, _last_cut(members, pieces, workload) + 1), pp - 1, replace=False).tolist()
    )
    cuts = tuple(zip((0, *bounds), (*bounds, pieces), strict=True))
    experts = [ep for ep in (1, 2, 4, 8) if (workload.shape.experts or 1) % ep == 0 and dp % ep == 0]
    schedule = int(random.integers(0, 3 if pp % 2 == 0 and len(members) == 1 else 2)) if pp > 1 else 0
    over_island = members[0].framework.zero_over == "island"
    zero = int(random.choice((1, 1, 2, 3))) if over_island else int(random.choice((0, 1, 3))) if dp > 1 else 0
    micro = int(random.choice((1, 2, 4)))
    if micro * dp > workload.global_batch:
        return None
    recompute = int(random.integers(0, 3))
    ep = int(random.choice(experts))
    found = Pipeline(members, tp, stages, cuts, dp, ep, micro, recompute, schedule, zero)
    return found if not over_island or _run_by_motley(found) else None


def _run_by_motley(pipeline: Pipeline) -> bool:
    """What motley's own runtime has, said once more."""
    whole = len(pipeline.cuts) == 1 and pipeline.ep == 1
    return (
        max(pipeline.tp) == 1
        and SCHEDULES[pipeline.schedule] in ("1f1b", "zero_bubble")
        and RECOMPUTES[pipeline.recompute] in (("none", "full") if pipeline.zero < 3 else ("full",))
        and (whole or pipeline.zero < 2)
    )


def update_rate(pipeline: Pipeline, workload: Workload) -> float:
    """Updates of the whole model a second that all chips of a pipeline's replicas together could do."""
    rate = 0.0
    for index, (member, stages) in enumerate(zip(pipeline.members, pipeline.stages, strict=True)):
        own = network_pieces(
            workload.shape,
            pipeline.configs(index),
            workload.seq_len,
            member.hardware,
            member.framework,
            member.precision,
        )
        held = HeldParameters(0.0, 0.0)
        for piece in own.held:
            held = held + piece
        one = ParallelConfigs.of(
            tp=1, cp=1, ep=1, dp=1, pp=1, micro_batch=1, micro_batches=1, recompute=0, schedule=0, chunks=1, zero=0
        )
        seconds = float(np.squeeze(update_seconds(held, one, member.hardware, member.framework)))
        rate += pipeline.tp[index] * stages * pipeline.dp / seconds
    return rate


def random_plan_seconds(fleet: Fleet, workload: Workload, random: np.random.Generator) -> float | None:
    """Step time of a random plan: pools in random groups, a random pipeline each, shares in proportion to speed."""
    groups: list[list[Pool]] = []
    for pool in random.permutation(np.array(fleet.pools, dtype=object)):
        if groups and random.random() < 0.3 and len(groups[-1]) < 2:
            groups[-1].append(pool)
        elif random.random() < 0.85:
            groups.append([pool])
    pipelines = [random_pipeline(group, workload, random) for group in groups]
    lines = [(p, costs) for p in pipelines if p is not None and (costs := line(p, workload)) is not None]
    if not lines:
        return None
    over_island = lines[0][0].members[0].framework.zero_over == "island"
    if over_island:
        lines = [(p, costs) for p, costs in lines if p.zero == lines[0][0].zero]
    speeds = [int(1e6 * p.dp * p.micro_batch / costs.slow) + 1 for p, costs in lines]
    shares = apportion(workload.global_batch, speeds)
    worked = [(p, costs, micro_batches(p, share)) for (p, costs), share in zip(lines, shares, strict=True) if share]
    crossing = len(worked) > 1
    update = 1 / sum(update_rate(p, workload) for p, _, _ in worked) if over_island and crossing else None
    turns = max(micro for _, _, micro in worked)  # all exchange with every micro-batch of any
    waits = [(turns - micro) * (costs.each + costs.cross_each) * over_island for _, costs, micro in worked]
    return max(
        costs.seconds(micro, crossing, update) + wait for (_, costs, micro), wait in zip(worked, waits, strict=True)
    )
