"""Any layout of any crew takes the step of a single process: gradient, losses, router loads, weights after updates."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from spawned_ranks import on_ranks
from test_gradients import SHAPE, random_batch, random_model

from motley.data.stream import Batch
from motley.model import ModelConfig, experts
from motley.parallel import buckets as buckets
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup
from motley.parallel.pipeline.runner import order
from motley.parallel.rank import Worker
from motley.train.config import PretrainConfig
from motley.train.ngram_targets import NgramCounts, NgramTargets
from motley.train.optimizer import Optimizer
from motley.train.step import LossWeights, accumulate
from motley.train.validation import summed_nats

ROWS, STEPS = 7, 2
FEW_ROWS = 2  # held out: fewer than the lanes of three and more workers
FEW = 4  # rows of an expert are padded to a multiple: every new number of rows costs a kernel's compilation
DEEP = dataclasses.replace(SHAPE, num_hidden_layers=4, first_k_dense_replace=1)


class Rows:
    """A stream of random rows, a pure function of the position, as `TokenStream` is."""

    seq_len, rows_per_epoch = 12, 100

    def rows(self, position: int, count: int) -> Batch:
        whole = [random_batch(row, rows=2) for row in range(position, position + count)]
        parts = zip(*((b.input_ids[1:], b.targets[1:], b.documents[1:]) for b in whole), strict=True)
        return Batch(*(torch.cat(tensors) for tensors in parts))


def settings(**chosen: Any) -> PretrainConfig:
    return PretrainConfig(
        **{"batch_rows": ROWS, "micro_batch": 2, "seq_len": 12, "balance_weight": 0.05, "clip": 0.5, **chosen},
        confine_to_document=True,
    )


def random_layout(size: int, chance: random.Random) -> Layout:
    """Workers dealt into teams; each team cut into lanes, stages, expert groups at random."""
    ranks = list(range(size))
    groups = []
    while ranks:
        count = chance.randint(1, len(ranks))
        own, ranks = ranks[:count], ranks[count:]
        stages = chance.choice([s for s in (1, 2, 3, 4) if count % s == 0])
        width = count // stages
        by_stage = [own[stage * width : (stage + 1) * width] for stage in range(stages)]
        replicas = tuple(tuple(by_stage[stage][replica] for stage in range(stages)) for replica in range(width))
        layers = (0,)
        while sum(layers) != DEEP.num_hidden_layers:  # only ends may hold nothing but embedding or head
            middle = [chance.randint(1, 2) for _ in range(stages - 2)]
            layers = (chance.randint(0, 4), *middle, chance.randint(0, 4))[:stages] if stages > 1 else (4,)
        sharing = chance.choice([e for e in (1, 2, 4) if width % e == 0])
        spread: tuple[int, ...] = ()
        if sharing > 1:
            cuts = sorted(chance.sample(range(1, DEEP.n_routed_experts), sharing - 1))
            ends = [0, *cuts, DEEP.n_routed_experts]
            spread = tuple(ends[i + 1] - ends[i] for i in range(sharing))
        schedule = chance.choice(["1f1b", "zero_bubble"])
        groups.append(PipelineGroup(replicas, layers, spread, schedule, micro_batch=chance.randint(1, 3)))  # type: ignore[arg-type]
    replicas = sum(len(group.replicas) for group in groups)
    whole = all(group.stages == group.expert_replicas == 1 for group in groups)  # what ZeRO 2 and 3 are for
    return Layout(
        tuple(groups),
        zero=chance.choice([0, 1, 2, 3] if whole else [0, 1]),  # type: ignore[arg-type]
        memory=tuple(chance.choice([1.0, 2e9, 5e9]) for _ in range(size)),  # none, or plenty
        rates=tuple(chance.choice([0.01, 1.0, 3.0]) for _ in range(replicas)),
    )


def of_one_process(
    config: PretrainConfig, model_seed: int, shape: ModelConfig = DEEP, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], list[Any], dict, float]:
    """(gradient of the first step, losses of all steps, weights after them, held-out loss) by the plain reference."""
    experts.PAD = FEW
    model = random_model(model_seed, shape).to(device)
    optimizer = Optimizer(model.named_parameters(), config.optimizer, config.weight_decay, torch.float32)
    weights = LossWeights(config.mtp_weight, config.balance_weight)
    first: dict[str, torch.Tensor] = {}
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows, length = Rows().rows(step * config.batch_rows, config.batch_rows), config.length(step)
        hints = NgramTargets(counted(device), config.ngram_weight) if config.ngram_weight else None
        step_weights = dataclasses.replace(weights, hints=hints)
        losses = accumulate(model, rows.cut(length), 2 * Rows.seq_len // length, step_weights, confined=True)
        first = first or {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step(0.01)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=False):
            gate.rebalance(counts.to(device), config.bias_speed)
        seen.append((losses.main, losses.mtp, losses.balance, norm, [c.tolist() for c in losses.expert_counts]))
    held_out = summed_nats(model, Rows(), FEW_ROWS, confined=True)  # type: ignore[arg-type]
    return first, seen, {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}, held_out


def counted(device: str | torch.device = "cpu") -> NgramCounts:
    """Of the rows of the first steps, as if they were a text."""
    return NgramCounts.of(Rows().rows(0, 40).input_ids.flatten().numpy(), DEEP.vocab_size, torch.device(device))


def take_steps(
    comm: Communicator,
    layouts: list[tuple[Layout, PretrainConfig, int]],
    shape: ModelConfig = DEEP,
    message_bytes: int = 1 << 14,
) -> list[Any]:
    """What every layout of the list makes of the same steps."""
    experts.PAD, buckets.MESSAGE_BYTES = FEW, message_bytes
    results = []
    for layout, config, seed in layouts:
        worker = Worker(shape, config, layout, comm)
        whole = random_model(seed, shape).state_dict() if comm.leads else None
        worker.take_state(None if whole is None else (dict(whole), {}))
        if config.ngram_weight and worker.place.last:
            worker.learn_ngrams(counted(comm.device))
        gradient, seen = {}, []
        for step in range(STEPS):
            losses, norm = worker.gradient(Rows(), step)  # type: ignore[arg-type]
            if step == 0:
                gradient = {
                    part.label: (part.name, part.start, part.stop, worker.shards.view(part).grad.clone())  # type: ignore[union-attr]
                    for part in worker.shards.here
                    if part.owner == comm.rank and worker.shards.view(part).grad is not None
                }
            worker.update(losses, norm, 0.01)
            worker.share_again()
            seen.append((losses.main, losses.mtp, losses.balance, norm, [c.tolist() for c in losses.expert_counts]))
        held_out = worker.held_out_loss(Rows(), FEW_ROWS)  # type: ignore[arg-type]
        state = worker.whole_state()
        results.append((gradient, seen, state and state[0], held_out))
    return results


ODD = {  # shapes that the sweep above does not draw
    "tied": dataclasses.replace(DEEP, tie_word_embeddings=True),
    "dense, no MTP": dataclasses.replace(DEEP, n_routed_experts=None, num_nextn_predict_layers=0),
    "V2": dataclasses.replace(
        DEEP, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False
    ),
}
TWO_STAGES = Layout((PipelineGroup(((0, 1),), (1, 3), schedule="zero_bubble", micro_batch=2),), zero=1)


def odd_steps(comm: Communicator, name: str, recompute: bool) -> Any:
    experts.PAD = FEW
    config = settings(recompute=recompute)
    worker = Worker(ODD[name], config, TWO_STAGES, comm)
    whole = dict(random_model(3, ODD[name]).state_dict()) if comm.leads else None
    worker.take_state(None if whole is None else (whole, {}))
    losses, norm = worker.gradient(Rows(), 0)  # type: ignore[arg-type]
    worker.update(losses, norm, 0.01)
    held_out = worker.held_out_loss(Rows(), 1)  # type: ignore[arg-type]
    state = worker.whole_state()
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
        worker = Worker(DEEP, settings(), layout, comm)
        model = random_model(4, DEEP)
        starve(model)
        worker.take_state((dict(model.state_dict()), {}) if comm.leads else None)
        for step in range(STEPS):
            losses, norm = worker.gradient(Rows(), step)  # type: ignore[arg-type]
            worker.update(losses, norm, 0.01)
        found[name] = worker.whole_state()
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


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


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


def assert_same_steps(
    by_worker: list[Any],
    cases: list[tuple[Layout, PretrainConfig, int]],
    shape: ModelConfig = DEEP,
    device: str = "cpu",
) -> None:
    """`device`: of the single process."""
    for index, (layout, config, seed) in enumerate(cases):
        expected, losses, weights, held_out = of_one_process(config, seed, shape, device)
        found: dict[str, torch.Tensor] = {name: torch.full_like(grad, torch.nan) for name, grad in expected.items()}
        for worker in by_worker:
            gradient, seen, _, measured = worker[index]
            assert measured == pytest.approx(held_out, rel=1e-4), layout
            for name, start, stop, grad in gradient.values():
                found[name][start:stop] = grad.view_as(found[name][start:stop])
            for step, (ours, theirs) in enumerate(zip(seen, losses, strict=True)):
                assert ours[:4] == pytest.approx(theirs[:4], rel=1e-5, abs=1e-7), (layout, step)
                assert ours[4] == theirs[4], (layout, step)
        flat, flat_expected = (torch.cat([side[name].flatten() for name in expected]) for side in (found, expected))
        assert error(flat, flat_expected) <= 1e-6, layout
        for name, grad in expected.items():  # of a few numbers alone, rounding takes a little more
            assert error(found[name], grad) <= 1e-5, (layout, name)
        state = by_worker[0][index][2]
        tied = {"lm_head.weight"} if shape.tie_word_embeddings else set()
        assert state.keys() == weights.keys() - tied
        for name, tensor in state.items():
            assert error(tensor, weights[name]) <= 1e-4, (layout, name)


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
