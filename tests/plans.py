"""Plans, drawn up by hand and by the planner."""

import json
from pathlib import Path
from typing import Any

from commands import TINY

from motley.fleet.inventory import Fleet, parse_fleet
from motley.model import ModelConfig
from motley.plan.network.spec import deepseek
from motley.plan.report.plan_file import plan_values
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload


def plan_of(pools: dict[str, tuple[int, int]], teams: list[tuple[list[str], int, list[int]]]) -> dict[str, Any]:
    """What launch and the runtime read of a plan file.

    Args:
        pools: name: (nodes, chips in a node).
        teams: (pool of each stage, copies, layers of each stage) of each.
    """
    chips = dict.fromkeys(pools, 0)
    written = []
    for stage_pools, copies, layers in teams:
        stages, first = [], 0
        for pool, count in zip(stage_pools, layers, strict=True):
            chips[pool] += copies
            span = [first, first + count - 1] if count else []
            first += count
            stages.append({"pool": pool, "layers": span, "mtp": 0, "head": False, "memory_bytes": {"optimizer": 1.0}})
        stages[-1] |= {"head": True, "mtp": 1}
        written.append({
            "pools": list(dict.fromkeys(stage_pools)), "tp": dict.fromkeys(stage_pools, 1), "cp": 1, "ep": 1,
            "dp": copies, "zero": 0, "schedule": "1f1b", "island": 0, "micro_batch": 1, "sequences": copies,
            "recompute": "none", "precision": dict.fromkeys(stage_pools, "bf16"), "stages": stages,
        })  # fmt: skip
    listed = [
        {"pool": name, "chips": chips[name], "nodes": nodes, "chips_per_node": each}
        for name, (nodes, each) in pools.items()
    ]
    return {"pools": listed, "groups": written, "step_seconds": 1.0}


def planned(fleet: Fleet, config: ModelConfig, rows: int, seq_len: int = 64) -> dict[str, Any] | None:
    """The plan as it would be read from its file."""
    found = Searcher(fleet, Workload(deepseek(config), 1e6, seq_len, rows)).best()
    return None if found is None else json.loads(json.dumps(plan_values(found)))


PRETEND = """
pools:
  - {name: fast, chip: desktop-core, chips_per_node: 1, precision: fp32, emulated: {speed: 0.6}}
  - {name: slow, chip: desktop-core, chips_per_node: 1, precision: fp32, emulated: {speed: 0.3}}
"""
TINY_SHAPE = ModelConfig.from_hf(TINY)


def plan_file(
    folder: Path, fleet: str, config: ModelConfig = TINY_SHAPE, **changed: Any
) -> tuple[Path, dict[str, Any]]:
    """A plan of two workers for a model (default: the tiny one), and its file; `changed` in every group.

    For more rows than the runs have: four would be done before a second worker is worth its messages.
    """
    plan = planned(parse_fleet(fleet, "fleet"), config, rows=64)
    assert plan is not None
    assert plan["chips"] == 2
    for group in plan["groups"]:
        group.update(changed)
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    return file, plan


LAYERS = 12
SHAPE = ModelConfig.from_hf(TINY | {"num_hidden_layers": LAYERS})
