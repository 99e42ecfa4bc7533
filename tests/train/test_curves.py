"""Over many steps, too, a crew's losses are those of a single process: nothing drifts apart.

Rounding keeps them 2e-7 apart, after 20 steps as after 200. What is wrong grows: a learning rate that is 0.1 % off on
one rank makes 4e-6 within 20 steps, momentum that one rank loses at step 20 makes 1e-6 to 6e-3 by step 30.
"""

from functools import cache
from typing import Any

import pytest
import torch
from layouts import ROWS, settings
from spawned_ranks import on_ranks
from tiny_models import DEEP, FEW, Rows, random_model

from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup
from motley.parallel.rank import Ranks
from motley.train.optimizer import Optimizer, OptimizerName
from motley.train.step import LossWeights, accumulate

STEPS = 40
LEARNING_RATE = 5e-4
"""At four times this rate a single process parts from itself (0.6 %) once its micro-batch is another: rounding tips a
router over."""

LAYOUTS = {
    "three side by side, uneven": Layout(
        (PipelineGroup(((0,), (1,), (2,)), (4,), micro_batch=2),), zero=1, memory=(1.0, 5.0, 2.0), rates=(1.0, 0.3, 3.0)
    ),
    "a pipeline of 1 and 3 layers beside a whole model": Layout(
        (PipelineGroup(((0, 1),), (1, 3), schedule="zero_bubble", micro_batch=2),
         PipelineGroup(((2,),), (4,), micro_batch=3)),
        zero=0,
    ),
    "experts 1 and 3 on two workers, one apart": Layout(
        (PipelineGroup(((0,), (1,)), (4,), experts=(1, 3), micro_batch=2), PipelineGroup(((2,),), (4,), micro_batch=1)),
        zero=1,
    ),
    "gradients kept once (ZeRO 2) by two workers, one with little memory": Layout(
        tuple(PipelineGroup(((rank,),), (4,), micro_batch=size) for rank, size in enumerate((2, 3))),
        zero=2, memory=(1.0, 5.0), rates=(1.0, 0.5),
    ),
    "weights kept once (ZeRO 3) by two workers, one with little memory": Layout(
        tuple(PipelineGroup(((rank,),), (4,), micro_batch=size) for rank, size in enumerate((2, 4))),
        zero=3, memory=(4.0, 1.0), rates=(1.0, 2.0),
    ),
}  # fmt: skip
BY_ADAMW = [name for name in LAYOUTS if "(ZeRO 3)" in name]


@cache
def of_one_process(name: OptimizerName) -> list[float]:
    experts.PAD = FEW
    config, model = settings(optimizer=name), random_model(0, DEEP)
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, torch.float32)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = accumulate(
            model, Rows().rows(step * ROWS, ROWS), 2, LossWeights(config.mtp_weight, config.balance_weight), True
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step(LEARNING_RATE)
        for gate, counts in zip(model.gates(), found.expert_counts, strict=False):
            gate.rebalance(counts, config.bias_speed)
        losses.append(found.main)
    return losses


def of_a_crew(comm: Communicator, layout: Layout, optimizer: OptimizerName) -> list[float]:
    experts.PAD = FEW
    ranks = Ranks(DEEP, settings(optimizer=optimizer), layout, comm)
    whole: dict[str, Any] | None = dict(random_model(0, DEEP).state_dict()) if comm.leads else None
    ranks.take_state(None if whole is None else (whole, {}))
    losses = []
    for step in range(STEPS):
        found, norm = ranks.gradient(ranks.read(Rows(), step))  # type: ignore[arg-type]
        ranks.update(found, norm, LEARNING_RATE)
        ranks.share_rows()
        losses.append(found.main)
    return losses


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "muon") for name in LAYOUTS), *((n, "adamw") for n in BY_ADAMW)]
)
def test_the_losses_of_40_steps_are_those_of_a_single_process(name: str, optimizer: OptimizerName):
    expected = of_one_process(optimizer)
    losses = on_ranks(LAYOUTS[name].workers, of_a_crew, LAYOUTS[name], optimizer)[0]
    assert max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, expected, strict=True)) <= 1e-6
