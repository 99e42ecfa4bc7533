"""When each chip of a pipeline computes which micro-batch: schedules simulated, to be drawn and to be checked.

    1f1b          F F F F B F B F B B B B        at most p - i micro-batches in flight on stage i
    zero_bubble   the backward pass in two: gradients of inputs (B) go on at once, those of weights (W) fill gaps
    dualpipe      half of the micro-batches enter at each end; a chip holds stages i and p-1-i (V3 report, 3.2.1)

A free chip takes a backward pass that is ready, else a forward pass while activations have room, else a W. Stage i of
p has room for p - i micro-batches of each direction; so a chip of DualPipe holds at most p + 1.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from motley.plan.cost_model.configs import Schedule

WorkKind = Literal["F", "B", "W"]


@dataclass(frozen=True)
class TracedWork:
    """One box: `kind` of work on a micro-batch of a stage, from `start` to `end` seconds."""

    kind: WorkKind
    stage: int
    micro_batch: int
    start: float
    end: float


def timeline(
    seconds: Sequence[tuple[float, float, float]], micro_batches: int, schedule: Schedule
) -> list[list[TracedWork]]:
    """What every chip of one replica does in a step.

    Args:
        seconds: of each stage and micro-batch: forward, gradients of inputs, gradients of weights.
        micro_batches: of the step.
        schedule: how they are ordered.
    """
    pp, split = len(seconds), schedule != "1f1b"
    half = (micro_batches + 1) // 2 if schedule == "dualpipe" else micro_batches  # from here on from the other end
    done: list[list[TracedWork]] = [[] for _ in range(pp)]
    ready: list[dict[tuple[WorkKind, int], list[int]]] = [
        {} for _ in range(pp)
    ]  # of a chip: (kind, stage) → micro-batches
    flying: dict[tuple[int, bool], int] = {}  # (stage, from the other end) → micro-batches
    busy = [False] * pp
    ends: list[tuple[float, int, WorkKind, int, int]] = []  # (end, chip, kind, micro-batch, stage)

    def add(kind: WorkKind, micro: int, stage: int) -> None:
        chip = pp - 1 - stage if micro >= half else stage
        heapq.heappush(ready[chip].setdefault((kind, stage), []), micro)

    def urgency(choice: tuple[WorkKind, int]) -> tuple[int, int]:
        """Backward before forward before W, late stages before early ones: both bring micro-batches to their end."""
        return "BFW".index(choice[0]), -choice[1]

    def begin(chip: int, now: float) -> None:
        """Let a free chip take what is most urgent."""
        if busy[chip]:
            return
        for kind, stage in sorted(ready[chip], key=urgency):
            choices = ready[chip][kind, stage]
            if not choices:
                continue
            micro = choices[0]
            inside = flying.get((stage, micro >= half), 0)
            if kind == "F" and inside >= pp - stage:
                continue
            heapq.heappop(choices)
            flying[stage, micro >= half] = inside + (kind == "F")
            forward, inputs, weights = seconds[stage]
            takes = {"F": forward, "B": inputs if split else inputs + weights, "W": weights}[kind]
            busy[chip] = True
            done[chip].append(TracedWork(kind, stage, micro, now, now + takes))
            heapq.heappush(ends, (now + takes, chip, kind, micro, stage))
            return

    for micro in range(micro_batches):
        add("F", micro, 0)
    for chip in range(pp):
        begin(chip, 0.0)
    while ends:
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, chip, kind, micro, stage = heapq.heappop(ends)
            busy[chip] = False
            if kind == "F" and stage < pp - 1:
                add("F", micro, stage + 1)
            elif kind == "F":
                add("B", micro, stage)
            elif kind == "B":
                flying[stage, micro >= half] -= 1
                if stage:
                    add("B", micro, stage - 1)
                if split:
                    add("W", micro, stage)
        for chip in range(pp):
            begin(chip, now)
    return done
