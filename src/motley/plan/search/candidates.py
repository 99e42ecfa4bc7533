"""Which layouts of a pipeline group are worth costing: degrees, micro-batch, recomputation, schedule, ZeRO stage.

A *pipeline group* is one pool, or a few that form a pipeline together (chips with more memory first). Degrees are
powers of two and round numbers; chips that they do not divide stay idle, so every number of replicas is a candidate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from motley.fleet.inventory import Pool
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, Ints, ParallelConfigs
from motley.plan.cost_model.framework import Framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.workload import Workload

TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8, 16)
PIPELINE = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
DEEPEST = 64
NEARLY_ALL = 0.97  # of a pool: a depth besides those of PIPELINE is tried if it leaves fewer chips idle than this
CHUNKS = (2, 4, 8)  # of an interleaved stage
MOST_EXPERT_RANKS = 320
MICRO_BATCH = (1, 2, 4, 8, 16)
LONG_CONTEXT = 16_384  # tokens from which context parallelism is considered
SMALL_GROUP = 16  # sets of tensor-parallel chips up to which every number of replicas and stages is tried


@dataclass(frozen=True)
class GroupMember:
    """A pool as part of a pipeline group, with what its chips run."""

    pool: Pool
    hardware: Hardware
    framework: Framework
    precision: str


def members_of(pools: Sequence[Pool], workload: Workload) -> tuple[GroupMember, ...]:
    """Chips with more memory first: the first stages hold most micro-batches in flight."""
    made = [
        GroupMember(pool, Hardware.of_pool(pool), workload.framework_for(pool), workload.precision_for(pool))
        for pool in pools
    ]
    return tuple(
        sorted(
            made,
            key=lambda m: (-m.hardware.memory_bytes, -m.hardware.flops[m.precision], -m.hardware.network, m.pool.chips),
        )
    )


def candidates_of(members: tuple[GroupMember, ...], workload: Workload) -> tuple[list[ParallelConfigs], Ints] | None:
    """(the ParallelConfigs of each member, [members, candidates] stages on it); None where there is none."""
    blocks = list(_blocks(members, workload))
    if not blocks:
        return None
    table = np.concatenate(blocks)
    cp, dp, pp, ep, micro, recompute, schedule, chunks, zero = table[:, :9].T
    configs = [
        ParallelConfigs.of(
            tp=table[:, 9 + i],
            cp=cp,
            ep=ep,
            dp=dp,
            pp=pp,
            micro_batch=micro,
            micro_batches=1,
            recompute=recompute,
            schedule=schedule,
            chunks=chunks,
            zero=zero,
        )
        for i in range(len(members))
    ]
    return configs, table[:, 9 + len(members) :].T.copy()


def _blocks(members: tuple[GroupMember, ...], workload: Workload) -> Iterator[Ints]:
    """Rows of degrees, a block for each way to place pipelines: its fixed degrees beside a grid of the free ones."""
    shape = workload.shape
    heads = shape.blocks[0].heads
    most_context = min(member.framework.most_context for member in members)
    contexts = [cp for cp in CONTEXT if cp <= most_context] if workload.seq_len > LONG_CONTEXT else [1]
    tensors = [
        [tp for tp in TENSOR if tp <= min(member.pool.per_node, member.framework.most_tensor) and heads % tp == 0]
        for member in members
    ]
    most_zero = min(member.framework.most_zero for member in members)
    over_island = members[0].framework.zero_over == "island"
    recomputes = tuple(
        number
        for number, name in enumerate(RECOMPUTES)
        if all(name in member.framework.recomputes for member in members)
    )
    allowed = set.intersection(*(set(member.framework.schedules) for member in members))
    for cp, tps in product(contexts, product(*tensors)):
        slots = [
            member.pool.nodes * (member.pool.per_node // tp) // cp for member, tp in zip(members, tps, strict=True)
        ]
        for stages, dp in _pipelines(slots, shape.num_layers):
            pp = sum(stages)
            experts = tuple(ep for ep in _expert_degrees(shape.experts) if (dp * cp) % ep == 0)
            micros = tuple(micro for micro in MICRO_BATCH if micro * dp <= workload.global_batch)
            if not micros:
                continue
            # Sharding less than a schedule allows costs memory and gains nothing: 1 (with stages) or 2, and 3.
            zeros = (0,) if dp * cp == 1 else (min(2 if pp == 1 else 1, most_zero), 3)[: 1 + (most_zero == 3)]
            if over_island:  # sharded over other groups too, and exchanged with every micro-batch from 2 on
                zeros = tuple(range(1, (most_zero if pp == 1 else 1) + 1))
            schedules = _schedules(allowed, pp, len(members), shape.num_layers)
            grid = _grid(experts, micros, schedules, zeros, recomputes, over_island)
            row = np.array([cp, dp, pp, *tps, *stages], np.int64)
            block = np.empty((len(grid), 3 + grid.shape[1] + 2 * len(members)), np.int64)
            block[:, :3], block[:, 3 : 3 + grid.shape[1]], block[:, 3 + grid.shape[1] :] = row[:3], grid, row[3:]
            yield block


@lru_cache(maxsize=512)
def _grid(
    experts: tuple[int, ...],
    micros: tuple[int, ...],
    schedules: tuple[tuple[int, int], ...],
    zeros: tuple[int, ...],
    recomputes: tuple[int, ...],
    over_island: bool,
) -> Ints:
    """[combinations, 6] of expert degree, micro-batch, recomputation, schedule, chunks, ZeRO stage.

    Over an island, stages 2 and 3 are for chips that hold all experts; with 3 weights are gathered for each pass, and
    the backward pass computes the forward pass again.
    """
    full = RECOMPUTES.index("full")
    rows = [
        (ep, micro, recompute, *schedule, zero)
        for ep, micro, recompute, schedule, zero in product(experts, micros, recomputes, schedules, zeros)
        if not over_island or zero < 2 or (ep == 1 and (zero < 3 or recompute == full))
    ]
    return np.array(rows, np.int64)


def _schedules(allowed: set[str], pp: int, members: int, layers: int) -> tuple[tuple[int, int], ...]:
    """(schedule, chunks of a stage) that the frameworks run and the depth allows."""
    plain = SCHEDULES.index("1f1b")
    if pp == 1:
        return ((plain, 1),)
    found = [(plain, 1)]
    if "interleaved" in allowed and members == 1:
        found += [(plain, chunks) for chunks in CHUNKS if layers >= pp * chunks]
    if "zero_bubble" in allowed:
        found.append((SCHEDULES.index("zero_bubble"), 1))
    if "dualpipe" in allowed and members == 1 and pp % 2 == 0:
        found.append((SCHEDULES.index("dualpipe"), 1))
    return tuple(found)


def _pipelines(slots: Sequence[int], layers: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(stages on each member, replicas).

    Small groups try everything. Larger ones try a depth from PIPELINE if they are one pool; if they are several, all
    chips, half or a quarter of them.
    """
    if min(slots) < 1:
        return
    if sum(slots) <= SMALL_GROUP:
        for dp in range(1, min(slots) + 1):
            for stages in product(*(range(1, slot // dp + 1) for slot in slots)):
                if sum(stages) <= layers:
                    yield stages, dp
        return
    if len(slots) == 1:
        for pp in range(1, min(slots[0], layers, DEEPEST) + 1):
            for dp in _replica_counts(slots[0] // pp):
                if pp in PIPELINE or pp * dp >= NEARLY_ALL * slots[0]:
                    yield (pp,), dp
        return
    seen = set()
    for dp in _replica_counts(min(slots)):
        most = [slot // dp for slot in slots]
        for scale in (1.0, 0.5, 0.25):
            stages = tuple(max(1, int(count * scale)) for count in most)
            if sum(stages) <= min(layers, DEEPEST) and (stages, dp) not in seen:
                seen.add((stages, dp))
                yield stages, dp


def _replica_counts(most: int) -> list[int]:
    """Numbers of replicas to try: all there is room for, and rounder ones that experts divide."""
    if most <= SMALL_GROUP:
        return list(range(1, most + 1))
    top = int(math.log2(most))
    multiples = {most // step * step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256)} - {0}
    return sorted(multiples | {2**top, 2 ** (top - 1)})


def _expert_degrees(experts: int) -> list[int]:
    if not experts:
        return [1]
    return [ep for ep in range(1, min(experts, MOST_EXPERT_RANKS) + 1) if experts % ep == 0]
