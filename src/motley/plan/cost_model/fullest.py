"""Bytes on the fullest chip of given layouts: `memory.py`'s parts, summed over the stages as the engine cuts them."""

import numpy as np

from motley.plan.cost_model.configs import Floats, Layouts
from motley.plan.cost_model.framework import Engine
from motley.plan.cost_model.hardware import Hardware
from motley.plan.cost_model.memory import (
    FRAGMENTATION,
    buffer_bytes,
    in_flight,
    logit_bytes,
    saved_bytes,
    state_bytes,
    working_bytes,
)
from motley.plan.cost_model.step_time import Held, Items, items
from motley.plan.network.spec import Shape


def fullest_bytes(
    shape: Shape, layouts: Layouts, seq: int, hardware: Hardware, engine: Engine, precision: str
) -> Floats:
    """[candidates] bytes; all layouts must share the same `pp`."""
    pp = int(layouts.pp[0])
    pieces = items(shape, layouts, seq, hardware, engine, precision)
    if not engine.balanced_stages or pp == 1:
        return _fullest(shape, layouts, seq, engine, pieces, pieces.cut(pp, engine, 0))
    cuts = [pieces.cut(pp, engine, index) for index in range(len(layouts))]
    return np.concatenate([_fullest(shape, layouts[index], seq, engine, pieces, cut) for index, cut in enumerate(cuts)])


def _fullest(shape: Shape, layouts: Layouts, seq: int, engine: Engine, pieces: Items, cut: list[slice]) -> Floats:
    """Of the stages `cut`: what each holds, and its activations of the micro-batches in flight there."""
    saved = {block: saved_bytes(block, shape, layouts, engine, seq) for block in {*shape.blocks, *shape.mtp}}
    working = np.max([working_bytes(block, shape, layouts, engine, seq) for block in saved], axis=0)
    around = buffer_bytes(shape, layouts, engine, seq) + working
    logits = logit_bytes(shape, layouts, seq)
    fullest = np.zeros(len(layouts))
    for number, part in enumerate(cut):
        kinds = pieces.kinds[part]
        held = sum(pieces.held[part], start=Held(0.0, 0.0))
        if shape.tied and len(cut) == 1:  # one table serves both ends
            held = held + Held(-float(shape.head.parameters), 0.0)
        states = state_bytes(held.dense / layouts.tp, held.experts / (layouts.tp * layouts.ep), layouts, engine)
        kept = in_flight(layouts, np.full(len(layouts), number)) * sum(
            (saved[block] for _, block in kinds if block is not None), start=np.zeros(len(layouts))
        )
        losses = sum(what in ("head", "mtp") for what, _ in kinds)
        fullest = np.maximum(fullest, sum(states) + kept + losses * logits)
    return (1 + FRAGMENTATION) * (fullest + around)
