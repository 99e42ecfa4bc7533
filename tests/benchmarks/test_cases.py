"""What benchmarks are going to measure exists: shapes, fleets, cases, in formats that the machine has."""

import dataclasses

import faults
import islands
import memory
import narrow
import plan_own_runtime
import plan_search
import plan_uneven
import pytest
import scaling
import scaling_law
import story
import thrift
from machine import FLAGS, cpu_flags

from motley.fleet.probe import Machine, MatmulRate
from motley.plan.network.flops import training_flops_per_token
from motley.train.config import PretrainConfig


def machine(*formats: str) -> Machine:
    """A CPU that multiplies in these formats, the last of them chosen."""
    rates = tuple(MatmulRate(name, 4096, 256, 1024, 100.0 + number) for number, name in enumerate(formats))
    return Machine("cpu", "a CPU", 2, 2, 1 << 33, 1 << 33, None, rates, 20.0, formats[-1])


def test_scaling_has_several_sizes_on_each_axis_and_twice_as_much_takes_more() -> None:
    for axis in {case.axis for case in scaling.CASES}:
        cases = [case for case in scaling.CASES if case.axis == axis]
        assert len(cases) >= 4
        flops = [training_flops_per_token(c.shape, c.seq_len) * c.rows * c.seq_len for c in cases]
        assert flops == sorted(flops)
        assert all(scaling.quick(case).rows == case.rows for case in cases)


def test_own_runtime_is_not_measured_in_a_format_that_is_emulated() -> None:
    every = plan_own_runtime.cases(2)
    assert {case.dtype for case in plan_own_runtime.possible(machine("fp32"), every)} == {"fp32"}
    assert plan_own_runtime.possible(machine("fp32", "bf16"), every) == every
    assert {case.framework for case in every} == set(plan_own_runtime.DESCRIPTIONS)


def test_unequal_workers_keep_whole_rows_in_a_quick_look() -> None:
    for case in plan_uneven.CASES:
        assert case.rows % plan_uneven.QUICK_SHARE == 0
        assert case.rows // plan_uneven.QUICK_SHARE >= len(case.speeds)


def test_both_sides_of_memory_are_there_early_in_a_quick_look() -> None:
    first, second = memory.QUICK_SIDES[:2]
    assert {type(first), type(second)} == {memory.Ours, memory.Theirs}
    assert set(memory.QUICK_SIDES) == {*memory.OURS, *memory.THEIRS}
    again = [side for side in memory.THEIRS if side.checkpointed]
    assert {side.experts for side in again} == {side.experts for side in memory.THEIRS}, "each its best setting"


@pytest.mark.parametrize("what", list(narrow.SIDES))
def test_narrow_differs_in_one_setting_between_its_sides(what: str) -> None:
    common = narrow.COMMON | narrow.QUICK | {"precision": "fp32"}
    one, other = (PretrainConfig(**(common | side)) for side in narrow.SIDES[what].values())
    differing = {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)}
    assert differing == {"precision" if what == "fp8" else "moments"}


@pytest.mark.parametrize("way", list(islands.WAYS))
def test_ways_of_islands_are_settings_of_pretrain_and_take_equal_tokens(way: str) -> None:
    for more in ({}, islands.QUICK):
        config = PretrainConfig(**(islands.COMMON | islands.WAYS[way] | more))
        base = PretrainConfig(**(islands.COMMON | more))
        assert (config.batch_rows, config.seq_len, config.model) == (base.batch_rows, base.seq_len, base.model)


def test_fleets_of_the_story_are_there() -> None:
    for name, _ in story.RUNS:
        assert (story.FLEETS / f"{name}.yaml").is_file()


def test_a_search_is_among_sizes_that_exist() -> None:
    assert plan_search.QUICK_TYPES in plan_search.MIXES
    assert max(plan_search.MIXES) <= len(plan_search.TYPES)


def test_laws_are_fitted_to_lengths_of_whole_steps() -> None:
    for width in scaling_law.QUICK_WIDTHS:
        assert width in scaling_law.SHAPES
    for tokens in scaling_law.QUICK_TOKENS:
        assert tokens % (scaling_law.QUICK_ROWS * scaling_law.SEQ_LEN) == 0
    assert scaling_law.VALID_ROWS * scaling_law.QUICK_ROWS // scaling_law.BATCH_ROWS > 0


def test_faults_come_equally_often_and_a_quick_look_needs_no_root() -> None:
    trials = faults.planned(10, 10, seed=0)
    assert sorted(trial.number for trial in trials) == list(range(20))
    assert {trial.fault for trial in trials} == {*faults.KILLS, *faults.OTHERS}
    assert "full disk" not in faults.KILLS


def test_every_lever_differs_from_ours_and_has_a_name_on_the_command_line() -> None:
    from horizon import ordinary_recipe

    llama, shape = thrift.SIZES["small"]
    best = thrift.Recipe(shape, 4e-3, lengths=thrift.LENGTHS, weight_decay=0.0, mtp_weight=0.0, ngram_weight=0.85)
    found = thrift.levers(best, dataclasses.replace(ordinary_recipe(llama, "bf16"), batches=((0.0, 4),)))
    assert set(found) == set(thrift.LEVERS)
    assert all(recipe != best for recipe in found.values())


def test_flags_of_the_cpu_are_read_as_the_system_tells_them(tmp_path) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma sse2\n", encoding="utf-8")
    assert cpu_flags(information) == ["avx2", "fma"]
    information.write_text("processor\t: 0\nflags\t\t: avx2 fma avx512f avx512_bf16 amx_bf16\n", encoding="utf-8")
    assert cpu_flags(information) == list(FLAGS[:5])
    assert cpu_flags(tmp_path / "absent")  # at least the architecture
