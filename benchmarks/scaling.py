"""What a training step takes as a model or its batch grows: seconds and bytes along each axis, and the exponents.

    python benchmarks/scaling.py [--axes layers hidden experts context batch] [--quick] [--json]

One thing at a time is doubled from a base (4 layers, hidden 192, 8 experts of which a token meets 2, 8 rows of 512
tokens), everything else held: `hidden` takes heads and inner widths along, `context` takes rows away, so that tokens
stay (8,192). Every case is a new process: median of the steps' seconds, the most bytes that the process took for it.
The exponent is the slope of a line through the logarithms: 1 means twice as much for twice the size. All of it in the
format that `motley pretrain` would choose here.

--quick ends within 50 seconds: one axis, short rows, one step a case, and as many cases as there is time for.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from budget import QUICK_SECONDS, Budget, kept
from machine import cpu_flags
from memory import COMM_TIMEOUT_SECONDS
from memory_by_zero import forget_peak, peak, random_batch
from processes import TookTooLong, spawned
from thrift import ours
from train_throughput import Ours, our_step

from motley.fleet.device import Format, choose_device, number_format
from motley.fleet.probe import describe, probe
from motley.fleet.products import wait_for
from motley.model import ModelConfig
from motley.plan.network.flops import training_flops_per_token
from motley.progress import note
from motley.train.allocator import keep_freed_memory

WARM_UP, STEPS = 2, 7
QUICK_SEQ_LEN = 128


@dataclass(frozen=True)
class Case:
    axis: str
    size: int
    shape: ModelConfig
    rows: int = 8
    seq_len: int = 512


def shape(hidden: int = 192, layers: int = 4, experts: int = 8) -> ModelConfig:
    made = ours(hidden, layers, hidden // 48, hidden // 3, hidden * 8 // 3, hidden * 2 // 3, n_routed_experts=experts)
    return replace(made, max_position_embeddings=1 << 16, num_nextn_predict_layers=0)


CASES = (
    *(Case("layers", count, shape(layers=count)) for count in (2, 4, 8, 16)),
    *(Case("hidden", width, shape(hidden=width)) for width in (96, 192, 384, 768)),
    *(Case("experts", count, shape(experts=count)) for count in (4, 8, 16, 32, 64)),
    *(Case("context", length, shape(), 8192 // length, length) for length in (256, 512, 1024, 2048, 4096, 8192)),
    *(Case("batch", rows, shape(), rows) for rows in (1, 2, 4, 8, 16, 32)),
)


def measure(rank: int, case: Case, format_: Format, steps: int, results: Any) -> None:
    """A case's process: (median seconds of a step, peak bytes)."""
    device = choose_device("auto")
    keep_freed_memory()
    before = forget_peak(device)
    step = our_step(case.shape, device, Ours("muon", format=format_))
    taken = []
    for number in range(WARM_UP + steps):
        batch = random_batch(case.shape.vocab_size, case.rows, case.seq_len, seed=number)
        started = time.perf_counter()
        step(batch)
        wait_for(device)
        taken.append(time.perf_counter() - started)
    results.put((rank, (statistics.median(taken[WARM_UP:]), peak(device) - before)))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def quick(case: Case) -> Case:
    """The same with shorter rows."""
    return replace(case, seq_len=QUICK_SEQ_LEN)


def measured(axes: list[str], steps: int, format_: Format, budget: Budget) -> dict[str, Any]:
    """By axis; of each at least two sizes. Raises TookTooLong."""
    found: dict[str, Any] = {}
    for axis in axes:
        cases = [case for case in CASES if case.axis == axis]
        rows = []
        for case in budget.each(map(quick, cases) if budget.seconds else cases, least=2):
            timeout = budget.patience(COMM_TIMEOUT_SECONDS)
            ((seconds, most),) = spawned(measure, 1, case, format_, steps, patience=timeout)
            flops = training_flops_per_token(case.shape, case.seq_len) * case.rows * case.seq_len
            rows.append({"size": case.size, "seconds": seconds, "bytes": most, "flops": flops})
            note(f"{axis:8} {case.size:6,}  {1e3 * seconds:9,.1f} ms  {most / 1e6:8,.0f} MB  {flops / 1e9:9,.1f} GFLOP")
        sizes = [row["size"] for row in rows]
        slopes = {name: exponent(sizes, [row[name] for row in rows]) for name in ("seconds", "bytes", "flops")}
        found[axis] = {"cases": rows, "exponents": slopes}
    return found


def told(found: dict[str, Any]) -> str:
    lines = []
    for axis, one in found.items():
        powers = one["exponents"]
        lines.append(
            f"{axis}: seconds grow with the power {powers['seconds']:.2f}, bytes {powers['bytes']:.2f} "
            f"(FLOPs {powers['flops']:.2f})"
        )
        for row in one["cases"]:
            taken, most, rate = 1e3 * row["seconds"], row["bytes"] / 1e6, row["flops"] / row["seconds"] / 1e9
            lines.append(f"  {row['size']:6,}  {taken:9,.1f} ms  {most:8,.0f} MB  {rate:6,.0f} GFLOP/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    axes = list(dict.fromkeys(case.axis for case in CASES))
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    parser.add_argument("--quick", action="store_true", help="one axis, one step a case")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    axes, steps = (["batch"], 1) if arguments.quick else (arguments.axes, STEPS)
    try:
        with kept(budget, "scaling"):
            machine = probe(2.0)
            found = measured(axes, steps, number_format("auto", lambda: machine), budget)
    except TookTooLong as slow:
        raise SystemExit(f"scaling: {slow}; this machine is too slow or too busy for it") from None
    said = f"{describe(machine)} CPU flags: {', '.join(cpu_flags())}\n{told(found)}"
    print(json.dumps(found) if arguments.json else said)


if __name__ == "__main__":
    main()
