"""When each chip of a pipeline works on what: the schedules played through, to be drawn and to be checked.

    1f1b          F F F F B F B F B B B B        at most p - i micro-batches in flight on stage i
    zero_bubble   the backward pass in two: gradients of inputs (B) go on at once, those of weights (W) fill gaps
    dualpipe      half of the micro-batches enter at each end; a chip holds stages i and p-1-i (V3 report, 3.2.1)

A free chip takes a backward pass that is ready, else a forward pass while activations have room, else a W.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from motley.plan.layout import Schedule


@dataclass(frozen=True)
class Work:
    """One box: `kind` of work on a micro-batch of a stage, from `start` to `end` seconds."""

    kind: Literal["F", "B", "W"]
    stage: int
    micro_batch: int
    start: float
    end: float


def timeline(seconds: Sequence[tuple[float, float, float]], micro_batches: int, schedule: Schedule) -> list[list[Work]]:
    """What every chip of one copy does in a step.

    Args:
        seconds: of each stage and micro-batch: forward, gradients of inputs, gradients of weights.
        micro_batches: of the step.
        schedule: how they are ordered.
    """
    pp, split = len(seconds), schedule != "1f1b"
    mirrored = [micro >= (micro_batches + 1) // 2 and schedule == "dualpipe" for micro in range(micro_batches)]
    room = [pp + 1 if schedule == "dualpipe" else pp - chip for chip in range(pp)]
    waiting: list[list[tuple[str, int, int]]] = [[] for _ in range(pp)]  # ready (kind, micro-batch, stage) of a chip
    done: list[list[Work]] = [[] for _ in range(pp)]
    flying, busy = [0] * pp, [False] * pp
    ends: list[tuple[float, int, str, int, int]] = []  # (end, chip, kind, micro-batch, stage)

    def chip_of(stage: int, micro: int) -> int:
        return pp - 1 - stage if mirrored[micro] else stage

    def begin(chip: int, now: float) -> None:
        """Let a free chip take what is most urgent."""
        choices = [work for work in waiting[chip] if work[0] != "F" or flying[chip] < room[chip]]
        if busy[chip] or not choices:
            return
        work = min(choices, key=lambda work: ("BFW".index(work[0]), work[1]))
        kind, micro, stage = work
        waiting[chip].remove(work)
        forward, inputs, weights = seconds[stage]
        takes = {"F": forward, "B": inputs if split else inputs + weights, "W": weights}[kind]
        flying[chip] += kind == "F"
        busy[chip] = True
        done[chip].append(Work(kind, stage, micro, now, now + takes))  # type: ignore[arg-type]
        heapq.heappush(ends, (now + takes, chip, kind, micro, stage))

    for micro in range(micro_batches):
        waiting[chip_of(0, micro)].append(("F", micro, 0))
    for chip in range(pp):
        begin(chip, 0.0)
    while ends:
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, chip, kind, micro, stage = heapq.heappop(ends)
            busy[chip] = False
            if kind == "F":
                after = ("F", micro, stage + 1) if stage < pp - 1 else ("B", micro, stage)
                waiting[chip_of(after[2], micro)].append(after)
            elif kind == "B":
                flying[chip] -= 1
                if stage:
                    waiting[chip_of(stage - 1, micro)].append(("B", micro, stage - 1))
                if split:
                    waiting[chip].append(("W", micro, stage))
        for chip in range(pp):
            begin(chip, now)
    return done
