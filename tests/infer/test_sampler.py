"""Tokens are drawn as asked: greedy, by temperature, from the nucleus, by the seed."""

import math

import pytest
import torch

from motley.errors import InputError
from motley.infer.sampler import BrokenLogits, Sampler, SamplingParams, nucleus


def test_temperature_zero_takes_the_most_probable() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(SamplingParams(temperature=0)).draw(logits), logits.argmax(dim=-1))


def nucleus_by_hand(probabilities: list[float], top_p: float) -> list[float]:
    kept, total = [0.0] * len(probabilities), 0.0
    for index in sorted(range(len(probabilities)), key=lambda index: -probabilities[index]):
        if total >= top_p:
            break
        kept[index] = probabilities[index]
        total += probabilities[index]
    return [value / sum(kept) for value in kept]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_nucleus_is_the_smallest_set_that_suffices(top_p: float) -> None:
    probabilities = torch.randn(10, 30, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    found = nucleus(probabilities, top_p)
    for row, expected in zip(found, probabilities, strict=True):
        assert row.tolist() == pytest.approx(nucleus_by_hand(expected.tolist(), top_p), abs=1e-12)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_many_draws_have_the_right_frequencies(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    draws = 40_000
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=top_p, seed=3))
    counts = torch.bincount(sampler.draw(logits.expand(draws, -1)), minlength=6).tolist()
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    expected = nucleus_by_hand([weight / sum(weights) for weight in weights], top_p)
    chi_square = 0.0
    for count, share in zip(counts, expected, strict=True):
        if share == 0:
            assert count == 0
        else:
            chi_square += (count - draws * share) ** 2 / (draws * share)
    assert chi_square < 20.5  # 5 degrees of freedom: passes 999 seeds in 1000, and this one is fixed


def test_the_seed_decides_and_no_seed_means_another_draw_each_time() -> None:
    logits = torch.zeros(64, 1000)

    def draw(seed: int | None) -> list[int]:
        return Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=seed)).draw(logits).tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_one_requests_draws_do_not_disturb_anothers() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=1)
    alone = Sampler(params)
    expected = [int(alone.draw(logits)) for _ in range(10)]
    mine, other = Sampler(params), Sampler(SamplingParams(temperature=1.0, seed=2))
    found = []
    for _ in range(10):
        found.append(int(mine.draw(logits)))
        other.draw(logits)
        torch.rand(3)
    assert found == expected


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_not_a_token(broken: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = broken
    for temperature in (0.0, 1.0):
        with pytest.raises(BrokenLogits, match="not a number"):
            Sampler(SamplingParams(temperature=temperature)).draw(logits)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "temperature is nan"),
     ({"temperature": 2.1}, "temperature is 2.1"), ({"top_p": 0}, "top_p is 0"), ({"top_p": 1.01}, "top_p is 1.01"),
     ({"top_p": float("nan")}, "top_p is nan"), ({"max_tokens": 0}, "max_tokens is 0")],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        SamplingParams(**settings)
