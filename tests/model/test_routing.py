"""The router does what the V3 report says, number for number, and balances without touching the weights."""

import dataclasses
import random

import pytest
import torch

from motley.errors import InputError
from motley.model import SIZES, ModelConfig, Transformer
from motley.model.moe import Gate, MoE

BASE = dataclasses.replace(
    SIZES["nano"], vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
)  # fmt: skip


def config(**values) -> ModelConfig:  # type: ignore[no-untyped-def]
    return dataclasses.replace(BASE, **values)


RULES = {
    "V3": config(n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1),
    "V3 groups": config(n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "V3 not normalised": config(n_routed_experts=8, num_experts_per_tok=2, norm_topk_prob=False),
    "V2 greedy": config(
        model_type="deepseek_v2", n_routed_experts=8, num_experts_per_tok=2, scoring_func="softmax",
        topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.5,
    ),
    "V2 groups": config(
        model_type="deepseek_v2", n_routed_experts=12, num_experts_per_tok=3, scoring_func="softmax", n_group=3,
        topk_group=2, topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0,
    ),
}  # fmt: skip


def random_gate(config: ModelConfig, seed: int) -> Gate:
    gate = Gate(config)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(gate.weight, std=0.5, generator=generator)
    if config.topk_method == "noaux_tc":
        gate.e_score_correction_bias.normal_(std=0.3, generator=generator)
    return gate


def route_by_the_report(gate: Gate, token: list[float]) -> dict[int, float]:
    """One token, in Python's own floats: expert → weight."""
    config, weight = gate.config, gate.weight.double().tolist()
    logits = [sum(w * t for w, t in zip(row, token, strict=True)) for row in weight]
    exponentials = [torch.tensor(logit, dtype=torch.float64).exp().item() for logit in logits]
    if config.scoring_func == "sigmoid":
        scores = [e / (1 + e) for e in exponentials]
    else:
        scores = [e / sum(exponentials) for e in exponentials]
    v3 = config.topk_method == "noaux_tc"
    bias = gate.e_score_correction_bias.double().tolist() if v3 else [0.0] * len(scores)
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    allowed = range(len(scores))
    if config.topk_method != "greedy" and config.n_group > 1:
        size = len(scores) // config.n_group
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(config.n_group)]
        worth = [sum(group[:2]) if v3 else group[0] for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: -worth[g])[: config.topk_group]
        allowed = [expert for expert in allowed if expert // size in kept]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config.num_experts_per_tok]
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_router_is_the_reports(rule: str, seed: int) -> None:
    gate = random_gate(RULES[rule], seed)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(100 + seed))
    chosen, weights, _ = gate(x)
    for row, token in enumerate(x.double().tolist()):
        expected = route_by_the_report(gate, token)
        found = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        assert found.keys() == expected.keys()
        for expert, weight in expected.items():
            assert found[expert] == pytest.approx(weight, rel=1e-5)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    gate = random_gate(RULES["V3"], 0)
    gate.e_score_correction_bias.zero_()
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    scores = gate.scores(x)[0]
    worst = int(scores.argmin())
    gate.e_score_correction_bias[worst] = 5.0
    chosen, weights, _ = gate(x)
    assert worst in chosen[0].tolist()
    picked = scores[chosen[0]]
    torch.testing.assert_close(weights[0], picked / picked.sum() * gate.config.routed_scaling_factor)


def test_no_gradient_reaches_the_bias_and_some_reaches_the_router() -> None:
    gate = random_gate(RULES["V3"], 0)
    _, weights, _ = gate(torch.randn(4, 16, generator=torch.Generator().manual_seed(2)))
    (weights * torch.arange(3)).sum().backward()
    assert gate.weight.grad is not None
    assert float(gate.weight.grad.abs().sum()) > 0
    assert not gate.e_score_correction_bias.requires_grad


def test_the_bias_moves_by_gamma_towards_balance() -> None:
    gate = random_gate(RULES["V3"], 0)
    gate.e_score_correction_bias.zero_()
    gate.rebalance(torch.tensor([10, 0, 5, 5, 5, 5, 5, 5]), gamma=0.25)
    assert gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]


def test_balancing_evens_out_an_uneven_load() -> None:
    gate = random_gate(RULES["V3"], 3)
    gate.e_score_correction_bias.zero_()
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(3)) + 0.7

    def spread() -> float:
        counts = torch.bincount(gate(x)[0].flatten(), minlength=8).double()
        return float(counts.max() / counts.mean())

    before = spread()
    for _ in range(300):
        gate.rebalance(torch.bincount(gate(x)[0].flatten(), minlength=8), gamma=0.01)
    assert before > 1.5
    assert spread() < 1.1


def random_moe(seed: int, rule: str = "V3") -> MoE:
    """With a bias, where its rule knows one, that moves most choices."""
    moe = MoE(RULES[rule])
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if RULES[rule].topk_method == "noaux_tc":
        moe.gate.e_score_correction_bias.normal_(std=0.3, generator=generator)
    return moe


def balance_by_the_report(moe: MoE, x: torch.Tensor, weight: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Equations 17 to 20 in float64, with loops: the sum over sequences of T times their loss.

    V3 counts the highest scores themselves (eq. 18), V2 the experts that were chosen (V2 report, eq. 24).
    """
    experts, k = moe.gate.experts, moe.gate.config.num_experts_per_tok
    total = torch.zeros((), dtype=torch.float64)
    for row, kept in zip(x, real, strict=True):
        length = int(kept.sum())
        frequency, share = [0.0] * experts, [torch.zeros((), dtype=torch.float64)] * experts
        for token in row[kept]:
            logits = weight @ token.double()
            scores = logits.sigmoid() if moe.gate.config.scoring_func == "sigmoid" else logits.softmax(dim=0)
            if moe.gate.config.topk_method == "noaux_tc":
                counted = sorted(range(experts), key=lambda expert: -float(scores[expert].detach()))[:k]
            else:
                counted = list(route_by_the_report(moe.gate, token.tolist()))
            for expert in counted:
                frequency[expert] += experts / (k * length)
            for expert in range(experts):
                share[expert] = share[expert] + scores[expert] / scores.sum() / length
        total = total + length * sum(f * p for f, p in zip(frequency, share, strict=True))
    return total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(2))
def test_the_balance_loss_and_its_gradient_are_the_reports_whatever_the_bias_chooses(rule: str, seed: int) -> None:
    moe = random_moe(seed, rule)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, 16, generator=generator)
    real = torch.rand(4, 7, generator=generator) < 0.7
    real[3] = False
    _, routing = moe(x, real)
    routing.balance.backward()
    weight = moe.gate.weight.detach().double().requires_grad_()
    expected = balance_by_the_report(moe, x, weight, real)
    expected.backward()
    assert routing.balance.item() == pytest.approx(expected.item(), rel=1e-5)
    assert moe.gate.weight.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(moe.gate.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_loads_count_the_experts_that_tokens_really_went_to_and_no_padding(rule: str) -> None:
    moe = random_moe(0, rule)
    x = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    real = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    _, routing = moe(x, real)
    counts = [0] * moe.gate.experts
    for token in x[real].double().tolist():
        for expert in route_by_the_report(moe.gate, token):
            counts[expert] += 1
    assert routing.counts.tolist() == counts
    assert int(routing.tokens) == int(real.sum())


def test_a_bias_moves_loads_and_leaves_the_balance_loss_as_it_is() -> None:
    moe = random_moe(0)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    biased = moe(x)[1]
    moe.gate.e_score_correction_bias.zero_()
    plain = moe(x)[1]
    assert not torch.equal(biased.counts, plain.counts)
    assert biased.balance.item() == plain.balance.item()


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_balance_add_up_under_any_split_of_the_batch(seed: int) -> None:
    moe = random_moe(seed)
    chance = random.Random(seed)
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(seed))
    _, whole = moe(x)
    cuts = sorted(chance.sample(range(1, 6), 2))
    parts = [moe(part)[1] for part in x.tensor_split(cuts)]
    assert torch.equal(sum(part.counts for part in parts), whole.counts)  # type: ignore[arg-type]
    assert sum(part.balance.item() for part in parts) == pytest.approx(whole.balance.item(), rel=1e-6)


def tiny_model(seed: int = 0, **values) -> Transformer:  # type: ignore[no-untyped-def]
    model = Transformer(config(n_routed_experts=8, num_experts_per_tok=2, **values))
    model.initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1))
    return model


def test_what_stands_in_another_document_changes_nothing() -> None:
    model = tiny_model()
    ids = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(5))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 7) % 50
    with torch.no_grad():
        confined = (model(ids, documents) - model(other, documents))[0, 5:].abs().max()
        free = (model(ids) - model(other))[0, 5:].abs().max()
    assert float(confined) < 1e-5
    assert float(free) > 0.01, "without documents it would be seen"


def test_padding_is_not_counted_by_any_router() -> None:
    model = tiny_model()
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(6))
    documents = torch.tensor([[0, 0, 0, 0, -1, -1], [0, 0, -1, -1, -1, -1]])
    *main, further = model.hidden(ids, documents).routings
    for routing in main:
        assert int(routing.counts.sum()) == 6 * 2
        assert int(routing.tokens) == 6
    assert int(further.counts.sum()) == 4 * 2, "the last token of each row has none behind it"


@pytest.mark.parametrize("confined", [True, False])
def test_mtp_routers_count_only_positions_whose_further_token_is_in_their_document(confined: bool) -> None:
    model = tiny_model(num_nextn_predict_layers=3)
    ids = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(7))
    documents = torch.tensor([[0] * 8, [0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, -1, -1, -1]])
    attended = documents if confined else documents.clamp(max=0)
    routings = model.hidden(ids, attended, packed=documents).routings[-3:]
    for depth, routing in enumerate(routings, start=1):
        expected = sum(
            1
            for row in documents.tolist()
            for place in range(8 - depth)
            if row[place] == row[place + depth] and row[place] >= 0
        )
        assert int(routing.tokens) == expected, depth
        assert int(routing.counts.sum()) == 2 * expected


def test_what_wraps_around_the_row_reaches_no_load_and_no_balance_loss() -> None:
    """The last position stands beside the first token: another one there changes that position alone."""
    model = tiny_model(num_nextn_predict_layers=1)
    model.gates()[-1].weight.data.mul_(20)  # so that another token means other experts
    ids = torch.randint(50, (64, 6), generator=torch.Generator().manual_seed(8))
    main = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(9))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 11) % 50
    (states, (one,)), (moved, (two,)) = (model.further(main, tokens, None) for tokens in (ids, other))
    assert not torch.allclose(states[0][:, -1], moved[0][:, -1])
    assert torch.equal(one.counts, two.counts)
    assert one.balance.item() == two.balance.item()
    assert int(one.tokens) == 64 * 5


def test_a_token_outside_of_the_vocabulary_is_named_before_it_is_looked_up() -> None:
    model = tiny_model()
    for token in (50, -1):
        ids = torch.full((2, 4), 7)
        ids[1, 2] = token
        with pytest.raises(InputError, match=rf"token {token} at position 6 is outside .* vocabulary of 50 tokens"):
            model(ids)


def test_a_new_model_is_drawn_as_the_report_says_and_the_seed_decides_it() -> None:
    model = Transformer(config(n_routed_experts=8, num_experts_per_tok=2, hidden_size=64))
    model.initialize(1)
    drawn = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
    values = torch.cat([p.detach().flatten() for p in drawn])
    assert float(values.std()) == pytest.approx(0.006, rel=0.02)
    assert abs(float(values.mean())) < 1e-4
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
    again = Transformer(model.config)
    again.initialize(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.initialize(2)
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert all(not gate.e_score_correction_bias.any() for gate in model.gates())
