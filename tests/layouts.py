"""Layouts, drawn at random and by hand, and steps that any of them takes, to be held to those of one process."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from tiny_models import DEEP, FEW, Rows, error, random_model

from motley.model import SIZES, ModelConfig, experts
from motley.parallel import buckets as buckets
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup
from motley.parallel.rank import Ranks
from motley.train.config import PretrainConfig
from motley.train.ngram_targets import NgramCounts, NgramTargets
from motley.train.optimizer import Optimizer, State
from motley.train.step import LossWeights, accumulate
from motley.train.strategy import TrainingState
from motley.train.validation import summed_nats

ROWS, STEPS = 7, 2
FEW_ROWS = 2  # held out: fewer than the lanes of three and more workers
TWO_STAGES = Layout((PipelineGroup(((0, 1),), (1, 3), schedule="zero_bubble", micro_batch=2),), zero=1)


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
        step_weights = dataclasses.replace(weights, ngrams=hints)
        losses = accumulate(model, rows.cut(length), 2 * Rows.seq_len // length, step_weights, confined=True)
        first = first or {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        optimizer.step(0.01)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=False):
            gate.rebalance(counts.to(device), config.bias_speed)
        seen.append((losses.main, losses.mtp, losses.balance, norm, [c.tolist() for c in losses.expert_counts]))
    held_out = summed_nats(model, Rows(), FEW_ROWS, confined=True)  # type: ignore[arg-type]
    return first, seen, {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}, held_out


def pair(state: TrainingState | None) -> tuple[State, State] | None:
    """(weights, optimizer state)."""
    return None if state is None else (dict(state.weights), dict(state.optimizer))


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
        ranks = Ranks(shape, config, layout, comm)
        whole = random_model(seed, shape).state_dict() if comm.leads else None
        ranks.take_state(None if whole is None else (dict(whole), {}))
        if config.ngram_weight and ranks.coordinates.last:
            ranks.learn_ngrams(counted(comm.device))
        gradient, seen = {}, []
        for step in range(STEPS):
            losses, norm = ranks.gradient(ranks.read(Rows(), step))  # type: ignore[arg-type]
            if step == 0:
                gradient = {
                    part.label: (part.name, part.start, part.stop, ranks.buffers.view(part).grad.clone())  # type: ignore[union-attr]
                    for part in ranks.buffers.here
                    if part.owner == comm.rank and ranks.buffers.view(part).grad is not None
                }
            ranks.update(losses, norm, 0.01)
            ranks.share_rows()
            seen.append((losses.main, losses.mtp, losses.balance, norm, [c.tolist() for c in losses.expert_counts]))
        held_out = ranks.held_out_loss(Rows(), FEW_ROWS)  # type: ignore[arg-type]
        state = pair(ranks.state())
        results.append((gradient, seen, state and state[0], held_out))
    return results


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


WIDE = dataclasses.replace(  # weights outweigh the activations of a few short rows
    SIZES["nano"], vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=8, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=2, num_nextn_predict_layers=1,
)  # fmt: skip
MEMORY = (1.0, 3.0, 2.0)


def layout(zero: int) -> Layout:
    groups = tuple(PipelineGroup(((rank,),), (8,), micro_batch=1) for rank in range(3))
    return Layout(groups, zero=zero, memory=MEMORY, rates=(1.0, 3.0, 6.0))  # type: ignore[arg-type]
