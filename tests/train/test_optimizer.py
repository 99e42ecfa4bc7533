"""Muon, AdamW, schedules and the guard do what they say, against versions written out plainly."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn

from motley.model import native
from motley.train.loss_spike import PATIENCE, WINDOW, LossSpikeGuard
from motley.train.lr_schedule import factor
from motley.train.optimizer import MOMENTS, Optimizer, as_matrices, by_muon, learning, orthogonalize


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (20, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 12),
        "model.layers.0.mlp.down_proj.weight": (12, 8),
        "model.layers.1.mlp.experts.gate_up_proj": (3, 2 * 5, 8),
        "model.layers.1.mlp.experts.down_proj": (3, 8, 5),
        "model.layers.1.mlp.gate.weight": (3, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (20, 8),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic steps on one matrix in float64 (Jordan et al. 2024)."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_by_hand(weight: torch.Tensor, grads: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    """All of Muon for one matrix, step by step, in float64."""
    weight, momentum = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad.double()
        ahead = 0.05 * grad.double() + 0.95 * momentum
        update = newton_schulz(ahead) if ahead.shape[0] <= ahead.shape[1] else newton_schulz(ahead.T).T
        weight = weight * (1 - rate * decay) - rate * 0.2 * math.sqrt(max(weight.shape)) * update
    return weight


def test_muon_takes_linear_maps_and_leaves_tables_routers_and_vectors_to_adamw() -> None:
    taken = [name for name, parameter in parameters().items() if by_muon("muon", name, parameter.dim())]
    assert taken == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]


@pytest.mark.parametrize("at_once", [1 << 22, 100, 1])
def test_muon_equals_one_matrix_after_another_by_hand(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motley.train.optimizer.NUMBERS_AT_ONCE", at_once)
    named = parameters()
    optimizer = Optimizer(named.items(), "muon", weight_decay=0.1, dtype=torch.float32)
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for step in range(3):
        give_gradients(named, seed=10 + step)
        for name, parameter in named.items():
            assert parameter.grad is not None
            grads[name].append(parameter.grad.clone())
        optimizer.step(0.01)
    for name in optimizer.matrices:
        found = as_matrices(name, named[name].detach())
        first = as_matrices(name, start[name])
        history = [as_matrices(name, grad) for grad in grads[name]]
        for index in range(len(found)):
            expected = muon_by_hand(first[index], [grad[index] for grad in history], 0.01, 0.1)
            torch.testing.assert_close(found[index].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_what_muon_leaves_is_torchs_adamw(kind: str) -> None:
    named, plain = parameters(), parameters()
    optimizer = Optimizer(named.items(), kind, weight_decay=0.1, dtype=torch.float32)  # type: ignore[arg-type]
    others = {name: plain[name] for name in optimizer.others}
    assert len(others) == (4 if kind == "muon" else len(named))
    groups = [
        {"params": [p for p in others.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in others.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(3):
        give_gradients(named, step)
        give_gradients(plain, step)
        optimizer.step(0.02)
        reference.step()
    for name, parameter in others.items():
        torch.testing.assert_close(named[name], parameter)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_moments_in_bf16_are_rounded_between_steps_and_nothing_else_is(kind: str) -> None:
    """Each step is that of an optimizer with fp32 moments which begins it from the rounded ones."""
    narrow, wide = parameters(), parameters()
    make = [(narrow, "bf16"), (wide, "fp32")]
    one, other = (Optimizer(named.items(), kind, 0.1, torch.float32, 10.0, moments) for named, moments in make)  # type: ignore[arg-type]
    for step in range(4):
        give_gradients(narrow, step)
        give_gradients(wide, step)
        one.step(0.02)
        other.step(0.02)
        for name, parameter in narrow.items():
            torch.testing.assert_close(wide[name], parameter)
        rounded = {
            key: value if key.endswith(":step") else value.bfloat16() for key, value in other.state_tensors().items()
        }
        assert one.state_tensors().keys() == rounded.keys()
        for key, value in one.state_tensors().items():
            assert value.dtype == rounded[key].dtype, key
            torch.testing.assert_close(value, rounded[key], rtol=2**-7, atol=1e-6)
        other.load_state_tensors((key, value.float()) for key, value in one.state_tensors().items())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_state_goes_on_in_another_format(kind: str) -> None:
    for before, after in (("fp32", "bf16"), ("bf16", "fp32")):
        named = parameters()
        first = Optimizer(named.items(), kind, 0.1, torch.float32, moments=before)  # type: ignore[arg-type]
        give_gradients(named, 0)
        first.step(0.02)
        second = Optimizer(named.items(), kind, 0.1, torch.float32, moments=after)  # type: ignore[arg-type]
        second.load_state_tensors(first.state_tensors().items())
        give_gradients(named, 1)
        second.step(0.02)
        for key, value in second.state_tensors().items():
            assert value.dtype == (torch.float32 if key.endswith(":step") else MOMENTS[after]), key
            assert value.isfinite().all()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_only_the_embedding_takes_its_own_rate_and_only_beside_muon(kind: str) -> None:
    embedding = "model.embed_tokens.weight"
    found: list[dict[str, nn.Parameter]] = []
    for rate, times in ((0.002, 10.0), (0.002, 1.0), (0.02, 1.0)):
        found.append(parameters())
        optimizer = Optimizer(found[-1].items(), kind, 0.1, torch.float32, times)  # type: ignore[arg-type]
        for step in range(3):
            give_gradients(found[-1], step)
            optimizer.step(rate)
    own, same, faster = found
    for name in own:
        expected = faster if name == embedding and kind == "muon" else same
        torch.testing.assert_close(own[name], expected[name])


@pytest.mark.parametrize("shape", [(4, 16, 16), (2, 8, 32), (3, 32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
    assert float(singular.min()) > 0.3
    assert float(singular.max()) < 1.3


EXPERTS = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize("at_once", [1 << 22, 100, 4])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_an_expert_without_tokens_stays_while_its_momentum_decays_and_the_others_do_not_notice(
    at_once: int, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motley.train.optimizer.NUMBERS_AT_ONCE", at_once)
    starved, fed = parameters(), parameters()
    one, other = (Optimizer(named.items(), "muon", 0.1, torch.float32, moments=moments) for named in (starved, fed))  # type: ignore[arg-type]
    for step in range(4):
        for named in (starved, fed):
            give_gradients(named, step)
        before = {name: starved[name].detach().clone() for name in EXPERTS}
        kept = {name: one.momentum[name].float().clone() for name in EXPERTS}
        for name in EXPERTS if step else []:
            starved[name].grad[1] = 0.0  # type: ignore[index]
        one.step(0.02)
        other.step(0.02)
        for name in EXPERTS if step else []:
            assert torch.equal(starved[name][1], before[name][1])
            torch.testing.assert_close(one.momentum[name][1].float(), 0.95 * kept[name][1], rtol=2**-7, atol=0)
    for name, parameter in starved.items():
        same = [0, 2] if name in EXPERTS else slice(None)
        assert torch.equal(parameter[same], fed[name][same]), name


def test_a_gate_without_a_gradient_stays_beside_its_up_projection_that_learns() -> None:
    named, name = parameters(), EXPERTS[0]
    optimizer = Optimizer(named.items(), "muon", 0.1, torch.float32)
    for step in range(2):
        give_gradients(named, step)
        before = named[name].detach().clone()
        named[name].grad[2, :5] *= 1 - step  # type: ignore[index]
        optimizer.step(0.02)
    assert torch.equal(named[name][2, :5], before[2, :5])
    assert not torch.equal(named[name][2, 5:], before[2, 5:])


def test_a_gradient_that_is_no_number_is_not_taken_for_none() -> None:
    grads = torch.zeros(4, 3, 5)
    grads[0, 1, 2], grads[1, 2, 4], grads[3, 0, 0] = math.nan, 1e-30, math.inf
    assert learning(grads).flatten().tolist() == [True, True, False, True]


def test_an_expert_that_gets_tokens_again_goes_on_as_after_gradients_of_zero() -> None:
    """Against Muon by hand, with the update and the decay of the empty steps left out."""
    named, name = parameters(), EXPERTS[1]
    optimizer = Optimizer(named.items(), "muon", 0.1, torch.float32)
    weight = named[name][1].detach().double().clone()
    momentum = torch.zeros_like(weight)
    for step, empty in enumerate([False, True, True, False, True, False]):
        give_gradients(named, step)
        if empty:
            named[name].grad[1] = 0.0  # type: ignore[index]
        grad = named[name].grad[1].double().clone()  # type: ignore[index]
        momentum = 0.95 * momentum + 0.05 * grad
        if not empty:
            ahead = (0.05 * grad + 0.95 * momentum).T
            weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(8) * newton_schulz(ahead).T
        optimizer.step(0.02)
    torch.testing.assert_close(named[name][1].double(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_the_kernel_leaves_out_the_same_matrices_as_the_plain_path(moments: str) -> None:
    """Where there is no kernel, both are the plain path."""
    name, found = "model.layers.1.mlp.experts.gate_up_proj", []
    for path in (nullcontext(), native.switched_off()):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 2 * 16, 32, generator=generator))
        before, optimizer = (
            weight.detach().clone(),
            Optimizer([(name, weight)], "muon", 0.1, torch.float32, 1.0, moments),
        )  # type: ignore[arg-type]
        with path:
            for step in range(3):
                weight.grad = torch.randn(weight.shape, generator=generator)
                if step:
                    weight.grad[2] = 0.0  # an expert without tokens
                    weight.grad[3, :16] = 0.0  # a gate
                else:
                    weight.grad[1] = 0.0  # never had any
                    weight.grad[0] = 0.0
                optimizer.step(0.02)
                if not step:
                    begun = weight.detach().clone()
        assert torch.equal(begun[:2], before[:2])
        assert torch.equal(weight[2], begun[2])
        assert torch.equal(weight[3, :16], begun[3, :16])
        assert not torch.equal(weight[3, 16:], begun[3, 16:])
        found.append((weight.detach(), optimizer.momentum[name].float()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-4)


def test_a_parameter_without_a_gradient_stays() -> None:
    named = parameters()
    optimizer = Optimizer(named.items(), "muon", weight_decay=0.1, dtype=torch.float32)
    give_gradients(named, 0)
    still = ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    for name in still:
        named[name].grad = None
    before = {name: named[name].detach().clone() for name in named}
    optimizer.step(0.1)
    assert [name for name in named if torch.equal(named[name], before[name])] == still


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_goes_through_a_checkpoint_bit_for_bit(kind: str) -> None:
    named, other = parameters(), parameters()
    first = Optimizer(named.items(), kind, 0.1, torch.float32)  # type: ignore[arg-type]
    give_gradients(named, 0)
    first.step(0.01)
    second = Optimizer(other.items(), kind, 0.1, torch.float32)  # type: ignore[arg-type]
    second.load_state_tensors((name, tensor.clone()) for name, tensor in first.state_tensors().items())
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(named[name])
    for optimizer, owned in ((first, named), (second, other)):
        give_gradients(owned, 1)
        optimizer.step(0.01)
    assert all(torch.equal(named[name], other[name]) for name in named)


def test_state_of_another_optimizer_is_not_taken() -> None:
    named = parameters()
    adamw = Optimizer(named.items(), "adamw", 0.1, torch.float32)
    with pytest.raises(KeyError):
        Optimizer(named.items(), "muon", 0.1, torch.float32).load_state_tensors(adamw.state_tensors().items())


def test_warmup_stable_decay_has_its_three_parts() -> None:
    rates = [factor(step, 100, "wsd", warmup_steps=10, decay_share=0.4, final_share=0.05) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert rates[10:61] == [1.0] * 51
    assert all(a > b for a, b in pairwise(rates[60:]))
    assert rates[80] == pytest.approx(0.05 + 0.95 * 0.5)
    assert rates[99] == pytest.approx(0.05 + 0.95 / 40)


def test_cosine_goes_down_to_the_final_share() -> None:
    rates = [factor(step, 110, "cosine", warmup_steps=10, decay_share=0.4, final_share=0.1) for step in range(110)]
    assert rates[9] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[109] == pytest.approx(0.1, abs=0.001)


def test_a_run_shorter_than_its_warmup_is_not_an_error() -> None:
    assert factor(0, 1, "wsd", 20, 0.4, 0.05) == pytest.approx(1 / 20)
    assert factor(0, 1, "cosine", 0, 0.4, 0.05) == 1.0


def test_steps_that_are_not_finite_are_skipped_and_the_run_stops_when_they_go_on() -> None:
    guard = LossSpikeGuard()
    assert guard.verdict(2.0, 1.0, finite=True) is None
    for _ in range(PATIENCE - 1):
        reason = guard.verdict(float("nan"), 1.0, finite=False)
        assert reason is not None
        assert "not finite" in reason
        assert not guard.exhausted
    guard.verdict(2.0, float("inf"), finite=True)
    assert guard.exhausted
    assert guard.losses == [2.0], "what was skipped is not what is usual"


def test_a_leap_of_loss_and_gradient_is_skipped_and_a_good_step_forgives() -> None:
    guard = LossSpikeGuard()
    for _ in range(WINDOW):
        assert guard.verdict(2.0, 1.0, finite=True) is None
    assert "jumped" in (guard.verdict(3.5, 20.0, finite=True) or "")
    assert guard.verdict(2.9, 20.0, finite=True) is None, "less than half as much again"
    assert guard.verdict(3.5, 1.0, finite=True) is None, "a high loss alone is a hard batch"
    assert guard.skipped_in_a_row == 0


def test_a_loss_near_zero_may_double() -> None:
    guard = LossSpikeGuard()
    for _ in range(WINDOW):
        guard.verdict(0.03, 0.5, finite=True)
    assert guard.verdict(0.09, 13.0, finite=True) is None
    assert guard.verdict(1.1, 13.0, finite=True) is not None


def test_early_leaps_are_not_judged_before_anything_is_usual() -> None:
    guard = LossSpikeGuard()
    assert guard.verdict(2.0, 1.0, finite=True) is None
    assert guard.verdict(9.0, 500.0, finite=True) is None
