"""Which layouts of a team are worth costing: degrees of parallelism, micro-batch, recomputation, schedule, ZeRO stage.

A *team* is one pool, or a few that form a pipeline together (memory-rich chips first). Its degrees are powers of two
and round numbers; what is left of a pool when they do not divide it stays idle, so that every number of copies counts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from motley.fleet.inventory import Pool
from motley.plan.engine import Engine
from motley.plan.hardware import Hardware
from motley.plan.job import Job
from motley.plan.layout import Ints, Layouts

TENSOR = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8, 16)
PIPELINE = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
MICRO_BATCH = (1, 2, 4, 8, 16)
LONG_CONTEXT = 16_384  # tokens from which context parallelism is considered
SMALL_TEAM = 16  # tensor-parallel groups up to which every number of copies and stages is tried


@dataclass(frozen=True)
class Member:
    """A pool as part of a team, with what its chips run."""

    pool: Pool
    hardware: Hardware
    engine: Engine
    precision: str


def members_of(pools: Sequence[Pool], job: Job) -> tuple[Member, ...]:
    """Memory-rich chips first: the first stages hold most micro-batches in flight."""
    made = [Member(pool, Hardware.of_pool(pool), job.engine_for(pool), job.precision_for(pool)) for pool in pools]
    return tuple(
        sorted(
            made,
            key=lambda m: (-m.hardware.memory_bytes, -m.hardware.flops[m.precision], -m.hardware.network, m.pool.chips),
        )
    )


def candidates_of(members: tuple[Member, ...], job: Job) -> tuple[list[Layouts], Ints] | None:
    """(a Layouts for each member, [members, candidates] stages on it)."""
    rows = list(_rows(members, job))
    if not rows:
        return None
    table = np.array([row[: 8 + 2 * len(members)] for row in rows], np.int64)
    cp, ep, dp, micro, recompute, schedule, zero, pp = table[:, :8].T
    layouts = [
        Layouts.of(
            tp=table[:, 8 + i],
            cp=cp,
            ep=ep,
            dp=dp,
            pp=pp,
            micro_batch=micro,
            micro_batches=1,
            recompute=recompute,
            schedule=schedule,
            chunks=1,
            zero=zero,
        )
        for i in range(len(members))
    ]
    return layouts, table[:, 8 + len(members) :].T.copy()


def _rows(members: tuple[Member, ...], job: Job) -> Iterator[tuple[int, ...]]:
    shape = job.shape
    heads = shape.blocks[0].heads
    contexts = CONTEXT if job.seq_len > LONG_CONTEXT else (1,)
    tensors = [[tp for tp in TENSOR if tp <= member.pool.per_node and heads % tp == 0] for member in members]
    for cp, tps in product(contexts, product(*tensors)):
        groups = [
            member.pool.nodes * (member.pool.per_node // tp) // cp for member, tp in zip(members, tps, strict=True)
        ]
        for stages, dp in _pipelines(groups, shape.num_layers):
            experts = [ep for ep in _expert_degrees(shape.experts) if (dp * cp) % ep == 0]
            pp = sum(stages)
            schedules = (0,) if pp == 1 else (0, 1, 2) if pp % 2 == 0 and len(members) == 1 else (0, 1)
            # Sharding less than a schedule allows costs memory and gains nothing: 1 (with stages) or 2, and 3.
            zeros = (0,) if dp * cp == 1 else (2, 3) if pp == 1 else (1, 3)
            micros = [micro for micro in MICRO_BATCH if micro * dp <= job.global_batch]
            for ep, micro, recompute, schedule, zero in product(experts, micros, range(3), schedules, zeros):
                yield (cp, ep, dp, micro, recompute, schedule, zero, pp, *tps, *stages)


def _pipelines(groups: Sequence[int], layers: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(stages on each member, copies).

    Small teams try everything; larger ones of one pool a depth from PIPELINE, of several all chips, half, a quarter.
    """
    if min(groups) < 1:
        return
    if sum(groups) <= SMALL_TEAM:
        for dp in range(1, min(groups) + 1):
            for stages in product(*(range(1, group // dp + 1) for group in groups)):
                if sum(stages) <= layers:
                    yield stages, dp
        return
    if len(groups) == 1:
        for pp in PIPELINE:
            if pp <= min(groups[0], layers):
                for dp in _copies(groups[0] // pp):
                    yield (pp,), dp
        return
    seen = set()
    for dp in _copies(min(groups)):
        most = [group // dp for group in groups]
        for scale in (1.0, 0.5, 0.25):
            stages = tuple(max(1, int(count * scale)) for count in most)
            if sum(stages) <= min(layers, 64) and (stages, dp) not in seen:
                seen.add((stages, dp))
                yield stages, dp


def _copies(most: int) -> list[int]:
    """Numbers of copies to try: all there is room for, and rounder ones that experts divide."""
    if most <= SMALL_TEAM:
        return list(range(1, most + 1))
    top = int(math.log2(most))
    multiples = {most // step * step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256)} - {0}
    return sorted(multiples | {2**top, 2 ** (top - 1)})


def _expert_degrees(experts: int) -> list[int]:
    if not experts:
        return [1]
    return [ep for ep in (2**power for power in range(9)) if experts % ep == 0]
