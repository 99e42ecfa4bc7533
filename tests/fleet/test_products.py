"""Measuring ends in time on any machine; here machines are made up, and so is the time that their products take."""

import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from motley.fleet import products
from motley.fleet.probe import why_left_out
from motley.fleet.products import (
    SKINNY,
    Climb,
    ProbeSamples,
    Shape,
    flops,
    glance,
    grid_of,
    measure,
    sizes_of,
    within_deadline,
)

CPU, H100 = torch.device("cpu"), torch.device("cuda")
Rate = Callable[[str, Shape], float]
"""FLOP/s of a format and a shape."""


class Pretended:
    """A machine whose products take the time that `rate` says, on a clock of its own."""

    def __init__(self, rate: Rate, bandwidth: float = 1e10, jitter: random.Random | None = None) -> None:
        self.rate, self.bandwidth, self.jitter, self.time = rate, bandwidth, jitter, 0.0
        self.calls: list[tuple[str, Shape]] = []

    def now(self) -> float:
        return self.time

    def spend(self, seconds: float) -> None:
        self.time += seconds * (self.jitter.uniform(1, 3) if self.jitter else 1)

    def product(self, device: torch.device, name: str, *shape: Any) -> Callable[[], None]:
        def run() -> None:
            self.calls.append((name, shape))
            self.spend(2e-6 + flops(shape) / self.rate(name, shape))

        return run

    def copy(self, device: torch.device, size: int) -> Callable[[], None]:
        return lambda: self.spend(2 * size / self.bandwidth)

    def measured(self, seconds: float, formats: tuple[str, ...] = ("fp32", "bf16"), grid: bool = True) -> ProbeSamples:
        sizes = sizes_of(CPU)
        squares: list[Shape] = [(1, edge, edge, edge) for edge in sizes.squares]
        shown = [(1, *SKINNY), *squares[squares.index((1, sizes.trial, sizes.trial, sizes.trial)) :]]
        shown += grid_of(sizes.side) if grid else []
        climb = Climb(CPU, seconds, sizes.trial, self.product, self.copy, self.now)
        climb.copies(sizes.copies)
        climb.products(formats, {*squares, *shown}, shown)
        climb.turns()
        return climb.found


def constant(**rates: float) -> Rate:
    return lambda name, shape: rates[name] * 1e9


def collapsing(edge: int, factor: float) -> Rate:
    """bf16 twice as fast as fp32 until some edge of a product reaches `edge`."""

    def rate(name: str, shape: Shape) -> float:
        return 1e11 if name == "fp32" else 2e11 / (factor if max(shape[1:]) >= edge else 1)

    return rate


SPEEDS = (0.02, 0.5, 20, 120, 5_000)
SECONDS = (0.1, 3.0, 20.0)


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("slower", [0.4, 1.2, 30, 1000])
@pytest.mark.parametrize("grid", [False, True])
def test_measuring_never_takes_twice_the_time_however_slow_a_format_or_the_machine_is(
    seconds: float, speed: float, slower: float, grid: bool
) -> None:
    for jitter in (None, random.Random(0)):
        machine = Pretended(constant(fp32=speed, bf16=speed / slower), jitter=jitter)
        found = machine.measured(seconds, grid=grid)
        assert machine.time < 2 * seconds
        names = {name for name, _ in found.seconds()}
        assert {"fp32", "copy"} <= names
        if slower > 4:
            assert "bf16" not in names
            assert 1 < found.left_out.get("bf16", slower) < 4 * slower


def test_a_format_that_is_emulated_is_tried_on_small_products_only() -> None:
    machine = Pretended(constant(fp32=120, bf16=0.3))
    found = machine.measured(3.0)
    assert max(flops(shape) for name, shape in machine.calls if name == "bf16") <= 2 * 64**3
    assert 100 < found.left_out["bf16"] < 400, "a call costs something too"
    assert (1, 2048, 2048, 2048) in {shape for name, shape in found.seconds() if name == "fp32"}


def test_a_format_of_the_chip_itself_is_measured_in_every_size_that_fp32_is() -> None:
    found = Pretended(constant(fp32=100, bf16=300)).measured(20.0)
    shapes = {name: {shape for other, shape in found.seconds() if other == name} for name in ("fp32", "bf16")}
    assert shapes["fp32"] == shapes["bf16"]
    assert {(1, *SKINNY), (1, 2048, 2048, 2048), *grid_of(2048)} <= shapes["fp32"]
    assert found.left_out == {}


def test_a_format_that_is_only_as_fast_as_fp32_is_left_out() -> None:
    """What a CPU computes through fp32, with conversions around it."""
    assert list(Pretended(constant(fp32=100, bf16=99)).measured(3.0).left_out) == ["bf16"]


def test_a_call_that_costs_more_than_a_small_product_leaves_no_format_out() -> None:
    def rate(name: str, shape: Shape) -> float:
        return (
            flops(shape) / (flops(shape) / 1e11 + 2e-6)
            if name == "fp32"
            else flops(shape) / (flops(shape) / 3e11 + 2e-5)
        )

    assert Pretended(rate).measured(3.0).left_out == {}


@pytest.mark.parametrize("edge", [64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("seconds", SECONDS)
def test_a_format_that_collapses_from_some_size_on_is_left_out_in_time(edge: int, seconds: float) -> None:
    machine = Pretended(collapsing(edge, 30))
    found = machine.measured(seconds)
    assert machine.time < 2 * seconds
    reached = any(max(shape[1:]) >= edge for name, shape in machine.calls if name == "bf16")
    assert ("bf16" in found.left_out) == reached


def test_on_a_slow_machine_fewer_and_smaller_products_are_measured() -> None:
    slow, fast = (Pretended(constant(fp32=speed, bf16=2 * speed)).measured(3.0).seconds() for speed in (0.5, 100))
    assert set(slow) < set(fast)
    assert {name for name, _ in slow} == {"fp32", "bf16", "copy"}


def test_on_the_slowest_machine_one_small_product_is_measured() -> None:
    found = Pretended(constant(fp32=0.001, bf16=0.00001), bandwidth=1e8).measured(0.1).seconds()
    assert [name for name, _ in found if name == "fp32"] == ["fp32"]


def test_results_are_the_medians_of_runs_in_turn() -> None:
    machine = Pretended(constant(fp32=100, bf16=300), jitter=random.Random(1))
    found = machine.measured(20.0)
    rate = flops((1, 1024, 1024, 1024)) / found.seconds()["fp32", (1, 1024, 1024, 1024)] / 1e9
    assert rate == pytest.approx(50, rel=0.25), "a run takes 1 to 3 times as long as it should"
    assert min(len(samples) for samples in found.samples.values()) >= products.LEAST_ROUNDS


def test_a_product_that_never_ends_is_left_to_itself() -> None:
    """The real clock, but nothing hangs on its speed: the product ends only after the measuring has."""
    release, begun = threading.Event(), threading.Event()

    def make(device: torch.device, name: str, *shape: int) -> Callable[[], object]:
        return (lambda: (begun.set(), release.wait(60))) if name == "bf16" else (lambda: None)

    climb = Climb(CPU, 1.0, 256, make)
    shapes: list[Shape] = [(1, edge, edge, edge) for edge in (4, 256)]
    found = within_deadline(climb, lambda: climb.products(["fp32", "bf16"], shapes, shapes))
    assert begun.is_set()
    release.set()
    assert found.left_out["bf16"] > 1
    assert {name for name, _ in found.seconds()} == {"fp32"}


def test_a_format_that_was_only_disturbed_in_a_later_run_is_kept() -> None:
    release, calls = threading.Event(), 0

    def make(device: torch.device, name: str, *shape: int) -> Callable[[], object]:
        def run() -> None:
            nonlocal calls
            calls += name == "bf16"
            if calls > 1000:
                release.wait(60)

        return run

    climb = Climb(CPU, 1.0, 256, make)
    shapes: list[Shape] = [(1, 256, 256, 256)]
    climb.found.samples["fp32", shapes[0]] = climb.found.samples["bf16", shapes[0]] = [1.0]
    climb._best = dict.fromkeys(climb.found.samples, 1e-4)
    climb._kept = {key: make(CPU, *key[:1]) for key in climb._best}
    found = within_deadline(climb, climb.turns)
    release.set()
    assert calls > 1000
    assert {name for name, _ in found.seconds()} == {"fp32", "bf16"}
    assert found.left_out == {}


def test_an_error_in_measuring_is_raised() -> None:
    def make(device: torch.device, name: str, *shape: int) -> Callable[[], object]:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        measure(CPU, ["fp32", "bf16"], 0.2, make=make)


def test_a_format_that_a_device_cannot_multiply_is_left_out() -> None:
    def make(device: torch.device, name: str, *shape: int) -> Callable[[], object]:
        if name == "bf16":
            raise TypeError("BFloat16 is not supported on MPS")
        return lambda: None

    assert measure(CPU, ["fp32", "bf16"], 0.2, make=make).left_out == {"bf16": math.inf}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_glance_at_an_emulated_format_stays_with_small_products(dtype: str) -> None:
    tried: list[int] = []
    released = threading.Event()

    def make(device: torch.device, name: str, *shape: int) -> Callable[[], object]:
        assert name == dtype
        tried.append(shape[1])
        return lambda: shape[1] > 64 and released.wait(60)

    assert glance(CPU, dtype, 0.2, make=make) > 0
    released.set()
    assert max(tried) <= 128


def test_measuring_draws_no_random_numbers_of_anybody_else() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure(CPU, ["fp32", "bf16"], 0.05)
    assert torch.equal(torch.rand(4), expected)


def test_accelerators_are_tried_in_sizes_that_they_take_time_for() -> None:
    assert sizes_of(H100).trial == 2048
    assert sizes_of(H100).side == 8192


def test_what_is_left_out_is_said_in_words() -> None:
    assert why_left_out("bf16", 412.3) == "bf16 is emulated here (at least 412 times slower than fp32) and left out"
    assert why_left_out("fp16", 1.1) == "fp16 is no faster than fp32 here and left out"
    assert why_left_out("bf16", None) == "bf16 cannot be multiplied here and is left out"
