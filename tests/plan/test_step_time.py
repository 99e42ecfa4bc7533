"""Seconds and bytes of a layout: formulas of the papers, and what must hold whatever the constants are."""

import random
from dataclasses import replace

import numpy as np
import pytest

from motley.errors import InputError
from motley.fleet import find_chip
from motley.parallel.pipeline.runner import order
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, ParallelConfigs
from motley.plan.cost_model.framework import FRAMEWORKS, framework_from, load_framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.cost_model.memory import in_flight, saved_bytes, state_bytes
from motley.plan.cost_model.operators import LayerSeconds, layer_seconds
from motley.plan.cost_model.step_time import bubble_seconds, network_pieces, step_seconds
from motley.plan.network.registry import find_network

A100 = Hardware.of_chip(find_chip("A100-80GB-SXM"))
H800 = Hardware.of_chip(find_chip("H800"))
PLAIN = {
    "tp": 1, "cp": 1, "ep": 1, "dp": 1, "pp": 1, "micro_batch": 1, "micro_batches": 8, "recompute": 0,
    "schedule": 0, "chunks": 1, "zero": 0,
}  # fmt: skip


def configs(**changes: object) -> ParallelConfigs:
    return ParallelConfigs.of(**{**PLAIN, **changes})


def stages(count: int, forward: float, backward: float, weight: float) -> list[LayerSeconds]:
    one = LayerSeconds(*(np.array([value]) for value in (forward, backward, weight, 0.0, 0.0)))
    return [one] * count


@pytest.mark.parametrize("pp", [2, 4, 16])
def test_bubbles_are_those_of_the_papers(pp: int):
    forward, backward, weight = 1.0, 2.2, 0.9
    equal = stages(pp, forward, backward, weight)

    def bubble(schedule: str, chunks: int = 1) -> float:
        asked = configs(pp=pp, micro_batches=4 * pp, schedule=SCHEDULES.index(schedule), chunks=chunks)
        return float(bubble_seconds(asked, equal)[0])

    both = forward + backward
    assert bubble("1f1b") == pytest.approx((pp - 1) * both)
    assert bubble("1f1b", chunks=2) == pytest.approx((pp - 1) * both / 2)  # interleaved, Narayanan 2021
    assert bubble("zero_bubble") == pytest.approx((pp - 1) * (both - 2 * weight))  # ZB1P
    assert bubble("dualpipe") == pytest.approx((pp / 2 - 1) * (both + backward - 3 * weight))  # V3 report, table 2


def played(seconds: list[tuple[float, float, float]], count: int) -> float:
    """Seconds in which unequal stages do, in the runtime's own order, `count` micro-batches of F, B and W seconds."""
    todo = [order("zero_bubble", stage, len(seconds), count) for stage in range(len(seconds))]
    clock, ended = [0.0] * len(seconds), {}
    while any(todo):
        for stage, works in enumerate(todo):
            while works:
                kind, micro = works[0]
                first = (kind, stage + {"F": -1, "B": 1, "W": 0}[kind], micro)
                if kind != "W" and 0 <= first[1] < len(seconds) and first not in ended:
                    break
                clock[stage] = max(clock[stage], ended.get(first, 0.0)) + seconds[stage]["FBW".index(kind)]
                ended[works.pop(0)[0], stage, micro] = clock[stage]
    return max(clock)


def test_the_zero_bubble_of_unequal_stages_is_what_the_runtimes_order_leaves():
    chance = random.Random(5)
    for pp, most in ((2, 0.01), (3, 0.05), (6, 0.05)):
        for _ in range(30):
            count, scale = chance.choice((pp, 2 * pp, 4 * pp)), [chance.uniform(1, 2) for _ in range(pp)]
            each = [(size, size * chance.uniform(0.9, 1.2), size * chance.uniform(0.5, 0.9)) for size in scale]
            rows = [stages(1, f, b + w, w)[0] for f, b, w in each]
            asked = configs(pp=pp, micro_batches=count, schedule=SCHEDULES.index("zero_bubble"))
            formula = float(bubble_seconds(asked, rows)[0]) + count * max(map(sum, each))
            exact = played(each, count)
            assert formula <= exact * (1 + 1e-9)
            assert formula == pytest.approx(exact, rel=most)


def test_one_stage_has_no_bubble():
    assert bubble_seconds(configs(), stages(1, 1.0, 2.0, 1.0)).tolist() == [0.0]


def test_activations_in_flight_follow_the_schedule():
    first = configs(pp=8, schedule=[0, 1, 2])
    assert in_flight(first, np.array([0])).tolist() == [8, 8, 9]  # ZB-H1: pp, DualPipe: pp + 1
    assert in_flight(first, np.array([7])).tolist() == [1, 8, 9]


def test_megatrons_activation_formula_comes_out():
    """34 sbh + 5 a s^2 b bytes a layer without parallelism, 2 sbh with full recomputation (arXiv 2205.05198)."""
    shape, framework = find_network("gpt-22b"), replace(load_framework("megatron"), attention_efficiency=0.0)
    s, b, h, a = 2048, 4, 6144, 64
    asked = configs(micro_batch=b, recompute=[RECOMPUTES.index("none"), RECOMPUTES.index("full")])
    kept = saved_bytes(shape.blocks[0], shape, asked, framework, s)
    assert kept[0] == pytest.approx(34 * s * b * h + 5 * a * s * s * b, rel=0.06)
    assert kept[1] == 2 * s * b * h


def test_zero_shards_states_then_gradients_then_weights():
    framework = load_framework("megatron")
    dense, experts = np.array([8e6]), np.array([16e6])
    rows = [state_bytes(dense, experts, configs(dp=8, ep=4, zero=level), framework) for level in range(4)]
    everything = 24e6
    sharded = 8e6 / 8 + 16e6 / 2  # a share of experts has dp / ep copies
    for level, (weights, gradients, optimizer) in enumerate(rows):
        held = [sharded if level >= cut else everything for cut in (3, 2, 1)]
        sizes = [framework.state_bytes[name] for name in ("weight", "gradient", "optimizer")]
        assert [weights[0], gradients[0], optimizer[0]] == pytest.approx(np.multiply(held, sizes).tolist())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_framework_computes_faster_than_the_chip(framework: str):
    hardware = H800 if framework == "deepseek" else A100
    shape, own = find_network("llama-7b"), load_framework(framework)
    precision = next(name for name in ("bf16", "fp32") if name in own.matmul_efficiency and name in hardware.flops)
    step = step_seconds(shape, configs(micro_batches=4), 2048, hardware, own, precision)
    flops = 3 * sum(block.forward_flops(2048) for block in shape.blocks) * 4 * 2048
    assert float(step.total[0]) > flops / hardware.flops[precision]


def test_the_parts_of_a_step_add_up_and_none_is_negative():
    shape, framework = find_network("v3"), load_framework("deepseek")
    asked = configs(
        pp=16, dp=128, ep=64, micro_batches=np.array([60, 120]), schedule=SCHEDULES.index("dualpipe"), zero=1
    )
    step = step_seconds(shape, asked, 4096, H800, framework, "fp8")
    parts = [step.compute, step.communication, step.bubble, step.optimizer]
    assert all((part >= 0).all() for part in parts)
    assert np.sum(parts, axis=0) == pytest.approx(step.total)
    assert step.total[1] > 1.8 * step.total[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stages_keep_mtp_modules_with_the_head_where_the_framework_does(framework: str):
    shape, own, hardware = find_network("v3"), load_framework(framework), H800 if framework == "deepseek" else A100
    pieces = network_pieces(shape, configs(pp=16), 4096, hardware, own, "bf16")
    cut = pieces.cut(16, own, 0)
    last = [what for what, _ in pieces.kinds[cut[-1]]]
    assert last[-1] == "head"
    if own.mtp_with_head or not own.balanced_stages:
        assert "mtp" in last
    assert (cut[0].start, cut[-1].stop, len(cut)) == (0, len(pieces.kinds), 16)


def test_a_layer_is_its_products_in_the_limit_of_a_perfect_chip():
    """Without overheads, and with links and memory out of the way, time is FLOPs over rate: summed here naively."""
    framework = replace(
        load_framework("megatron-core"), matmul_efficiency={"bf16": 1.0}, half_rows=0.0, half_inner=0.0, half_outer=0.0,
        kernel_seconds=0.0, attention_efficiency=1.0, attention_backward=2.0, score_bytes=0.0, stream_passes=0.0,
        host_forward_seconds=0.0, host_backward_seconds=0.0, expert_padding=0.0, expert_seconds=0.0, measured=(),
    )  # fmt: skip
    hardware = replace(A100, flops={"bf16": 1e12}, memory_bandwidth=1e18)
    shape = find_network("v2-lite")
    block = shape.blocks[1]
    cost = layer_seconds(block, shape, configs(micro_batch=2), 512, hardware, framework, "bf16")
    tokens, flops = 2 * 512, 0.0
    for matmul in block.matmuls:
        flops += 2.0 * tokens * matmul.chosen * matmul.inner * matmul.outer
    visible = sum(range(512)) + 256  # a token sees half of the sequence on average
    flops += 2 * 2 * block.heads * (block.qk_dim + block.v_dim) * visible
    assert float(cost.forward[0]) == pytest.approx(flops / 1e12, rel=1e-9)
    assert float(cost.backward[0]) == pytest.approx(2 * flops / 1e12, rel=1e-9)


def test_tensor_parallel_sums_cost_what_a_ring_costs():
    framework = load_framework("megatron")
    hardware = replace(A100, link=100e9, pair=100e9)
    sent = np.array([1e9])
    degree = np.array([4])
    seconds = hardware.all_reduce(degree, degree, sent, replace(framework, collective_seconds=0.0))
    assert seconds[0] == pytest.approx(2 * 3 / 4 * 1e9 / (100e9 * framework.link_efficiency))


def test_every_framework_says_where_its_constants_come_from():
    for name in FRAMEWORKS:
        framework = load_framework(name)
        assert framework.name == name
        assert framework.description
        assert framework.fitted
        assert set(framework.state_bytes) == {"weight", "gradient", "optimizer"}


def test_an_framework_file_with_a_field_too_many_is_refused():
    with pytest.raises(InputError, match="fields missing or unknown"):
        framework_from({"name": "x", "colour": "red"})
