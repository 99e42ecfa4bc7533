"""Training on unequal workers: how near a crew comes to the sum of what its workers reach alone.

    python benchmarks/uneven.py --speeds 1:2:4:1 [--capped] [--straggler] [--quick] [--json]

Workers are processes on this machine, made unequal (motley.train.handicap): by waiting after each piece of work, or
with --capped by a control group that gives each its share of CPU time. First each trains on its own, all at the same
time but without a word to each other; then all together, with rows in proportion to measured speed and, in the same
run, with the even split that an engine for equal chips makes. The ideal is the sum of the rates on their own: rows of
a whole step by the measured seconds of its passes (a row) and of its one update of the optimizer.
--straggler slows the fastest worker down to a fifth half-way and counts the steps until the crew does 95 % of what it
then can in three steps in a row.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from motley.data.stream import Batch
from motley.model import SIZES, Transformer
from motley.train.config import PretrainConfig
from motley.train.crew import Crew
from motley.train.emulate import speeds_of
from motley.train.handicap import Handicap, handicap
from motley.train.layout import side_by_side
from motley.train.shares import Shares
from motley.train.worker import Worker

SHAPE = replace(SIZES["nano"], vocab_size=512)
SEQ_LEN, MICRO_BATCH = 64, 4
BUSIEST = 0.45  # share of a core that the fastest worker uses, so that the machine is not what all wait for


class Rows:
    """Random rows as a pure function of their position."""

    seq_len = SEQ_LEN

    def rows(self, position: int, count: int) -> Batch:
        ids = []
        for row in range(position, position + count):
            generator = torch.Generator().manual_seed(row)
            ids.append(torch.randint(SHAPE.vocab_size, (SEQ_LEN + 1,), generator=generator))
        whole = torch.stack(ids)
        return Batch(whole[:, :-1], whole[:, 1:], torch.zeros_like(whole[:, 1:]))


class Even(Shares):
    """The same rows for everyone, whatever was measured."""

    def measured(self, rows: Any, seconds: Any) -> None: ...


def steps(
    crew: Crew,
    slow: Handicap,
    speeds: list[float],
    rows: int,
    count: int,
    even: bool,
    straggle_at: int | None = None,
) -> dict[str, Any]:
    """Seconds of `count` steps, and what they were spent on; the first, in which shares are found, do not count."""
    config = PretrainConfig(batch_rows=rows, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN, steps=1000, precision="fp32")
    layout = side_by_side(crew.size, SHAPE.num_hidden_layers, MICRO_BATCH, zero=0 if crew.alone else 1)
    if not even and not crew.alone:
        layout = replace(layout, rates=tuple(speeds))  # as a start finds them (motley.train.start)
    model = Transformer(SHAPE)
    model.initialize(0)
    worker = Worker(SHAPE, config, layout, crew, model)
    if not crew.alone:
        worker.take_state((dict(model.state_dict()), {}) if crew.leads else None)
    worker.lane.pace = slow.pace
    if even:
        worker.shares = Even([1.0] * crew.size)
    seconds, passes, updates, idle, shares = [], [], [], [], []
    found = 1 if even or crew.alone else 3
    for step in range(count + found):
        if straggle_at is not None and step == straggle_at + found and crew.rank == 0:
            slow.speed /= 5
        started = time.perf_counter()
        slow._cpu = time.process_time()
        losses, norm = worker.gradient(Rows(), step)  # type: ignore[arg-type]
        worker.update(losses, norm, 1e-3)
        worker.share_again()
        spent = time.perf_counter() - started
        if step >= found:
            seconds.append(spent)
            passes.append(worker.lane.span_seconds)
            updates.append(crew.watch.seconds["optimizer"])
            idle.append([1 - busy / spent for busy in worker.timing.worker_seconds])
            shares.append(worker.timing.rows)
    return {"seconds": seconds, "passes": passes, "updates": updates, "idle": idle, "shares": shares}


def work(rank: int, speeds: list[float], port: int, way: str, plan: list[tuple], results: Any) -> None:
    """One worker: on its own first, then in the crew; `plan` lists (what, rows, steps, even, straggle_at).

    On its own a worker takes its share of the rows by speed, so that all of them work for about the same time; what a
    whole step would have taken it follows from that.
    """
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    size = len(speeds)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    slow = handicap(speeds[rank], way)  # type: ignore[arg-type]
    for what, rows, count, even, straggle_at in plan:
        dist.barrier()
        if what == "alone":
            own = max(MICRO_BATCH, round(rows * speeds[rank] / sum(speeds)))
            answer = steps(Crew(), slow, speeds, own, count, even) | {"rows": own}
        else:
            answer = steps(Crew(rank, size), slow, speeds, rows, count, even, straggle_at)
        results.put((what, rank, slow.way, answer))
    dist.barrier()
    dist.destroy_process_group()


def run_crew(speeds: list[float], way: str, plan: list[tuple]) -> dict[str, list[Any]]:
    """What each worker of a crew found, by what was asked, in the order of ranks."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    size = len(speeds)
    workers = [context.Process(target=work, args=(rank, speeds, port, way, plan, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    answers: dict[str, list[Any]] = {what: [None] * size for what, *_ in plan}
    for _ in range(size * len(plan)):
        what, rank, used, answer = results.get(timeout=900)
        answers[what][rank] = answer | {"way": used}
    for worker in workers:
        worker.join()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", default="1:2:4:1")
    parser.add_argument("--capped", action="store_true", help="cap CPU time instead of waiting")
    parser.add_argument("--straggler", action="store_true")
    parser.add_argument("--rows", type=int, help="of a step; default: 32 for each unit of speed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run of few steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    relative = speeds_of(arguments.speeds, arguments.speeds.count(":") + 1)
    speeds = [speed * BUSIEST for speed in relative]
    way = "cap" if arguments.capped else "wait"
    rows = arguments.rows or round(32 * sum(relative) / min(relative))
    runs, count = (1, 2) if arguments.quick else (arguments.runs, 6)
    outcomes = []
    for _ in range(runs):
        plan = [
            ("alone", rows, count, False, None),
            ("uneven", rows, count, False, None),
            ("even", rows, max(1, count // 4), True, None),
        ]
        answers = run_crew(speeds, way, plan)
        alone = [
            rows / (statistics.median(a["passes"]) * rows / a["rows"] + statistics.median(a["updates"]))
            for a in answers["alone"]
        ]
        rate = {what: rows / statistics.median(answers[what][0]["seconds"]) for what in ("uneven", "even")}
        idle = zip(*answers["uneven"][0]["idle"], strict=True)
        outcomes.append(
            {
                "alone_rows_per_second": alone,
                "rows_per_second": rate["uneven"],
                "ratio_to_ideal": rate["uneven"] / sum(alone),
                "even_split_ratio": rate["even"] / sum(alone),
                "idle_shares": [statistics.median(column) for column in idle],
                "rows": answers["uneven"][0]["shares"][-1],
                "way": answers["uneven"][0]["way"],
            }
        )
    middle = sorted(outcomes, key=lambda outcome: outcome["ratio_to_ideal"])[len(outcomes) // 2]
    result: dict[str, Any] = {
        "speeds": arguments.speeds,
        **middle,
        "ratios_to_ideal": [outcome["ratio_to_ideal"] for outcome in outcomes],
        "even_split_ratios": [outcome["even_split_ratio"] for outcome in outcomes],
        "model": "nano",
        "batch_rows": rows,
        "seq_len": SEQ_LEN,
        "micro_batch": MICRO_BATCH,
    }
    if arguments.straggler:
        result["steps_to_absorb_a_straggler"] = straggler(speeds, relative, rows)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"speeds {arguments.speeds}, emulated by {result['way']}; {rows} rows of {SEQ_LEN} tokens a step, model nano")
    print(f"  alone        {', '.join(f'{rate:.2f}' for rate in middle['alone_rows_per_second'])} rows/s")
    spread = f"{min(result['ratios_to_ideal']):.1%} to {max(result['ratios_to_ideal']):.1%}"
    print(
        f"  together     {middle['rows_per_second']:.2f} rows/s: {middle['ratio_to_ideal']:.1%} of the sum ({spread})"
    )
    print(f"  even split   {middle['even_split_ratio']:.1%}")
    print(f"  rows         {middle['rows']}; idle {', '.join(f'{share:.1%}' for share in middle['idle_shares'])}")
    if arguments.straggler:
        print(f"  straggler    absorbed in {result['steps_to_absorb_a_straggler']} steps")


def straggler(speeds: list[float], relative: list[float], rows: int) -> int:
    """Steps from the moment the fastest worker slows down until the crew does 95 % of what it then can."""
    order = sorted(range(len(speeds)), key=lambda rank: -speeds[rank])  # the fastest becomes worker 0
    answers = run_crew([speeds[rank] for rank in order], "wait", [("straggler", rows, 26, False, 10)])
    seconds = answers["straggler"][0]["seconds"]
    before = statistics.median(seconds[2:10])
    fastest = relative[order[0]]
    possible = before * sum(relative) / (sum(relative) - fastest * 0.8)
    well = [spent <= possible / 0.95 for spent in seconds]
    return next((step - 9 for step in range(10, len(well) - 2) if all(well[step : step + 3])), -1)


if __name__ == "__main__":
    main()
