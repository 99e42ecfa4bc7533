"""A layout that does not fit, and a plan that cannot be run, are refused with one sentence before anything is built."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import DEEP

from motley.errors import InputError
from motley.model import SIZES
from motley.parallel.build import as_planned
from motley.parallel.layout import Layout, PipelineGroup, from_plan
from motley.plan.network.registry import trainable
from motley.train.config import PretrainConfig


def plan() -> dict[str, Any]:
    """One pipeline of two stages in two pools, for a model of four layers."""
    room = {"memory_bytes": {"weights": 4.0, "gradients": 3.0, "optimizer": 2.0}, "memory_limit_bytes": 10.0}
    stages = [
        {"pool": "big", "layers": [0, 1], "mtp": False, "head": False, **room},
        {"pool": "small", "layers": [2, 3], "mtp": True, "head": True, **room},
    ]
    group = {
        "pools": ["big", "small"], "tp": {"big": 1, "small": 1}, "cp": 1, "zero": 1, "schedule": "1f1b", "island": 0,
        "stages": stages, "dp": 1, "ep": 1, "recompute": "none", "micro_batch": 2, "sequences": 4,
        "precision": {"big": "bf16", "small": "fp16"},
    }  # fmt: skip
    return {"groups": [group], "step_seconds": 1.0}


def test_the_plan_that_the_others_are_made_of_is_run():
    layout = from_plan(plan(), DEEP)
    assert layout.groups == (PipelineGroup(((0, 1),), (2, 2), micro_batch=2, formats=("bf16", "fp16")),)
    assert layout.memory == (3.0, 3.0), "of the optimizer's, and what is free"


def test_a_plan_may_spread_experts_unevenly_over_a_teams_lanes():
    values = plan()
    (group,) = values["groups"]
    group.update(dp=2, ep=2)
    held = DEEP.n_routed_experts or 0
    assert from_plan(values, DEEP).groups[0].experts == (held // 2, held // 2)
    group["experts"] = [held - 1, 1]
    assert from_plan(values, DEEP).groups[0].experts == (held - 1, 1)
    group["experts"] = ["many", 1]
    with pytest.raises(InputError, match="no plan as"):
        from_plan(values, DEEP)
    group["experts"] = [held, 1]
    with pytest.raises(InputError, match=f"^pipeline group 0 has experts .{held}, 1., the model has {held}"):
        from_plan(values, DEEP)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_plan_shares_gradients_and_weights_too_among_workers_that_hold_the_whole_model(zero: int):
    values = plan()
    (group,) = values["groups"]
    whole = group["stages"][1] | {"layers": [0, 3]}
    group.update(pools=["small"], tp={"small": 1}, precision={"small": "bf16"}, stages=[whole], zero=zero, dp=2)
    layout = from_plan(values, DEEP)
    assert (layout.zero, layout.memory) == (zero, (2.0 + 3.0 + (zero == 3) * 4.0 + 1.0,) * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["groups"][0].update(cp=2), "splits big and small by tensor or context parallelism"),
        (lambda p: p["groups"][0]["tp"].update(small=2), "splits big and small by tensor or context parallelism"),
        (lambda p: p["groups"][0].update(schedule="dualpipe"), "runs big and small as dualpipe"),
        (lambda p: p["groups"][0]["stages"][0].update(mtp=True), "MTP module of big and small on another stage"),
        (lambda p: p["groups"][0]["stages"][1].update(layers=[2, 4]), r"layers \[2, 3\], the model has 4"),
        (lambda p: p["groups"][0].pop("dp"), "this is no plan as `motley plan --out` writes it: KeyError"),
        (lambda p: p["groups"][0]["precision"].update(small="int3"), "int3"),
        (lambda p: p["groups"][0].update(zero=2), "ZeRO 2 is for ranks that each compute with the whole model"),
        (lambda p: p.update(groups=[3]), "this is no plan as `motley plan --out` writes it: TypeError"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(change: Callable[[dict[str, Any]], Any], said: str):
    values = plan()
    change(values)
    with pytest.raises(InputError, match=said) as refused:
        from_plan(values, DEEP)
    assert "\n" not in str(refused.value)


WHOLE = PipelineGroup(((0,), (1,)), (4,))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout((dataclasses.replace(WHOLE, replicas=((0,), (2,))),)), r"for ranks \[0, 2\], but 2 were started"),
        (Layout((dataclasses.replace(WHOLE, layers=(3,)),)), r"layers \[3\], the model has 4"),
        (Layout((dataclasses.replace(WHOLE, micro_batch=0),)), "a micro-batch below 1"),
        (Layout((dataclasses.replace(WHOLE, layers=(2, 2)),)), "2 stages, but a replica with another number"),
        (Layout((dataclasses.replace(WHOLE, experts=(4, 0)),)), r"experts \[4, 0\], the model has"),
        (Layout((WHOLE,), memory=(1.0,)), "memory shares .*one for each of 2 ranks"),
        (Layout((WHOLE,), memory=(0.0, 0.0)), "memory shares"),
        (Layout((WHOLE,), rates=(1.0, 0.0)), "rates .*one above 0 for each of 2 replicas"),
    ],
)
def test_a_layout_that_does_not_fit_model_or_workers_is_refused(layout: Layout, said: str):
    with pytest.raises(InputError, match=said):
        layout.check(DEEP, 2)


def test_what_the_command_leaves_open_is_the_plans_and_what_differs_is_said(capsys: pytest.CaptureFixture[str]):
    values = plan() | {"model": "micro", "seq_len": 512, "global_batch": 24}
    config = as_planned(PretrainConfig(batch_rows=40), values, leads=True)
    assert (config.model, config.seq_len, config.batch_rows) == ("micro", 512, 40)
    said = capsys.readouterr().err
    assert "from the plan: --model micro, --seq-len 512" in said
    assert "--batch-rows 40, although the plan was made for 24" in said
    assert as_planned(config, values | {"batch_rows": 40}, leads=False) == config
    assert as_planned(config, None, leads=True) == config


def test_a_plan_for_a_published_deepseek_names_a_model_that_can_be_trained():
    found = trainable("v2-lite")
    assert found is not None
    assert found.num_hidden_layers == 27
    assert trainable("nano") == SIZES["nano"]
    assert trainable("gpt-22b") is None
    assert trainable("no such model") is None
