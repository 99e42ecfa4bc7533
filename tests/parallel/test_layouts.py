"""Any layout of any crew takes the step of a single process: gradient, losses, router loads, weights after updates."""

import random
from typing import Any

import pytest
import torch
from layouts import ROWS, STEPS, TWO_STAGES, assert_same_steps, pair, random_layout, settings, take_steps
from spawned_ranks import on_ranks
from tiny_models import DEEP, FEW, ODD, Rows, random_model

from motley.model import ModelConfig, experts
from motley.parallel import buckets as buckets
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup
from motley.parallel.pipeline.runner import order
from motley.parallel.rank import Ranks
from motley.train.config import PretrainConfig
from motley.train.optimizer import Optimizer
from motley.train.step import LossWeights, accumulate
from motley.train.validation import summed_nats


def odd_steps(comm: Communicator, name: str, recompute: bool) -> Any:
    experts.PAD = FEW
    config = settings(recompute=recompute)
    ranks = Ranks(ODD[name], config, TWO_STAGES, comm)
    whole = dict(random_model(3, ODD[name]).state_dict()) if comm.leads else None
    ranks.take_state(None if whole is None else (whole, {}))
    losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
    ranks.update(losses, norm, 0.01)
    held_out = ranks.held_out_loss(Rows(), 1)  # type: ignore[arg-type]
    state = pair(ranks.state())
    return losses.main, losses.balance, norm, held_out, state and sorted(state[0])


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_in_two_stages_too(name: str):
    (first, _), config = on_ranks(2, odd_steps, name, name == "V2"), settings()
    model = random_model(3, ODD[name])
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, torch.float32)
    losses = accumulate(model, Rows().rows(0, ROWS), 2, LossWeights(0.3, 0.05), confined=True)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    optimizer.step(0.01)
    for gate, counts in zip(model.gates(), losses.expert_counts, strict=False):
        gate.rebalance(counts, config.bias_speed)
    assert first[:3] == pytest.approx((losses.main, losses.balance, norm), rel=1e-5)
    assert first[3] == pytest.approx(summed_nats(model, Rows(), 1, confined=True), rel=1e-4)  # type: ignore[arg-type]
    tied = {"lm_head.weight"} if ODD[name].tie_word_embeddings else set()
    assert set(first[4]) == set(model.state_dict()) - tied


STARVED = 2  # the expert that no token goes to
APART = ((0,), (1,))  # two lanes of one worker each
SHARING_OUT = {
    **{f"ZeRO {level}": Layout((PipelineGroup(APART, (4,), micro_batch=2),), zero=level) for level in (0, 1, 2, 3)},
    "spread experts": Layout((PipelineGroup(APART, (4,), experts=(3, 1), micro_batch=2),), zero=1),
    "two stages": TWO_STAGES,
}


def starve(model: Any) -> None:
    for gate in model.gates():
        gate.e_score_correction_bias[STARVED] = -100.0


def starved_steps(comm: Communicator) -> Any:
    """Weights of the whole model after two steps in which an expert gets no token, by layout."""
    experts.PAD, buckets.MESSAGE_BYTES = FEW, 1 << 14
    found = {}
    for name, layout in SHARING_OUT.items():
        ranks = Ranks(DEEP, settings(), layout, comm)
        model = random_model(4, DEEP)
        starve(model)
        ranks.take_state((dict(model.state_dict()), {}) if comm.leads else None)
        for step in range(STEPS):
            losses, norm = ranks.gradient(ranks.read(Rows(), step))  # type: ignore[arg-type]
            ranks.update(losses, norm, 0.01)
        found[name] = pair(ranks.state())
    return found


def test_an_expert_without_tokens_stays_as_it_is_whoever_updates_it():
    (found, _), config = on_ranks(2, starved_steps), settings()
    model = random_model(4, DEEP)
    starve(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, torch.float32)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = accumulate(model, Rows().rows(step * ROWS, ROWS), 2, LossWeights(0.3, 0.05), confined=True)
        assert all(int(counts[STARVED]) == 0 for counts in losses.expert_counts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step(0.01)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=True):
            gate.rebalance(counts, config.bias_speed)
    for layout, (weights, _) in found.items():
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{layout}: {name}")
            if ".mlp.experts." in name:
                assert torch.equal(weights[name][STARVED], before[name][STARVED]), (layout, name)
                assert not torch.equal(weights[name][0], before[name][0])


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_an_order_does_everything_once_and_never_holds_more_than_its_place_allows(schedule):
    for stages in range(1, 6):
        for count in range(9):
            for stage in range(stages):
                todo = order(schedule, stage, stages, count)
                split = schedule == "zero_bubble" and stages > 1
                kinds = "FBW" if split else "FB"
                assert sorted(todo) == sorted((kind, micro) for kind in kinds for micro in range(count))
                held, most, seen = 0, 0, set()
                for kind, micro in todo:
                    held += {"F": 1, "B": 0 if split else -1, "W": -1}[kind]
                    most = max(most, held)
                    seen.add((kind, micro))
                    assert kind == "F" or ("F", micro) in seen
                    assert kind != "W" or ("B", micro) in seen
                assert most <= (stages if split else stages - stage)


@pytest.mark.slow(60)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_layout_takes_the_step_of_a_single_process(size: int):
    chance = random.Random(size)
    cases = []
    for number in range(4 if size == 1 else 14):
        optimizer = chance.choice(["muon", "adamw"])
        mtp = chance.choice([0.0, 0.3])
        warmup: dict[str, Any] = {"steps": STEPS, "seq_len_warmup": ("", "6:0.4")[number % 2]}  # rows of 12 tokens
        # More would let slopes all but vanish, and Adam takes their sign.
        warmup["ngram_weight"] = (0.0, 0.0, 0.3)[number % 3]
        cases.append((random_layout(size, chance), settings(optimizer=optimizer, mtp_weight=mtp, **warmup), number))
    assert_same_steps(on_ranks(size, take_steps, cases), cases)


def take_steps_by_copies(comm: Communicator, cases: list[tuple[Layout, PretrainConfig, int]]) -> list[Any]:
    Communicator.posted = lambda self, tensor: tensor.clone()  # of this process alone, which ends with the crew
    return take_steps(comm, cases)


@pytest.mark.slow(15)
def test_what_travels_through_the_hosts_memory_is_the_same_step():
    """Copies stand in for a GPU's memory: nothing may come back before it has arrived, or not at all."""
    chance = random.Random(11)
    cases = [(random_layout(3, chance), settings(mtp_weight=0.3), number) for number in range(6)]
    groups = tuple(PipelineGroup(((rank,),), (DEEP.num_hidden_layers,), micro_batch=rank + 1) for rank in range(3))
    cases += [(Layout(groups, zero=zero), settings(), zero) for zero in (2, 3)]  # type: ignore[arg-type]
    assert_same_steps(on_ranks(3, take_steps_by_copies, cases), cases)


HANGING = (1.0, 3.0, 6.0)
"""Micro-batches of three workers in a step: with unequal numbers, sharded engines wait for each other for ever."""


@pytest.mark.slow(15)
@pytest.mark.parametrize("shape", [DEEP, *ODD.values()], ids=["V3", *ODD])
def test_sharded_gradients_and_weights_take_the_step_whatever_the_workers_rows(shape: ModelConfig):
    """Ten rows as 1/3/6, as 10/0/0 (two only keep what is shared) and as they come, in micro-batches of 1, 2 and 3."""
    chance = random.Random(7)
    cases = []
    for zero in (2, 3):
        rows = [(HANGING, (1, 1, 1)), ((1.0, 1e-3, 1e-3), (3, 1, 2)), ((1.0, 1.0, 1.0), (2, 1, 3))]
        for rates, sizes in rows if shape == DEEP else rows[:1]:
            groups = tuple(
                PipelineGroup(((rank,),), (DEEP.num_hidden_layers,), micro_batch=size)
                for rank, size in enumerate(sizes)
            )
            memory = tuple(chance.choice([0.0, 1.0, 5.0]) for _ in range(2))
            layout = Layout(groups, zero=zero, memory=(*memory, 2.0), rates=rates)  # type: ignore[arg-type]
            chosen: dict[str, Any] = {
                "optimizer": chance.choice(["muon", "adamw"]),
                "recompute": chance.choice([False, True]),
            }
            chosen["ngram_weight"] = (0.3, 0.0)[len(cases) % 2]
            cases.append((layout, settings(batch_rows=10, **chosen), len(cases)))
    assert_same_steps(on_ranks(3, take_steps, cases, shape, seconds=120), cases, shape)
