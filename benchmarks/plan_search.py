"""What the search for a plan costs, and whether anything beats what it finds.

    python benchmarks/plan_search.py [--quick] [--json]

Time and memory: DeepSeek-V3's shape on 8 types of chip, 256 to 65,536 of them, each search a process of its own on one
core; and 2,048 chips of 1, 2, 4 and 8 types. Quality: on a small fleet of three types the plan is held against the best
of 10,000 random valid ones, each costed by the plain reference of the tests (tests/plan/reference.py).

--quick ends within 50 seconds: 2,048 chips of four types, and as many random plans as there is time for, at most 300.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from budget import QUICK_SECONDS, Budget, kept

from motley.fleet import Fleet, Pool
from motley.plan.network.registry import find_network
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/plan"))

TYPES = ("A100", "H800", "L20", "A40", "V100", "H20", "RTX-4090", "A30")
CHIPS = (256, 2048, 16384, 65536)
MIXES = (1, 2, 4, 8)
QUICK_TYPES = 4
RANDOM_PLANS, QUICK_PLANS = 10_000, 300


def search(types: int, chips: int) -> dict[str, Any]:
    """One search in this process. Seconds from a read fleet to a found plan; peak memory of the whole process."""
    pools = tuple(Pool(name=chip, chip=chip, nodes=chips // types // 8, chips_per_node=8) for chip in TYPES[:types])
    workload = Workload(find_network("v3"), 14.8e12, 4096, 15360, "deepseek")
    start = time.perf_counter()
    found = Searcher(Fleet(name=f"{types} types", pools=pools), workload).best()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "types": types,
        "chips": chips,
        "seconds": seconds,
        "peak_bytes": peak,
        "tokens_per_second": found.tokens_per_second if found else None,
    }


def alone(types: int, chips: int) -> dict[str, Any]:
    """`search` in a fresh process on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pin = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    command = [*pin, sys.executable, __file__, "--one", str(types), str(chips)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def random_plans(count: int, budget: Budget) -> dict[str, Any]:
    """The plan beside the best of `count` random valid ones, or of as many as there is time for."""
    from reference import random_plan_seconds  # pyright: ignore[reportMissingImports]

    pools = (("a", "A100", 2), ("b", "RTX-3090", 4), ("c", "V100", 8))
    fleet = Fleet(pools=tuple(Pool(name=name, chip=chip, chips_per_node=each) for name, chip, each in pools))
    workload = Workload(
        find_network("small"), 1e9, 1024, 64, "deepseek"
    )  # runs every degree and schedule the reference draws
    found = Searcher(fleet, workload).best()
    if found is None:
        raise SystemExit("the small fleet cannot hold the small model: the benchmark is broken")
    random = np.random.default_rng(11)
    seconds: list[float] = []
    tried = 0
    while len(seconds) < count and (not seconds or budget.left() > 0):
        tried += 1
        if (plan := random_plan_seconds(fleet, workload, random)) is not None:
            seconds.append(plan)
    return {
        "valid": len(seconds),
        "tried": tried,
        "found_step_seconds": found.step_seconds,
        "best_random_step_seconds": min(seconds),
        "median_random_step_seconds": float(np.median(seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, 300 random plans")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, type=int, metavar=("TYPES", "CHIPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(search(*arguments.one)))
        return
    sizes = (
        [(QUICK_TYPES, 2048)]
        if arguments.quick
        else [(8, chips) for chips in CHIPS] + [(types, 2048) for types in MIXES[:-1]]
    )
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    with kept(budget, "plan_search"):
        rows = [alone(*size) for size in sizes]
        quality = random_plans(QUICK_PLANS if arguments.quick else RANDOM_PLANS, budget)
    if arguments.json:
        print(json.dumps({"searches": rows, "random": quality}))
        return
    for row in rows:
        print(
            f"{row['types']} types, {row['chips']:6,} chips: {row['seconds']:5.2f} s, "
            f"{row['peak_bytes'] / 1e6:5,.0f} MB, {row['tokens_per_second'] or 0:,.0f} tokens/s"
        )
    print(
        f"random plans: best of {quality['valid']:,} valid ({quality['tried']:,} drawn) "
        f"{quality['best_random_step_seconds']:.4f} s a step, median {quality['median_random_step_seconds']:.4f} s; "
        f"found {quality['found_step_seconds']:.4f} s"
    )


if __name__ == "__main__":
    main()
