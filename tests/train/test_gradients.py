"""The gradient is exact: however a step's rows are cut, and against a naive float64 version of the whole loss."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SEQ, VOCAB, random_batch, random_model

from motley.data.stream import Batch
from motley.errors import InputError
from motley.model import Transformer
from motley.train.loss import CHUNK, summed_cross_entropy
from motley.train.step import LossWeights, StepLosses, accumulate, mtp_targets

WEIGHTS = LossWeights(mtp=0.3, balance=0.05)


def gradients(model: Transformer, batch: Batch, micro_batch: int, confined: bool = True) -> StepLosses:
    model.zero_grad(set_to_none=True)
    return accumulate(model, batch, micro_batch, WEIGHTS, confined)


def naive_loss(model: Transformer, batch: Batch, weights: LossWeights) -> torch.Tensor:
    """The definition, all rows at once, with whole logits: V3 report, eq. 17-20 and 24-25, token-weighted."""
    hidden = model.hidden(batch.input_ids, batch.documents)
    head = model.lm_head.weight

    def mean(state: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy((state @ head.T).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return losses / (targets >= 0).sum()

    total = mean(hidden.main, batch.targets)
    for depth, state in enumerate(hidden.further, start=1):
        targets = torch.full_like(batch.targets, -100)
        for row in range(targets.shape[0]):
            for place in range(SEQ - depth):
                if batch.documents[row, place] == batch.documents[row, place + depth]:
                    targets[row, place] = batch.targets[row, place + depth]
        total = total + weights.mtp / len(hidden.further) * mean(state, targets)
    tokens = (batch.documents >= 0).sum()
    for routing in hidden.routings:
        total = total + weights.balance * routing.balance / tokens
    return total


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-12))


def all_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_any_split_of_the_rows_gives_the_same_gradient(seed: int, micro_batch: int) -> None:
    model, batch = random_model(seed), random_batch(seed)
    whole = gradients(model, batch, micro_batch=6)
    expected = all_gradients(model)
    parts = gradients(model, batch, micro_batch)
    found = all_gradients(model)
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name], expected[name]) for name in found}
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}
    assert parts.tokens == whole.tokens
    for one, other in ((parts.main, whole.main), (parts.mtp, whole.mtp), (parts.balance, whole.balance)):
        assert one == pytest.approx(other, rel=1e-6)
    for one, other in zip(parts.expert_counts, whole.expert_counts, strict=True):
        assert torch.equal(one, other), "counts are whole numbers and must be exact"


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_the_definition(seed: int) -> None:
    model, batch = random_model(seed), random_batch(seed)
    losses = gradients(model, batch, micro_batch=4)
    found = all_gradients(model)
    model.zero_grad(set_to_none=True)
    expected = naive_loss(model, batch, WEIGHTS)
    expected.backward()
    total = losses.main + WEIGHTS.mtp * losses.mtp + WEIGHTS.balance * losses.balance * len(losses.expert_counts)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for name, grad in all_gradients(model).items():
        assert relative(found[name], grad) < 1e-5, name


def test_activation_checkpointing_changes_nothing() -> None:
    model, batch = random_model(0), random_batch(0)
    gradients(model, batch, micro_batch=3)
    expected = all_gradients(model)
    model.recompute = True
    gradients(model, batch, micro_batch=3)
    assert all(torch.equal(grad, expected[name]) for name, grad in all_gradients(model).items())


def test_what_stands_in_the_padding_teaches_nothing() -> None:
    model, batch = random_model(1), random_batch(1)
    ids = torch.where(batch.documents < 0, (batch.input_ids + 5) % VOCAB, batch.input_ids)
    assert not torch.equal(ids, batch.input_ids)
    found = []
    for input_ids in (batch.input_ids, ids):
        model.zero_grad(set_to_none=True)
        accumulate(model, Batch(input_ids, batch.targets, batch.documents), 6, LossWeights(0.3, 0.0), confined=True)
        found.append(all_gradients(model))
    for name, grad in found[0].items():
        assert relative(found[1][name], grad) < 1e-5, name


def test_without_mtp_its_modules_get_no_gradient() -> None:
    model, batch = random_model(0), random_batch(0)
    losses = accumulate(model, batch, 6, LossWeights(mtp=0.0), confined=True)
    assert losses.mtp == 0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name.startswith("mtp."))


def test_a_step_without_a_single_target_is_zero_and_not_nan() -> None:
    model, batch = random_model(0), random_batch(0)
    nothing = Batch(batch.input_ids, torch.full_like(batch.targets, -100), batch.documents)
    losses = accumulate(model, nothing, 6, LossWeights(0.3, 0.0), confined=True)
    assert (losses.main, losses.mtp, losses.tokens) == (0.0, 0.0, 0)
    assert all(bool((grad == 0).all()) for grad in all_gradients(model).values())


def test_mtp_predicts_further_tokens_of_the_same_document_only() -> None:
    targets = torch.tensor([[1, 2, 3, 4, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert mtp_targets(targets, documents, 1).tolist() == [[2, 3, -100, 5, -100, -100]]
    assert mtp_targets(targets, documents, 2).tolist() == [[3, -100, -100, -100, -100, -100]]
    assert mtp_targets(targets, documents, 9).tolist() == [[-100] * 6]


@pytest.mark.parametrize("positions", [1, 7, CHUNK, CHUNK * 2 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_is_the_whole_one(positions: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, 16, generator=generator, requires_grad=True)
    targets = torch.randint(-1, VOCAB, (positions,), generator=generator)
    targets[targets < 0] = -100
    (summed_cross_entropy(hidden, head, targets) * 0.5).backward()
    plain, weight = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    expected = F.cross_entropy(plain @ weight.T, targets, ignore_index=-100, reduction="sum")
    (expected * 0.5).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert summed_cross_entropy(hidden, head, targets).item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
    assert hidden.grad is not None
    assert head.grad is not None
    assert plain.grad is not None
    assert weight.grad is not None
    assert relative(hidden.grad, plain.grad) < tolerance
    assert relative(head.grad, weight.grad) < tolerance


@pytest.mark.parametrize("target", [VOCAB, 1 << 40, -1, -5, -101])
def test_a_target_outside_of_the_vocabulary_is_named_and_only_minus_100_is_none(target: int) -> None:
    hidden, head = torch.randn(9, 16), torch.randn(VOCAB, 16)
    targets = torch.full((9,), 3)
    targets[:4] = -100
    assert torch.isfinite(summed_cross_entropy(hidden, head, targets))
    targets[6] = target
    with pytest.raises(InputError, match=rf"target {target} at position 6 is outside .* vocabulary of {VOCAB} tokens"):
        summed_cross_entropy(hidden, head, targets)


def test_huge_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 4), 1e4, requires_grad=True)
    head = torch.eye(4).requires_grad_()
    loss = summed_cross_entropy(hidden, head, torch.tensor([0, 3]))
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
