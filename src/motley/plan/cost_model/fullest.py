"""Bytes on the fullest chip of given layouts: `memory.py`'s parts, summed over the stages as the framework cuts them."""

import numpy as np

from motley.plan.cost_model.configs import Floats, ParallelConfigs
from motley.plan.cost_model.framework import Framework
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
from motley.plan.cost_model.step_time import HeldParameters, NetworkPieces, network_pieces
from motley.plan.network.spec import NetworkSpec


def fullest_bytes(
    shape: NetworkSpec, configs: ParallelConfigs, seq: int, hardware: Hardware, framework: Framework, precision: str
) -> Floats:
    """[candidates] bytes; all layouts must share the same `pp`."""
    pp = int(configs.pp[0])
    pieces = network_pieces(shape, configs, seq, hardware, framework, precision)
    if not framework.balanced_stages or pp == 1:
        return _fullest(shape, configs, seq, framework, pieces, pieces.cut(pp, framework, 0))
    cuts = [pieces.cut(pp, framework, index) for index in range(len(configs))]
    return np.concatenate(
        [_fullest(shape, configs[index], seq, framework, pieces, cut) for index, cut in enumerate(cuts)]
    )


def _fullest(
    shape: NetworkSpec,
    configs: ParallelConfigs,
    seq: int,
    framework: Framework,
    pieces: NetworkPieces,
    cut: list[slice],
) -> Floats:
    """Of the stages `cut`: what each holds, and its activations of the micro-batches in flight there."""
    saved = {block: saved_bytes(block, shape, configs, framework, seq) for block in {*shape.blocks, *shape.mtp}}
    working = np.max([working_bytes(block, shape, configs, framework, seq) for block in saved], axis=0)
    around = buffer_bytes(shape, configs, framework, seq) + working
    logits = logit_bytes(shape, configs, seq)
    fullest = np.zeros(len(configs))
    for number, part in enumerate(cut):
        kinds = pieces.kinds[part]
        held = sum(pieces.held[part], start=HeldParameters(0.0, 0.0))
        if shape.tied and len(cut) == 1:  # one table serves both ends
            held = held + HeldParameters(-float(shape.head.parameters), 0.0)
        states = state_bytes(held.dense / configs.tp, held.experts / (configs.tp * configs.ep), configs, framework)
        kept = in_flight(configs, np.full(len(configs), number)) * sum(
            (saved[block] for _, block in kinds if block is not None), start=np.zeros(len(configs))
        )
        losses = sum(what in ("head", "mtp") for what, _ in kinds)
        fullest = np.maximum(fullest, sum(states) + kept + losses * logits)
    return (1 + FRAGMENTATION) * (fullest + around)
