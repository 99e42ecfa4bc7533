"""The pages of plans: every stage is named, every second is drawn, what is only assumed is said beside the headline."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from motley.plan.command import PlanConfig, plan
from motley.plan.report.html import plan_page
from motley.plan.report.step_html import detail_caption, phases

FLEETS = Path(__file__).parents[2] / "examples" / "fleets"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    return plan(PlanConfig("v2-lite", fleet=FLEETS / "lab.yaml", tokens="1B", out=out))


def words_of(page: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", page)


def test_every_stage_says_what_it_holds(lab: Mapping[str, Any]):
    words = " ".join(words_of(plan_page(lab)))
    for group in lab["groups"]:
        for stage in group["stages"]:
            if stage["layers"]:
                assert f"{stage['layers'][0]}–{stage['layers'][1]}" in words or f"layer {stage['layers'][0]}" in words
    assert re.search(r"\d+ exp(erts|\.)", words)
    assert "embedding" in words
    assert "head" in words


def test_a_box_too_narrow_for_words_has_a_number_and_an_entry_below(lab: Mapping[str, Any]):
    group = dict(lab["groups"][0])
    stage = {**group["stages"][0], "layers": [0, 0], "embedding": False}
    group["stages"] = [{**stage, "layers": [n, n]} for n in range(40)]
    words = words_of(plan_page({**lab, "groups": [group]}))
    assert [str(number) for number in range(1, 41)] == [word for word in words if word.isdigit()][:40]
    entries = " ".join(words)
    for number in range(40):
        assert re.search(rf"\b{number + 1}: layer {number}, ", entries)


def test_the_phases_of_every_group_make_up_the_step(lab: Mapping[str, Any]):
    for group in lab["groups"]:
        parts = phases(group)
        whole = parts.pipeline + parts.exchange + parts.optimizer + parts.waiting
        assert whole == pytest.approx(lab["step_seconds"], rel=0.01)
        assert min(parts.pipeline, parts.optimizer) > 0


def test_what_is_cut_short_says_so(lab: Mapping[str, Any]):
    group = lab["groups"][0]
    assert f"of {group['micro_batches'] + 1000} micro-batches" in detail_caption(
        {**group, "micro_batches": group["micro_batches"] + 1000}
    )
    assert "shortened" not in detail_caption({**group, "micro_batches": 3})


def test_what_is_assumed_stands_beside_the_headline(lab: Mapping[str, Any]):
    assumed = [note for note in lab["notes"] if note.startswith("framework ")]
    assert assumed
    header = plan_page(lab).partition("</header>")[0]
    assert "Assumed, not measured" in header
    assert f"framework {lab['framework']}" in header
    measured = plan_page({**lab, "notes": []}).partition("</header>")[0]
    assert "Assumed" not in measured


def test_the_page_of_a_single_pool_compares_it_with_nothing(lab: Mapping[str, Any]):
    pool = {**lab["pools"][0], "pool": lab["groups"][0]["pools"][0]}
    stages = [{**stage, "pool": pool["pool"]} for stage in lab["groups"][0]["stages"]]
    group = {**lab["groups"][0], "pools": [pool["pool"]], "stages": stages}
    page = plan_page({**lab, "pools": [pool], "groups": [group]})
    assert "Against what else" not in page
    assert "MFU" in page
    assert "<script" not in page
