"""What DeepSeek-V3's 14.8 T tokens take on the fleets of the story, and when a lesser chip pays.

    python benchmarks/story.py [--quick] [--json]

First table: every fleet of examples/fleets/ that can hold the model, failures counted. Second: 2,000 A100s with 1,024
chips of one other kind beside them: how many days that saves, what the run then costs, and below which rent of theirs
it would be cheaper than without them. All of it is predicted, not run. `deepseek` is the published trainer as its
reports describe it; `motley` is ours, which has no tensor parallelism and is not yet measured on accelerators.

--quick ends within 50 seconds: as many fleets, and lesser chips of two, as there is time for.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from budget import QUICK_SECONDS, Budget, kept

from motley.errors import InputError
from motley.fleet import Fleet, Pool, load_fleet
from motley.plan.network.registry import find_network
from motley.plan.report.plan_file import plan_comparison, plan_values
from motley.plan.search.objective import best_plan
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload

FLEETS = Path(__file__).parents[1] / "examples/fleets"
RUNS = (  # fleet, fp8
    ("h100-16000", True),
    ("h100-16000", False),
    ("h800-2048", True),
    ("a100-2048", False),
    ("story", False),
    ("three-sites", False),
    ("lab", False),
)
FRAMEWORKS = ("deepseek", "motley")
TOKENS, SEQ_LEN, BATCH = 14.8e12, 4096, 15_360  # V3 report, 4.2
LESSER = ("H100-80GB-SXM", "H20-96GB", "L40S-48GB", "RTX-4090", "A30-24GB", "A40-48GB", "L20-48GB", "V100-32GB-SXM")
QUICK_LESSER = ("A40-48GB", "V100-32GB-SXM")
ADDED = 1024


def workload(fp8: bool, framework: str) -> Workload:
    return Workload(find_network("v3"), TOKENS, SEQ_LEN, BATCH, framework, fp8)


def fleet_row(name: str, fp8: bool, framework: str) -> dict[str, Any]:
    fleet = load_fleet(FLEETS / f"{name}.yaml")
    searcher = Searcher(fleet, workload(fp8, framework))
    row: dict[str, Any] = {"fleet": fleet.name, "framework": framework, "precision": "fp8" if fp8 else "16 bit"}
    try:
        chosen, found = best_plan(searcher, "time", None)
    except InputError as refused:
        return {**row, "refused": str(refused)}
    plan = plan_values(found) | plan_comparison(chosen, found)
    even = plan["comparison"]["even_split"]
    return {
        **row,
        **{key: plan[key] for key in ("chips", "days", "chip_hours", "cost", "energy_kwh", "goodput")},
        "mixed_efficiency": plan["mixed_efficiency"] if len(fleet.pools) > 1 else None,
        "even_split_speed": even["relative_speed"] if even else None,
        "inner_steps": plan["inner_steps"],
    }


def beside_a100(chip: str | None) -> dict[str, Any]:
    """2,000 A100s, alone or with `ADDED` other chips."""
    pools = [Pool(name="a100", chip="A100-80GB-SXM", nodes=250)]
    if chip:
        pools.append(Pool(name=chip, chip=chip, nodes=ADDED // 8, chips_per_node=8))
    fleet = Fleet(name=chip or "2000 A100", pools=tuple(pools))
    searcher = Searcher(fleet, workload(False, FRAMEWORKS[0]))
    _, found = best_plan(searcher, "time", None)
    plan = plan_values(found) | plan_comparison(searcher, found)
    used = sum(pool["chips"] for pool in plan["pools"] if pool["pool"] == chip)
    hours = plan["days"] * 24
    return {
        "beside": chip,
        "price_per_hour": pools[-1].price,
        "days": plan["days"],
        "cost": plan["cost"],
        "cost_of_a100": plan["cost"] - used * hours * pools[-1].price if chip else plan["cost"],
        "chip_hours": used * hours,
        "mixed_efficiency": plan["mixed_efficiency"],
        "used": used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"what there is time for in {QUICK_SECONDS:g} seconds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    with kept(budget, "story"):
        base = beside_a100(None)
        lesser = [beside_a100(chip) for chip in budget.each(QUICK_LESSER if arguments.quick else LESSER)]
        runs = [(name, fp8, framework) for name, fp8 in RUNS for framework in FRAMEWORKS]
        fleets = [fleet_row(*run) for run in budget.each(runs, least=1)]
    if arguments.json:
        print(json.dumps({"fleets": fleets, "a100_alone": base, "beside_a100": lesser}))
        return
    print("| Fleet | Framework, format | Chips | Days | Chip-hours | Price | Energy | Mixed efficiency | Even split |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in fleets:
        name = f"| {row['fleet']} | {row['framework']}, {row['precision']} "
        if "refused" in row:
            print(f"{name}| | | | | | | {row['refused']} |")
            continue
        mixed = f"{row['mixed_efficiency']:.0%}" if row["mixed_efficiency"] else ""
        even = f"{row['even_split_speed']:.0%}" if row["even_split_speed"] else ""
        print(
            f"{name}| {row['chips']:,} | {row['days']:.0f} | {row['chip_hours'] / 1e6:.2f} M | "
            f"${row['cost'] / 1e6:.1f} M | {row['energy_kwh'] / 1e6:.1f} GWh | {mixed} | {even} |"
        )
    print(f"\n2,000 A100 alone: {base['days']:.0f} days, ${base['cost'] / 1e6:.1f} M\n")
    print(f"| {ADDED:,} more | $ an hour each | Days | Days saved | Price of the run | Pays below | Mixed efficiency |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in lesser:
        mixed = f"{row['mixed_efficiency']:.0%}" if row["mixed_efficiency"] else ""
        worth = (base["cost"] - row["cost_of_a100"]) / row["chip_hours"] if row["used"] else 0.0
        print(
            f"| {row['beside']} | {row['price_per_hour']:.2f} | {row['days']:.0f} | "
            f"{1 - row['days'] / base['days']:.1%} | ${row['cost'] / 1e6:.1f} M "
            f"({row['cost'] / base['cost'] - 1:+.1%}) | ${worth:.2f} | {mixed if row['used'] else 'left out'} |"
        )


if __name__ == "__main__":
    main()
