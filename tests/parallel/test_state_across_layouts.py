"""What one layout wrote any other goes on from: weights, momentum and moments land where the new layout keeps them."""

import dataclasses
from typing import Any

import pytest
import torch
from layouts import pair, settings
from spawned_ranks import on_ranks
from tiny_models import DEEP, FEW, Rows, error, random_model

from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.rank import Ranks

CHAIN = [  # each takes over from the one before
    dataclasses.replace(side_by_side(3, 4, 2, zero=1), memory=(1.0, 4.0, 1.0)),
    Layout(
        (
            PipelineGroup(((0, 1),), (1, 3), schedule="zero_bubble", micro_batch=2),
            PipelineGroup(((2,),), (4,), micro_batch=3),
        ),
        zero=0,
    ),
    dataclasses.replace(side_by_side(3, 4, 2, zero=3), memory=(3.0, 1.0, 1.0)),
    Layout(
        (PipelineGroup(((0,), (1,)), (4,), experts=(1, 3), micro_batch=2), PipelineGroup(((2,),), (4,), micro_batch=1)),
        zero=1,
    ),
    dataclasses.replace(side_by_side(3, 4, 2, zero=2), memory=(1.0, 1.0, 4.0)),
]


def take_turns(comm: Communicator, layouts: list[Layout], optimizer: str) -> Any:
    """(losses of a step by each layout, weights, optimizer state at the end), the state handed on each time."""
    experts.PAD = FEW
    state: Any = (dict(random_model(5, DEEP).state_dict()), {}) if comm.leads else None
    losses = []
    for step, layout in enumerate(layouts):
        ranks = Ranks(DEEP, settings(optimizer=optimizer), layout, comm)
        ranks.take_state(state)
        found, norm = ranks.gradient(ranks.read(Rows(), step))  # type: ignore[arg-type]
        ranks.update(found, norm, 0.01)
        losses.append((found.main, norm))
        if (state := pair(ranks.state())) is not None:
            state = tuple({name: tensor.clone() for name, tensor in kind.items()} for kind in state)
    return losses, state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_layouts_that_take_over_from_each_other_train_as_one_process_does(optimizer: str):
    losses, state = on_ranks(3, take_turns, CHAIN, optimizer)[0]
    alone = [side_by_side(1, 4, 2)] * len(CHAIN)
    expected, (weights, states) = on_ranks(1, take_turns, alone, optimizer)[0]
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for found, wanted in zip(state, (weights, states), strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert error(found[name], tensor) <= 1e-4, name
    assert any(torch.count_nonzero(tensor) for tensor in states.values())
