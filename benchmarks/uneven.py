"""Training on unequal workers: how near a crew comes to the sum of what its workers reach alone.

    python benchmarks/uneven.py --speeds 1:2:4:1 [--capped] [--straggler] [--quick] [--json]

Ranks are processes on this machine, made unequal (motley.emulation.cpu_throttle) by waiting after each piece of work or
with --capped by a control group that gives each its share of CPU time. In turns, step by step, each trains on its own,
all at the same time but without a word to each other; then all together, with rows in proportion to measured speed;
then with the even split that an engine for equal chips makes. The ideal is the sum of the rates on their own: rows of a
whole step by the measured seconds of its passes (a row) and of its one update of the optimizer.
--straggler slows the fastest worker down to a fifth half-way and counts the steps until the crew does 95 % of what it
then can in three steps in a row.

Everything is in fp32, which a slow worker's share does not depend on. --quick ends within 50 seconds: a
sixteenth of the rows, and as many rounds as there is time for.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from budget import QUICK_SECONDS, Budget, kept
from processes import TookTooLong, spawned

from motley.data.stream import Batch
from motley.emulation.cpu_throttle import Throttle, throttle
from motley.emulation.roles import speeds_of
from motley.model import SIZES, Transformer
from motley.parallel.communicator import Communicator, free_port
from motley.parallel.layout import side_by_side
from motley.parallel.load_balance import LoadBalancer
from motley.parallel.rank import Ranks
from motley.train.config import PretrainConfig
from motley.train.trainer import without_long_collections

SHAPE = replace(SIZES["nano"], vocab_size=512)
SEQ_LEN, MICRO_BATCH = 64, 4
COMM_TIMEOUT_SECONDS, QUICK_ROWS = 900.0, 4
BUSIEST = 0.6  # share of a core that the fastest worker uses, so that the machine is not what all wait for


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


class Even(LoadBalancer):
    """The same rows for everyone, whatever was measured."""

    def measured(self, rows: Any, seconds: Any) -> None: ...


class Way:
    """One way to share the rows of a step, at one worker: on its own, by measured speed, or evenly.

    Attributes:
        steps: of each counted step what it took and was spent on.
    """

    def __init__(self, comm: Communicator, slow: Throttle, speeds: list[float], rows: int, even: bool) -> None:
        config = PretrainConfig(batch_rows=rows, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN, steps=1000, precision="fp32")
        layout = side_by_side(comm.size, SHAPE.num_hidden_layers, MICRO_BATCH, zero=0 if comm.alone else 1)
        if not even and not comm.alone:
            layout = replace(layout, rates=tuple(speeds))  # as a start finds them (motley.parallel.build)
        model = Transformer(SHAPE)
        model.initialize(0)
        self.ranks = Ranks(SHAPE, config, layout, comm)
        self.ranks.take_state((dict(model.state_dict()), {}) if comm.leads else None)
        self.ranks.runner.pace = slow.pace
        if even:
            self.ranks.balancer = Even([1.0] * comm.size)
        self._slow, self._number = slow, 0
        self.steps: list[dict[str, Any]] = []

    def step(self, counts: bool = True) -> None:
        """The next step; `counts`: or only finds its shares."""
        ranks = self.ranks
        started = time.perf_counter()
        self._slow.begin()
        losses, norm = ranks.gradient(ranks.read(Rows(), self._number))  # type: ignore[arg-type]
        ranks.update(losses, norm, 1e-3)
        ranks.share_rows()
        spent = time.perf_counter() - started
        self._number += 1
        if counts:
            self.steps.append(
                {
                    "seconds": spent,
                    "passes": ranks.runner.span_seconds,
                    "updates": ranks.comm.timer.seconds["optimizer"],
                    "idle": [1 - busy / spent for busy in ranks.stats.rank_seconds],
                    "rows": ranks.stats.rows,
                }
            )


def compared(
    comm: Communicator, slow: Throttle, speeds: list[float], rows: int, rounds: int, timeout: float
) -> dict[str, Any]:
    """Steps of each way in turn, so that whatever else the machine does is shared out among them.

    On its own a worker takes its share of the rows by speed, so that all of them work for about the same time; what a
    whole step would have taken it follows from that. Rounds after the first are begun while, by the first worker's
    clock, less than half of `patience`, in seconds, is over.
    """
    began = time.perf_counter()
    own = max(MICRO_BATCH, round(rows * speeds[comm.rank] / sum(speeds)))
    ways = {
        "alone": Way(Communicator(), slow, speeds, own, even=False),
        "uneven": Way(comm, slow, speeds, rows, even=False),
        "even": Way(comm, slow, speeds, rows, even=True),
    }
    for what, way in ways.items():
        for _ in range(3 if what == "uneven" else 1):  # memory is found, and shares
            way.step(counts=False)
    for number in range(rounds):
        if number and comm.led(lambda: time.perf_counter() - began > timeout / 2):
            break
        for what, way in ways.items():
            if what != "even" or number % 3 == 0:  # the longest by far
                dist.barrier()
                way.step()
    return {"rows": own} | {what: way.steps for what, way in ways.items()}


def straggling(comm: Communicator, slow: Throttle, speeds: list[float], rows: int) -> dict[str, Any]:
    """Seconds of steps, before the tenth of which worker 0 slows down to a fifth."""
    way = Way(comm, slow, speeds, rows, even=False)
    for number in range(-3, 26):
        if number == 10 and comm.leads:
            slow.speed /= 5
        way.step(counts=number >= 0)
    return {"seconds": [step["seconds"] for step in way.steps]}


def work(
    rank: int, speeds: list[float], port: int, how: str, rows: int, rounds: int, timeout: float, results: Any
) -> None:
    """One worker; no rounds: the straggler."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    comm = Communicator(rank, len(speeds))
    dist.init_process_group("gloo", rank=rank, world_size=comm.size)
    slow = throttle(speeds[rank], how)  # type: ignore[arg-type]
    with without_long_collections():  # as `motley pretrain` does
        answer = compared(comm, slow, speeds, rows, rounds, timeout) if rounds else straggling(comm, slow, speeds, rows)
    results.put((rank, answer | {"way": slow.by}))
    dist.barrier()
    dist.destroy_process_group()


def run_crew(
    speeds: list[float], how: str, rows: int, rounds: int, timeout: float = COMM_TIMEOUT_SECONDS
) -> list[dict[str, Any]]:
    """What each worker of a crew found, in the order of ranks. Raises TookTooLong."""
    return spawned(work, len(speeds), speeds, free_port(), how, rows, rounds, timeout, patience=timeout)


def outcome(answers: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Rates of the ways in rows a second, by the medians of their steps, and how near they come to the ideal."""

    def median(answer: dict[str, Any], what: str, name: str) -> float:
        return statistics.median(step[name] for step in answer[what])

    alone = [
        rows / (median(answer, "alone", "passes") * rows / answer["rows"] + median(answer, "alone", "updates"))
        for answer in answers
    ]
    first = answers[0]
    rates = {what: rows / median(first, what, "seconds") for what in ("uneven", "even")}
    return {
        "alone_rows_per_second": alone,
        "rows_per_second": rates["uneven"],
        "ratio_to_ideal": rates["uneven"] / sum(alone),
        "even_split_ratio": rates["even"] / sum(alone),
        "idle_shares": [
            statistics.median(column) for column in zip(*(s["idle"] for s in first["uneven"]), strict=True)
        ],
        "rows": first["uneven"][-1]["rows"],
        "way": first["way"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", default="1:2:4:1")
    parser.add_argument("--capped", action="store_true", help="cap CPU time instead of waiting")
    parser.add_argument("--straggler", action="store_true", help="besides; not with --quick")
    parser.add_argument("--rows", type=int, help="of a step; default: 64 for each unit of speed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run of few steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    relative = speeds_of(arguments.speeds, arguments.speeds.count(":") + 1)
    speeds = [speed * BUSIEST for speed in relative]
    how = "cap" if arguments.capped else "wait"
    rows = arguments.rows or round((QUICK_ROWS if arguments.quick else 64) * sum(relative) / min(relative))
    runs, rounds = (1, 2) if arguments.quick else (arguments.runs, 6)
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "uneven"):
            timeout = budget.patience(COMM_TIMEOUT_SECONDS)
            outcomes = [outcome(run_crew(speeds, how, rows, rounds, timeout), rows) for _ in range(runs)]
    except TookTooLong as slow:
        raise SystemExit(f"uneven: {slow}; this machine is too slow or too busy for it") from None
    middle = sorted(outcomes, key=lambda one: one["ratio_to_ideal"])[len(outcomes) // 2]
    result: dict[str, Any] = {
        "speeds": arguments.speeds,
        **middle,
        "ratios_to_ideal": [one["ratio_to_ideal"] for one in outcomes],
        "even_split_ratios": [one["even_split_ratio"] for one in outcomes],
        "model": "nano",
        "batch_rows": rows,
        "seq_len": SEQ_LEN,
        "micro_batch": MICRO_BATCH,
    }
    if arguments.straggler and not arguments.quick:
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
    if "steps_to_absorb_a_straggler" in result:
        print(f"  straggler    absorbed in {result['steps_to_absorb_a_straggler']} steps")


def straggler(speeds: list[float], relative: list[float], rows: int) -> int:
    """Steps from the moment the fastest worker slows down until the crew does 95 % of what it then can."""
    order = sorted(range(len(speeds)), key=lambda rank: -speeds[rank])  # the fastest becomes worker 0
    seconds = run_crew([speeds[rank] for rank in order], "wait", rows, rounds=0)[0]["seconds"]
    before = statistics.median(seconds[2:10])
    fastest = relative[order[0]]
    possible = before * sum(relative) / (sum(relative) - fastest * 0.8)
    well = [spent <= possible / 0.95 for spent in seconds]
    return next((step - 9 for step in range(10, len(well) - 2) if all(well[step : step + 3])), -1)


if __name__ == "__main__":
    main()
