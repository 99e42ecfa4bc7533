"""Predicted against measured step time of unequal workers: the planner's word before the run, and the run.

    python benchmarks/plan_uneven.py [--cases 1:2:4:1 1:8 ...] [--runs 3] [--steps 8] [--quick] [--json]
    python benchmarks/plan_uneven.py --fit         only measure how long workers of other speeds than those below wait
                                                   for each other, and write it into frameworks/motley-cpu*.yaml

A machine is measured once, as `motley fleet probe` does it, with one thread. A case is a fleet of such machines that
are slowed down (`emulated:`), for which the planner makes a plan and says how long a step takes; then `motley pretrain
--emulate FLEET --plan PLAN` runs it, in real processes, and says how long a step took. Nothing is fitted to a case.

    1:2:4:1, 1:8    workers of these speeds, each with the whole model; optimizer state shared by all (ZeRO 1)
    straggler       1:2:4:1 after its fastest worker has slowed down to a fifth
    capped          1:2:4:1, CPU time taken away by control groups instead of waiting (takes root)
    pipeline        two workers of speeds 1:2, of the plans that cut the model between them the fastest
    islands         two islands, of speeds 1:2 and 4, over 100 Mb/s and 50 ms

--quick ends within 50 seconds: a short probe, one run of three steps of an eighth of the rows, and as many cases as
there is time for, 1:8 first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from budget import QUICK_SECONDS, Budget, kept
from fit_frameworks import write
from plan_own_runtime import DESCRIPTIONS, WRITTEN
from processes import TookTooLong, step_seconds

from motley.data.pack import DataConfig, prepare
from motley.files import write_json, write_text
from motley.fleet.inventory import Fleet, parse_fleet
from motley.fleet.probe import probe
from motley.fleet.write import fleet_text
from motley.model import SIZES
from motley.parallel.communicator import free_port
from motley.plan.cost_model.framework import load_framework
from motley.plan.network.spec import NetworkSpec, deepseek
from motley.plan.report.plan_file import plan_values
from motley.plan.search.search import Searcher
from motley.plan.workload import Workload
from motley.progress import Progress
from motley.train.metrics import read_metrics

MODEL, SEQ_LEN, VOCAB_SIZE = "nano", 64, 2048
COMM_TIMEOUT_SECONDS, QUICK_PROBE_SECONDS, QUICK_SHARE, QUICK_TEXT_BYTES = 3600.0, 4.0, 8, 300_000
TOKENS = 1e9  # of the planned run; a step does not depend on them
BUSIEST = 0.45  # share of a core that the fastest worker uses, so that the machine is not what all wait for
FIRST_STEPS = 3  # in which shares are found
LINK = {"bandwidth": "100 Mb/s", "latency": "25 ms"}  # one way


@dataclass(frozen=True)
class Case:
    """Workers, and what the plan must be.

    Attributes:
        speeds: of the workers, relative to each other.
        rows: of a step.
        sites: of each worker, where there are several.
        pipeline: whether all form one.
        emulate_by: what makes a worker slow.
        options: of the run, besides.
    """

    name: str
    speeds: tuple[float, ...]
    rows: int
    sites: tuple[str, ...] = ()
    pipeline: bool = False
    emulate_by: str = "wait"
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, as files and fleets may have it."""
        return self.name.replace(":", "-")


CASES = (
    Case("1:2:4:1", (1, 2, 4, 1), 512),
    Case("1:8", (1, 8), 576),
    Case("straggler", (1, 2, 0.8, 1), 512),
    Case("capped", (1, 2, 4, 1), 512, emulate_by="cap"),
    Case("pipeline", (1, 2), 64, pipeline=True),
    Case("islands", (1, 2, 4), 96, ("north", "north", "south"), options=("--fragments=3", "--overlap=3")),
)

WAITING = (Case("2:3", (2, 3), 192), Case("3:1:2", (3, 1, 2), 256))
WAITING_STEPS = 16


def measured_pool(seconds: float = 20.0) -> dict[str, Any]:
    """This machine with one thread, as a pool of one chip."""
    torch.set_num_threads(1)
    (pool,) = yaml.safe_load(fleet_text([probe(seconds, torch.device("cpu"), grid=True)]))["pools"]
    return pool | {"nodes": 1, "chips_per_node": 1}


def fleet_of(case: Case, machine: dict[str, Any]) -> str:
    """The fleet file of a case: a pool for each worker."""
    pools = []
    for number, speed in enumerate(case.speeds):
        emulated: dict[str, Any] = {"speed": BUSIEST * speed / max(case.speeds)}
        pool = machine | {"name": f"worker{number}", "emulated": emulated}
        if case.sites:
            pool["site"] = case.sites[number]
            alone = case.sites.count(case.sites[number]) == 1
            emulated |= {"link": LINK} if alone else {}
        pools.append(pool)
    values: dict[str, Any] = {"name": case.label, "pools": pools}
    if case.sites:
        values["links"] = [{"sites": sorted(set(case.sites)), **LINK}]
    return yaml.safe_dump(values, sort_keys=False)


def plan_of(case: Case, fleet: Fleet, shape: NetworkSpec) -> dict[str, Any]:
    searcher = Searcher(fleet, Workload(shape, TOKENS, SEQ_LEN, case.rows))
    if case.pipeline:
        whole = frozenset(pool.name for pool in fleet.pools)
        piped = [options.take(np.flatnonzero(options.configs[0].pp > 1)) for options in searcher.options[whole]]
        searcher.options = {whole: tuple(options for options in piped if len(options))}
    found = searcher.best()
    if found is None:
        raise SystemExit(f"no plan for case {case.name}")
    return plan_values(found)


def run(
    case: Case, folder: Path, number: int, data: Path, steps: int, patience: float = COMM_TIMEOUT_SECONDS
) -> list[dict[str, Any]]:
    """Metrics of a run of the plan in `folder`. Raises TookTooLong after `patience` seconds."""
    port = free_port()
    options = [
        f"--out={folder / str(number)}", f"--data={data}", f"--model={MODEL}", f"--plan={folder / 'plan.json'}",
        f"--emulate={folder / 'fleet.yaml'}", f"--emulate-by={case.emulate_by}", "--device=cpu",
        f"--steps={steps}", f"--batch-rows={case.rows}", f"--seq-len={SEQ_LEN}", "--valid-rows=8",
        f"--valid-every={10**6}", f"--checkpoint-every={10**6}", *case.options,
    ]  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "motley", "pretrain", *options],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(case.speeds)), "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(len(case.speeds))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(len(case.speeds))
    ]
    until = time.monotonic() + patience
    try:
        said = [worker.communicate(timeout=max(0.0, until - time.monotonic()))[1].decode() for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.kill()
            worker.wait()
        raise TookTooLong(f"case {case.name} was not done after {patience:.0f} s") from None
    if any(worker.returncode for worker in workers):
        raise SystemExit("\n".join(said))
    return read_metrics(folder / str(number))


def seconds_of(records: list[dict[str, Any]]) -> list[float]:
    """Of each step once shares are found, or of each round by its steps."""
    rounds = [one["round_seconds"] / one["steps"] for one in records if one["kind"] == "outer_step"]
    if rounds:
        return rounds[1:] or rounds
    return step_seconds(records)[FIRST_STEPS:]


def planned(case: Case, machine: dict[str, Any], shape: NetworkSpec, folder: Path) -> dict[str, Any]:
    """The plan of a case; it and the fleet lie in `folder`."""
    text = fleet_of(case, machine)
    plan = plan_of(case, parse_fleet(text, case.name), shape)
    write_text(folder / "fleet.yaml", text)
    write_json(folder / "plan.json", plan)
    return plan


def waiting(machine: dict[str, Any], shape: NetworkSpec, data: Path, folder: Path) -> float:
    """By what share the worker that works the longest in a step exceeds their mean: median of steps, mean of crews."""
    found = []
    for case in WAITING:
        planned(case, machine, shape, folder / case.label)
        records = run(case, folder / case.label, 0, data, WAITING_STEPS + FIRST_STEPS)
        busy = [one["busy_seconds"] for one in records if one["kind"] == "step_stats"][FIRST_STEPS:]
        found.append(statistics.median(max(step) / statistics.mean(step) - 1 for step in busy))
    return statistics.mean(found)


def judged(
    case: Case,
    machine: dict[str, Any],
    shape: NetworkSpec,
    data: Path,
    folder: Path,
    runs: int,
    steps: int,
    budget: Budget,
) -> dict[str, Any]:
    """A case planned, and run so many times. Raises TookTooLong."""
    medians = []
    plan = planned(case, machine, shape, folder / case.label)
    steps = 3 * (plan["inner_steps"] or 0) or steps + FIRST_STEPS + 1
    for number in range(runs):
        records = run(case, folder / case.label, number, data, steps, budget.patience(COMM_TIMEOUT_SECONDS))
        medians.append(statistics.median(seconds_of(records)))
    middle = statistics.median(medians)
    return {
        **asdict(case),
        "predicted_seconds": plan["step_seconds"],
        "measured_seconds": medians,
        "median_seconds": middle,
        "relative_error": plan["step_seconds"] / middle - 1,
        "split_seconds": plan["step_split_seconds"],
        "groups": [
            {name: group[name] for name in ("pools", "pp", "zero", "micro_batch", "sequences", "island")}
            for group in plan["groups"]
        ],
    }


def told(found: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'case':10} {'predicted':>10} {'measured':>10}  {'(spread)':18} {'off by':>7}"]
    for one in found:
        spread = f"({min(one['measured_seconds']):.3f} to {max(one['measured_seconds']):.3f})"
        lines.append(
            f"{one['name']:10} {one['predicted_seconds']:8.3f} s {one['median_seconds']:8.3f} s  {spread:18} "
            f"{one['relative_error']:+7.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="that count, of a run")
    parser.add_argument("--quick", action="store_true", help="one run of three steps")
    parser.add_argument("--fit", action="store_true", help="measure and write `Framework.waiting` only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs, steps = (1, 3) if arguments.quick else (arguments.runs, arguments.steps)
    chosen = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    if arguments.quick:
        chosen = [
            replace(case, rows=case.rows // QUICK_SHARE) for case in sorted(chosen, key=lambda c: c.name != "1:8")
        ]
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "plan_uneven"):
            found = measured(arguments, chosen, runs, steps, budget)
    except TookTooLong as slow:
        raise SystemExit(f"plan_uneven: {slow}; this machine is too slow or too busy for it") from None
    if found is not None:
        print(json.dumps(found) if arguments.json else told(found))


def measured(
    arguments: argparse.Namespace, chosen: Sequence[Case], runs: int, steps: int, budget: Budget
) -> list[dict[str, Any]] | None:
    """Every case for which there is time; None where only `waiting` was to be measured and written."""
    machine = measured_pool(QUICK_PROBE_SECONDS if arguments.quick else 20.0)
    with tempfile.TemporaryDirectory() as place, Progress("running", total=len(chosen), unit="cases") as bar:
        folder = Path(place)
        most = QUICK_TEXT_BYTES if arguments.quick else None
        prepared = prepare(DataConfig(vocab_size=VOCAB_SIZE, max_bytes=most), folder / "data")  # the standard library
        shape = deepseek(replace(SIZES[MODEL], vocab_size=prepared.vocab_size), MODEL)
        if arguments.fit:
            share = waiting(machine, shape, folder / "data", folder)
            for name in DESCRIPTIONS:
                write(replace(load_framework(name), waiting=share), WRITTEN)
            print(f"waiting {share:.2%} of a step")
            return None
        found = []
        for case in budget.each(chosen):
            found.append(judged(case, machine, shape, folder / "data", folder, runs, steps, budget))
            bar.advance(1)
        return found


if __name__ == "__main__":
    main()
