"""The kernels of the loss and of Muon give what the plain paths give."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motley.data.stream import Batch
from motley.model import SIZES, Transformer, native
from motley.train.loss import summed_cross_entropy
from motley.train.optimizer import MOMENTS, Moments, Optimizer
from motley.train.step import LossWeights, accumulate

ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 2e-6}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize(("positions", "vocab", "size"), [(1, 16, 16), (5, 64, 32), (300, 160, 48), (40, 4096, 32)])
def test_loss_and_its_gradient_equal_pytorchs_in_fp64(
    positions: int, vocab: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motley.train.loss.GROUP_LOGITS", 64 * vocab)  # several groups
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, size, generator=generator).to(dtype)
    head = 0.3 * torch.randn(vocab, size, generator=generator)
    targets = torch.randint(vocab, (positions,), generator=generator)
    targets[3::7] = -100
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    found = summed_cross_entropy(*inputs, targets, 2.0**-8) / positions
    expected = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum") / positions
    found.backward()
    expected.backward()
    with torch.no_grad():
        assert summed_cross_entropy(*inputs, targets) / positions == pytest.approx(found.item())
    assert found.item() == pytest.approx(expected.item(), rel=ROUNDING[dtype])
    for one, other in zip(inputs, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert distance(one.grad, other.grad) < ROUNDING[dtype]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_muon_equals_the_plain_path_for_matrices_of_all_forms(moments: Moments, dtype: torch.dtype) -> None:
    shapes = {"a.gate_up_proj": (3, 64, 48), "b.weight": (48, 96), "c.weight": (96, 48), "d.weight": (32, 32),
              "e.down_proj": (3, 48, 32), "odd.weight": (20, 30)}  # fmt: skip

    def run() -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        optimizer = Optimizer(named.items(), "muon", 0.1, dtype, moments=moments)
        for _ in range(3):
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            named["d.weight"].grad = None
            optimizer.step(0.1)
        return [p.detach() for p in named.values()], list(optimizer.momentum.values())

    weights, momenta = run()
    with native.switched_off():
        plain_weights, plain_momenta = run()
    assert any(not torch.equal(*both) for both in zip(weights, plain_weights, strict=True)), "the kernel did not run"
    for one, other in zip(momenta, plain_momenta, strict=True):
        assert one.dtype == MOMENTS[moments]
        torch.testing.assert_close(one, other, rtol=1e-5 if moments == "fp32" else 2**-7, atol=1e-6)
    for one, other in zip(weights, plain_weights, strict=True):
        # three updates are 3 % of the weights' length
        assert distance(one, other) < (2e-3 if torch.bfloat16 in (dtype, MOMENTS[moments]) else 2e-5)


def test_passes_that_are_computed_again_give_the_same_gradient(dtype: torch.dtype) -> None:
    shape = dataclasses.replace(SIZES["nano"], vocab_size=64, num_hidden_layers=2)
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, ids.roll(-1, dims=1), torch.zeros_like(ids))

    def gradients(recompute: bool) -> list[Tensor]:
        model = Transformer(shape)
        model.initialize(0)
        model.compute_dtype, model.recompute = dtype, recompute
        accumulate(model, batch, 2, LossWeights(0.3), confined=True)
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert kept
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)
