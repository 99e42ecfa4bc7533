"""Ways in which a pipeline group can run replicas of the model, as lines: seconds of a step against micro-batches.

A group runs `dp` replicas, each a pipeline over its pools' chips; its time for m micro-batches a replica is

    seconds(m) = fixed + m x slow + once - hidden x min(once, m x slow)

with `slow` the slowest stage, `fixed` the filling of the pipeline, the optimizer and the step's own cost, `once` the
exchange of gradients, and m at least what the schedule needs. Every option is such a line; the search (`search.py`)
picks one for each group. Beside other groups it exchanges more, once and with every micro-batch; and where states are
sharded over the island (`Framework.zero_over`), the update of the whole island counts instead of the group's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from motley.plan.cost_model.configs import SCHEDULES, Floats, Ints, ParallelConfigs
from motley.plan.cost_model.memory import (
    FRAGMENTATION,
    buffer_bytes,
    in_flight,
    logit_bytes,
    saved_bytes,
    state_bytes,
    unsharded_bytes,
    widest_working_bytes,
)
from motley.plan.cost_model.operators import VALUE_BYTES, LayerSeconds
from motley.plan.cost_model.step_time import (
    HeldParameters,
    NetworkPieces,
    PieceKind,
    bubble_seconds,
    exchange_seconds,
    once_and_each,
    tied_seconds,
    update_seconds,
    whole_update_seconds,
)
from motley.plan.search.candidates import GroupMember
from motley.plan.search.cut_layers import PieceCosts, StageCuts
from motley.plan.workload import Workload

MOST_ROOM = 1e3  # times what is sharded over an island
SPREAD_UNEVENNESS = 2.0  # states spread by free memory: the fullest chip updates so many times an even share


@dataclass(frozen=True)
class GroupOptions:
    """Arrays [options]; `configs` has one entry a member, `stage_of` is [pieces, options].

    Attributes:
        fixed, slow, once, hidden: the line in the module's docstring, in seconds; `hidden` is a share.
        grain: sequences of one micro-batch of all replicas.
        chips: [members, options] chips used.
        cross, cross_each: seconds that exchanging with other groups adds to `once` and to `slow`.
        each: seconds of `slow` that are exchange.
        update: seconds of `fixed` in which the group updates its own states.
        rate: updates of the whole model a second that all its chips together could do.
        own_states: whether sharded states fit the group's own chips; else other chips of its island must hold some.
        spare: bytes free on all chips of the group for sharded states; over an island limited by the fullest stage.
    """

    members: tuple[GroupMember, ...]
    configs: tuple[ParallelConfigs, ...]
    stage_of: Ints
    pool_of: Ints
    fixed: Floats
    slow: Floats
    once: Floats
    hidden: float
    grain: Ints
    chips: Ints
    cross: Floats
    cross_each: Floats
    each: Floats
    update: Floats
    rate: Floats
    own_states: Any
    spare: Floats

    @property
    def zero(self) -> Ints:
        return self.configs[0].zero

    def __len__(self) -> int:
        return len(self.slow)

    def take(self, index: Any) -> "GroupOptions":
        return replace(
            self,
            configs=tuple(configs[index] for configs in self.configs),
            **{name: getattr(self, name)[..., index] for name in ARRAYS},
        )

    def seconds(self, micro_batches: Floats | Ints, crossing: bool, update: float | None = None) -> Floats:
        """Of a step in which each replica computes so many micro-batches.

        crossing: whether there are other groups. update: seconds of the island's, where states are sharded over it.
        """
        return self.seconds_of(np.arange(len(self)), micro_batches, crossing, update)

    def seconds_of(
        self, index: Ints, micro_batches: Floats | Ints, crossing: bool, update: float | None = None
    ) -> Floats:
        """`seconds` of some options only."""
        once = self.once[index] + (self.cross[index] if crossing else 0.0)
        slow = self.slow[index] + (self.cross_each[index] if crossing else 0.0)
        fixed = self.fixed[index] + (0.0 if update is None else update - self.update[index])
        running = np.maximum(micro_batches, self.configs[0].least_micro_batches[index]) * slow
        return fixed + running + once - self.hidden * np.minimum(once, running)

    def micro_batches_within(self, seconds: float, crossing: bool, update: float | None = None) -> Ints:
        """The most micro-batches each replica can compute in a step of `seconds` (0 if none)."""
        once = self.once + (self.cross if crossing else 0.0)
        slow = self.slow + (self.cross_each if crossing else 0.0)
        left = seconds - self.fixed - once - (0.0 if update is None else update - self.update)
        # With less computing than could hide the exchange, every second of it also hides a share of one.
        hides = left / (1 - self.hidden) <= once
        running = np.where(hides, left / (1 - self.hidden), left + self.hidden * once)
        count = np.maximum(np.floor(running / slow * (1 + 1e-12) + 1e-9), 0).astype(np.int64)
        return np.where(count < self.configs[0].least_micro_batches, 0, count)

    def sequences_within(self, seconds: float, crossing: bool, update: float | None = None) -> Ints:
        return self.micro_batches_within(seconds, crossing, update) * self.grain


ARRAYS = tuple(f.name for f in fields(GroupOptions) if f.name not in ("members", "configs", "hidden"))
"""Fields of Options with an entry for each option."""


def costed_options(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    costed: list[NetworkPieces],
    cuts: StageCuts,
    pool_of: Ints,
    index: Ints,
    workload: Workload,
    own_states: bool,
) -> GroupOptions:
    """The line of each candidate that was cut into stages."""
    configs = [own[index] for own in configs]
    costed = [pieces_at(pieces, index) for pieces in costed]
    stage_of, pool_of = cuts.stage_of[:, index], pool_of[:, index]
    stages, held = stage_sums(costed, stage_of, pool_of)
    first = configs[0]
    pp = first.pp
    fixed = bubbles(configs[0], stages, pp)
    most = stages.total.shape[0]
    once, each, update, cross, cross_each = (np.zeros((most, len(index))) for _ in range(5))
    hop, border = np.zeros(len(index)), np.zeros(len(index))
    hidden = max(member.framework.hidden_gradients for member in members)
    chips = np.zeros((len(members), len(index)), np.int64)
    for number in range(most):
        real = number < pp
        for position, (member, own) in enumerate(zip(members, configs, strict=True)):
            here = real & (pool_of[number] == position)
            if not here.any():
                continue
            stage = held_at(held, number)
            one, every = exchange_seconds(stage, own, member.hardware, member.framework)
            free = np.maximum(stages.total[number] - stages.hidden[number], 0.0)
            behind = member.framework.hidden_shards * np.minimum(every, free)
            once[number] = np.where(here, one, once[number])
            each[number] = np.where(here, every - behind, each[number])
            updating = update_seconds(stage, own, member.hardware, member.framework)
            update[number] = np.where(here, updating, update[number])
            chips[position] += here * own.tp * own.cp * own.dp
            if number < most - 1:
                message = border_seconds(member, own, workload)
                after = pool_of[number + 1]
                for next_position, (neighbour, theirs) in enumerate(zip(members, configs, strict=True)):
                    if next_position != position:  # pools do not share nodes: the slower end decides
                        both = np.maximum(
                            border_seconds(member, own, workload, far=True),
                            border_seconds(neighbour, theirs, workload, far=True),
                        )
                        message = np.where(after == next_position, both, message)
                crossed = np.where(here & (number < pp - 1), message, 0.0)
                hop = hop + 2 * crossed
                border = np.maximum(border, crossed)
            parameters = (stage.dense / own.tp + stage.experts / (own.tp * own.ep)) / (own.dp * own.cp)
            network = member.hardware.network_per_chip * member.framework.network_efficiency
            wire, every = crossing_seconds(parameters / network, member, own)
            cross[number] = np.where(here, wire, cross[number])
            cross_each[number] = np.where(here, every, cross_each[number])
            if not own_states and member.framework.zero_over == "group":
                # Gradients are sent to the chips that hold the states, updated weights come back.
                away = (
                    member.framework.gradient_bytes + VALUE_BYTES
                ) * parameters / network + 2 * member.hardware.latency
                once[number] = np.where(here, one + away, once[number])
                update[number] = np.where(here, SPREAD_UNEVENNESS * updating, update[number])
    spare = _spare_bytes(members, configs, costed, stage_of, pool_of, workload)
    whole = [whole_update_seconds(pieces, m.hardware, m.framework) for pieces, m in zip(costed, members, strict=True)]
    nodes = np.ones(len(index))
    skew = max(member.framework.skew for member in members)
    for position, member in enumerate(members):
        nodes = np.maximum(nodes, chips[position] / member.hardware.chips_per_node)
    # Messages between stages run beside computing, unless the link is slower than the slowest stage.
    slow = busiest(first, stages.total) * (1 + skew * np.log2(nodes)) + busiest(first, each)
    slow = np.maximum(slow, border)
    tied = np.max(
        [tied_seconds(workload.shape, own, m.hardware, m.framework) for m, own in zip(members, configs, strict=True)],
        axis=0,
    )
    step = max(member.framework.step_seconds for member in members)
    return GroupOptions(
        members=members,
        configs=tuple(configs),
        stage_of=stage_of,
        pool_of=pool_of,
        fixed=fixed + hop + busiest(first, update) + tied + step,
        slow=slow,
        once=busiest(first, once),
        hidden=hidden,
        grain=first.dp * first.micro_batch,
        chips=chips,
        cross=busiest(first, cross),
        cross_each=busiest(first, cross_each),
        each=busiest(first, each),
        update=busiest(first, update),
        rate=np.sum([count / seconds for count, seconds in zip(chips, whole, strict=True)], axis=0),
        own_states=np.full(len(index), own_states),
        spare=spare,
    )


def border_seconds(member: GroupMember, configs: ParallelConfigs, workload: Workload, far: bool = False) -> Floats:
    """One message between neighbouring stages of this pool's chips; `far`: certainly to another node."""
    message = (
        configs.micro_batch * workload.seq_len / configs.cp * workload.shape.hidden_size * VALUE_BYTES / configs.tp
    )
    leaves = (configs.tp * configs.cp * configs.dp >= member.hardware.chips_per_node) | far
    return member.hardware.send(message, leaves, member.framework)


def crossing_seconds(a_byte: Floats, member: GroupMember, configs: ParallelConfigs) -> tuple[Floats, Floats]:
    """(once a step, with every micro-batch) seconds of a chip's exchange with other groups.

    a_byte: seconds of a byte for each of its parameters.
    """
    framework, latency = member.framework, member.hardware.latency
    there, back = (size * a_byte + 2 * latency for size in (framework.gradient_bytes, framework.weight_bytes))
    if framework.zero_over == "island":
        return once_and_each(configs.zero, there, back)
    return 2 * there, np.zeros(len(there))


def _spare_bytes(
    members: tuple[GroupMember, ...],
    configs: list[ParallelConfigs],
    costed: list[NetworkPieces],
    stage_of: Ints,
    pool_of: Ints,
    workload: Workload,
) -> Floats:
    """Bytes free on all chips of the group for sharded states.

    Over an island every shard is held by a chip that computes with it. So the stage with the least room for its
    parameters' states limits the group.
    """
    first = configs[0]
    flights = np.stack([in_flight(first, np.full(len(first), stage)) for stage in range(pool_of.shape[0])])
    kinds, order = piece_kinds(costed[0])
    spare, share = np.zeros(len(first)), np.full(len(first), MOST_ROOM)
    own = np.arange(len(first))
    pools = [piece_costs(m, lay, c, order, workload, False) for m, lay, c in zip(members, configs, costed, strict=True)]
    filled, once = np.zeros(pool_of.shape), np.zeros(pool_of.shape)
    for piece, kind in enumerate(kinds):
        stage = stage_of[piece]
        size, apart = np.zeros(len(first)), np.zeros(len(first))
        for number, pool in enumerate(pools):
            here = pool_of[stage, own] == number
            size = np.where(here, pool.held[kind] + pool.saved[kind] * flights[stage, own], size)
            apart = np.where(here, pool.apart[kind], apart)
        filled[stage, own] += size
        once[stage, own] += apart
    for stage in range(pool_of.shape[0]):
        real = stage < first.pp
        for number, (pool, lay) in enumerate(zip(pools, configs, strict=True)):
            here = real & (pool_of[stage] == number)
            free = np.maximum(pool.capacity - pool.constant - filled[stage], 0.0)
            spare += np.where(here, free * lay.tp * lay.cp * lay.dp, 0.0)
            share = np.where(here, np.minimum(share, free / np.maximum(once[stage], 1.0)), share)
    framework = members[0].framework
    if framework.zero_over == "group":
        return spare
    return share * workload.parameters * np.array([framework.sharded_bytes(int(zero)) for zero in first.zero])


def piece_kinds(pieces: NetworkPieces) -> tuple[list[int], list[int]]:
    """(kind of each piece, first piece of each kind)."""
    seen: dict[PieceKind, int] = {}
    first = []
    for number, kind in enumerate(pieces.kinds):
        if kind not in seen:
            seen[kind] = len(first)
            first.append(number)
    return [seen[kind] for kind in pieces.kinds], first


def piece_costs(
    member: GroupMember,
    configs: ParallelConfigs,
    pieces: NetworkPieces,
    first: Sequence[int],
    workload: Workload,
    own_states: bool,
) -> PieceCosts:
    """The terms of `stage_bytes`, and seconds, of each kind of piece: what cutting the pipeline sums over stages."""
    shape, framework = workload.shape, member.framework
    seconds, held, apart, saved = [], [], [], []
    margin = 1 + FRAGMENTATION
    for number in first:
        what, block = pieces.kinds[number]
        part = pieces.held[number]
        states = state_bytes(part.dense / configs.tp, part.experts / (configs.tp * configs.ep), configs, framework)
        whole, home = sum(states), unsharded_bytes(states, configs, framework)
        held.append(margin * (whole if own_states else home))
        apart.append(margin * (whole - home))
        if block is not None:
            kept = saved_bytes(block, shape, configs, framework, workload.seq_len)
        else:
            kept = np.zeros(len(configs))
        if what in ("head", "mtp"):  # logits live only while the loss is computed
            held[-1] = held[-1] + margin * logit_bytes(shape, configs, workload.seq_len)
        saved.append(margin * kept)
        seconds.append(pieces.seconds[number].total)
    working = widest_working_bytes(shape, configs, workload.seq_len)
    constant = margin * (buffer_bytes(shape, configs, framework, workload.seq_len) + working)
    return PieceCosts(
        np.stack(seconds), np.stack(held), np.stack(apart), np.stack(saved), constant, member.hardware.memory_bytes
    )


# -------------------------------------------------------------------------------------- sums over stages


def stage_sums(costed: Sequence[NetworkPieces], stage_of: Ints, pool_of: Ints) -> tuple[LayerSeconds, HeldParameters]:
    """(seconds, what is held) of each stage, arrays [stages, candidates]."""
    count = stage_of.shape[1]
    most = pool_of.shape[0]
    own = np.arange(count)
    sums = {f.name: np.zeros((most, count)) for f in fields(LayerSeconds)}
    held = {f.name: np.zeros((most, count)) for f in fields(HeldParameters)}
    for piece in range(len(stage_of)):
        stage = stage_of[piece]
        pool = pool_of[stage, own]
        for totals, pieces in ((sums, [c.seconds[piece] for c in costed]), (held, [c.held[piece] for c in costed])):
            for name, total in totals.items():
                value = getattr(pieces[0], name)
                for number in range(1, len(costed)):
                    value = np.where(pool == number, getattr(pieces[number], name), value)
                total[stage, own] += value
    return LayerSeconds(**sums), HeldParameters(**held)


def held_at(held: HeldParameters, stage: int) -> HeldParameters:
    """What one stage holds, arrays [candidates]."""
    return HeldParameters(*(getattr(held, f.name)[stage] for f in fields(held)))


def busiest(configs: ParallelConfigs, values: Floats) -> Floats:
    """Largest of `values` [stages, candidates] over stages; under DualPipe over chips, which hold a pair of them."""
    largest = np.zeros(values.shape[1])
    own = np.arange(values.shape[1])
    dual = configs.schedule == SCHEDULES.index("dualpipe")
    for stage in range(values.shape[0]):
        twin = np.clip(configs.pp - 1 - stage, 0, None)
        value = np.where(dual, (values[stage] + values[twin, own]) / 2, values[stage])
        largest = np.maximum(largest, np.where(stage < configs.pp, value, 0.0))
    return largest


def bubbles(configs: ParallelConfigs, stages: LayerSeconds, pp: Ints) -> Floats:
    """`bubble_seconds` of candidates with different numbers of stages."""
    result = np.zeros(len(configs))
    for depth in np.unique(pp):
        index = np.flatnonzero(pp == depth)
        each = [
            LayerSeconds(*(getattr(stages, f.name)[stage, index] for f in fields(stages))) for stage in range(depth)
        ]
        result[index] = bubble_seconds(configs[index], each)
    return result


# ------------------------------------------------------------------------------------- rows of candidates


def pieces_at(pieces: NetworkPieces, index: Ints) -> NetworkPieces:
    taken: dict[int, LayerSeconds] = {}
    for piece in pieces.seconds:
        if id(piece) not in taken:
            taken[id(piece)] = LayerSeconds(*(getattr(piece, f.name)[index] for f in fields(piece)))
    return replace(pieces, seconds=tuple(taken[id(piece)] for piece in pieces.seconds))


def joined(parts: list[GroupOptions]) -> GroupOptions:
    if len(parts) == 1:
        return parts[0]
    most = max(part.pool_of.shape[0] for part in parts)
    pool_of = [np.pad(part.pool_of, ((0, most - part.pool_of.shape[0]), (0, 0)), mode="edge") for part in parts]
    names = [name for name in ARRAYS if name != "pool_of"]
    configs = tuple(
        ParallelConfigs(
            *(np.concatenate([getattr(part.configs[i], f.name) for part in parts]) for f in fields(ParallelConfigs))
        )
        for i in range(len(parts[0].members))
    )
    joined = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names}
    return replace(parts[0], configs=configs, pool_of=np.concatenate(pool_of, axis=1), **joined)
