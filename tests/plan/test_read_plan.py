"""Plan files: read as they are written, and as an earlier version wrote them."""

import json
from pathlib import Path
from typing import Any

import pytest

from motley.errors import InputError
from motley.fleet import parse_fleet
from motley.model import SIZES
from motley.parallel.layout import islands_of_plan
from motley.plan.command import PlanConfig, SimulateConfig, plan, simulate
from motley.plan.network.registry import find_network
from motley.plan.read_plan import PLAN_VERSION, RENAMED, read_plan
from motley.plan.report.html import plan_page
from motley.plan.report.plan_file import plan_comparison, plan_values
from motley.plan.report.text import plan_text
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload

VERSION_1 = Path(__file__).parent / "plan_version_1.json"
"""`motley plan nano --fleet FLEET --tokens 10M --seq-len 256 --global-batch 64` of the version before."""
FLEET = """
name: two chips
pools:
  - {name: fast, chip: A100, chips_per_node: 1}
  - {name: slow, chip: V100, chips_per_node: 1}
"""


def keys(value: Any) -> set[str]:
    """Every key of nested dictionaries and lists."""
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys(inner)}
    return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()


def written_today() -> dict[str, Any]:
    searcher = Searcher(parse_fleet(FLEET, "f"), Workload(find_network("nano"), 1e7, 256, 64))
    found = searcher.best()
    assert found is not None
    return {**plan_values(found), "objective": "time", **plan_comparison(searcher, found)}


def test_a_plan_of_an_earlier_version_is_read_and_says_what_is_called_how_now(capsys: pytest.CaptureFixture[str]):
    old, now = json.loads(VERSION_1.read_text()), read_plan(VERSION_1)
    assert old["plan_version"] == 1
    assert set(RENAMED) <= set(old)
    assert now["groups"] == old["teams"]
    assert now["framework"] == old["engine"]
    assert not set(RENAMED) & set(now)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{VERSION_1} was written by an earlier version of motley: 'teams' is 'groups' now, 'engine' is 'framework' now"
    ]


def test_a_plan_of_an_earlier_version_has_every_key_that_is_written_today():
    today = written_today()
    assert keys(read_plan(VERSION_1)) - {"expected_loss"} >= keys(today) - {"expected_loss"}
    assert today["plan_version"] == PLAN_VERSION > 1


def test_a_plan_of_an_earlier_version_is_trained_replayed_and_drawn(tmp_path: Path):
    now = read_plan(VERSION_1)
    (island,) = islands_of_plan(now, SIZES["nano"])
    assert list(island.ranks) == [0, 1]
    assert island.layout.zero == 1
    assert "fast" in plan_text(now)
    assert "Pipeline groups" in plan_page(now)
    result = simulate(SimulateConfig(plan=VERSION_1, out=tmp_path / "page.html", runs=2))
    assert result["chips"] == 2


def test_a_plan_is_read_back_as_it_was_written_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, today = tmp_path / "plan.json", json.loads(json.dumps(written_today()))
    file.write_text(json.dumps(today))
    assert read_plan(file) == today
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("values", [[], {}, {"groups": []}, {"pools": []}, {"pools": [], "teams": 3}, "plan", None])
def test_a_file_that_is_no_plan_is_refused_with_its_name(values: Any, tmp_path: Path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"other\.json is no plan as `motley plan --out` writes it"):
        read_plan(file)


def test_the_old_name_of_the_framework_option_is_taken_and_says_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET)
    asked = {"model": "nano", "fleet": fleet, "tokens": "10M", "seq_len": 256, "global_batch": 64}
    old = plan(PlanConfig(**asked, engine="deepseek", out=tmp_path / "old.json"))
    assert "--engine is called --framework now" in capsys.readouterr().err
    new = plan(PlanConfig(**asked, framework="deepseek", out=tmp_path / "new.json"))
    assert "--engine" not in capsys.readouterr().err
    assert old["framework"] == new["framework"] == "deepseek"
    assert old["step_seconds"] == new["step_seconds"]
    with pytest.raises(InputError, match="--engine is 'steam'; there are motley,"):
        PlanConfig(**asked, engine="steam")
