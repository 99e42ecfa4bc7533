"""Faults: what a crew does when its workers are killed, paused, given a full disk, other code or other data.

    python benchmarks/faults.py [--folder DIR] [--kills 100] [--others 42] [--seed 0] [--at-once 2] [--json]

Every trial starts a small crew (a model with experts and an MTP module, 40 steps, a checkpoint every 5) under torchrun,
in a layout drawn at random, or live; it does one thing to it at a random moment, lets the way of starting bring it to
its end, and compares every step's loss and tokens, once each, with a run that nobody disturbed: one process, and for
islands the same islands. A trial passes when it ended within the limit, said what happened, in a line on the terminal
or as an event in the metrics, gave the losses (to 1e-5), and left only whole checkpoints behind. What cannot be
survived has to be refused, and to run once it is mended.

What is done lies in the folder (trial-NUMBER.json): the same command goes on where it was broken off. The full disk
needs root and Linux (a small tmpfs).

--quick ends within three minutes: one trial at a time, the first ones that need no root, as many as there is time for.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from budget import Budget, kept
from fault_layouts import (
    LAYOUTS,
    LIMIT_SECONDS,
    PATIENCE,
    STEPS,
    Bench,
    Communicator,
    listener,
    master_port,
    records,
    until,
)

import motley

LATEST = 28
"""Step by which a crew is struck, so that it is not done before."""
ALIKE = 20
"""Steps that do not depend on how long a run is going to be: the learning rate still warms up."""
TOLERANCE = 1e-5
QUICK_SECONDS, QUICK_TRIALS = 180.0, 2


@dataclass
class Trial:
    """What was done and what came of it."""

    number: int
    fault: str
    layout: str
    workers: int
    at_step: int = 0
    seconds: float = 0.0
    ended: str = ""
    message: str = ""
    largest_difference: float | None = None
    passed: bool = False


class Missed(Exception):
    """The crew was done before it was struck: the trial says nothing and is made again."""


# ------------------------------------------------------------------------------------------------ faults


def struck(pids: Sequence[int], place: int, number: signal.Signals) -> None:
    """Send a signal to one of the workers. Raises Missed where it is not there any more."""
    try:
        os.kill(pids[place], number)
    except (IndexError, ProcessLookupError):
        raise Missed from None


def kill_a_worker(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    """Any but the first."""
    pids = comm.pids()
    struck(pids, chance.randrange(1, max(2, len(pids))), signal.SIGKILL)


def kill_worker_0(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    struck(comm.pids(), 0, signal.SIGKILL)


def kill_in_checkpoint(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    """Worker 0, while it writes."""
    pids, writing = comm.pids(), comm.out / "checkpoints"
    until(lambda: list(writing.glob("*.writing-*")), comm)
    struck(pids, 0, signal.SIGKILL)


def kill_while_rebalancing(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    """One is paused for a second, its rows go to others, and one of those dies two steps later."""
    pids = comm.pids()
    if len(pids) < 2:
        raise Missed
    first, second = chance.sample(range(len(pids)), 2)
    struck(pids, first, signal.SIGSTOP)
    time.sleep(1)
    os.kill(pids[first], signal.SIGCONT)
    now = comm.step()
    until(lambda: comm.step() >= now + 2, comm)
    struck(pids, second, signal.SIGKILL)


def kill_coordinator(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    """Who listens where the others meet: torchrun, which is no worker, or the first of a live crew that meets anew."""
    pids = comm.pids() if comm.live else [comm.started[-1].pid]
    host = listener([*pids, *comm.pids()], master_port(comm)) if pids else None
    if not comm.live and host is None:
        raise Missed
    assert host in (pids[0], None), "another process is where the workers meet"
    struck(pids, 0, signal.SIGKILL)
    if not comm.live:
        comm.started[-1].wait()


def pause(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    pids = comm.pids()
    victim = chance.randrange(max(1, len(pids)))
    struck(pids, victim, signal.SIGSTOP)
    time.sleep(PATIENCE / 3)
    os.kill(pids[victim], signal.SIGCONT)


def stop_for_ever(bench: Bench, comm: Communicator, chance: random.Random) -> None:
    """The paused one is killed once the others have said that it is silent, and in a live crew have gone on."""
    pids = comm.pids()
    if len(pids) < 2:
        raise Missed
    victim = chance.randrange(len(pids))
    struck(pids, victim, signal.SIGSTOP)
    until(lambda: " failed: " in comm.said(), comm)
    if comm.live:
        now = comm.step()
        until(lambda: comm.step() > now, comm)
    os.kill(pids[victim], signal.SIGKILL)


Strike = Callable[[Bench, Communicator, random.Random], None]
EXITED = r"failed: .*rank \d+( \(pid \d+\))? exited|\(\d+ joined, [1-9]\d* left\)"
TOOK_LONG = r"this (step|round|validation|checkpoint) took ([3-9]|\d\d+)\.\d s, usually it takes"
KILLS: dict[str, tuple[Strike, str]] = {
    "kill a worker": (kill_a_worker, EXITED),
    "kill worker 0": (kill_worker_0, EXITED),
    "kill worker 0 in a checkpoint": (kill_in_checkpoint, EXITED),
    "kill while rebalancing": (kill_while_rebalancing, EXITED),
    "kill the coordinator": (kill_coordinator, rf"torchrun exited|{EXITED}"),
}
"""What is done, and what has to be said of it."""
PAUSES: dict[str, tuple[Strike, str]] = {
    "pause, shorter than patience": (pause, TOOK_LONG),
    "stop for ever": (stop_for_ever, r"failed: .*rank \d+ \(pid \d+\) is stopped"),
}
SURVIVED = KILLS | PAUSES
ODD = {"other code": "source code", "other settings": "seed", "other data": r"(own )?(--)?data"}
"""What differs at one worker, and what the refusal calls it."""
OTHERS = (*PAUSES, "full disk", "broken newest checkpoint", *ODD)


def said_of(pattern: str, said: str) -> str:
    """The first line that says it, or nothing."""
    lines = [line for line in said.splitlines() if re.search(pattern, line)]
    return lines[0][:300] if lines else ""


# ------------------------------------------------------------------------------------------------ trials


def survive(bench: Bench, trial: Trial, comm: Communicator, chance: random.Random) -> None:
    """A fault that the way of starting is to survive."""
    strike, pattern = SURVIVED[trial.fault]
    bench.start_all(comm, restarts=2)
    if comm.live and trial.fault == "kill the coordinator":
        if not until(lambda: comm.members()[0] > 1 and len(comm.members()[1]) > 1, comm):  # at work before, not alone
            raise Missed
    else:
        wait_for_moment(comm, trial, chance)
    trial.at_step, began = comm.step(), time.monotonic()
    strike(bench, comm, chance)
    if comm.live and chance.random() < 0.5:
        bench.start(comm)  # a newcomer
    judge(bench, comm, trial)
    trial.message = said_of(pattern, comm.said())
    trial.passed = trial.passed and bool(trial.message)
    trial.seconds = round(time.monotonic() - began, 1)


def wait_for_moment(comm: Communicator, trial: Trial, chance: random.Random) -> None:
    """Until all are at work and some steps further."""
    together = (lambda: len(comm.members()[1]) == comm.workers) if comm.live else (lambda: comm.step() > 0)
    until(lambda: together() or comm.step() > STEPS // 2, comm)
    # What is usual has to be known before it can be said that something took long; two rounds of islands are ten steps.
    earliest = 12 if trial.fault in PAUSES else 1
    moment = min(max(comm.step() + chance.randint(1, 8), chance.randint(earliest, earliest + 8)), LATEST)
    until(lambda: comm.step() >= moment, comm)
    time.sleep(chance.random() * 0.05)


def judge(bench: Bench, comm: Communicator, trial: Trial) -> None:
    """Wait for the end, start the job once more if it was given up, and compare."""
    if not comm.wait():
        trial.ended = "HUNG"
        return
    trial.ended = trial.ended or "by itself"
    if not (comm.out / "result.json").is_file():
        trial.ended = "after the command was given again"
        bench.start_all(comm)
        if not comm.wait():
            trial.ended = "HUNG"
            return
    same = compare(bench, comm, trial, STEPS)
    trial.passed = same and (comm.out / "result.json").is_file() and not list(comm.out.rglob("*.writing-*"))


def compare(bench: Bench, comm: Communicator, trial: Trial, steps: int) -> bool:
    """Whether all steps so far are the undisturbed run's."""
    found, calm = ([r for r in of if r[1] <= steps] for of in (records(comm.out), bench.expected(comm)))
    if [record[:3] for record in found] != [record[:3] for record in calm]:
        return False
    trial.largest_difference = max(abs(a[3] - b[3]) / abs(b[3]) for a, b in zip(found, calm, strict=True))
    return trial.largest_difference < TOLERANCE


def full_disk(bench: Bench, trial: Trial, comm: Communicator, chance: random.Random) -> None:
    """The run folder is a small disk, which gets larger once the crew has said that it is full."""
    comm.out.mkdir()
    size = chance.choice(["400k", "700k", "1000k", "1300k"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(comm.out)], check=True)
    try:
        bench.start_all(comm)
        if not comm.wait():
            trial.ended = "HUNG"
            return
        trial.message, trial.at_step = said_of("free some space", comm.said()), comm.step()
        subprocess.run(["mount", "-o", "remount,size=64m", str(comm.out)], check=True)
        judge(bench, comm, trial)
        trial.passed = trial.passed and bool(trial.message)
    finally:
        comm.end()
        subprocess.run(["umount", str(comm.out)], check=True)


def broken_checkpoint(bench: Bench, trial: Trial, comm: Communicator, chance: random.Random) -> None:
    """All are killed and the newest checkpoint is cut in half; it is removed, as the sentence then asks."""
    bench.start_all(comm)
    until(lambda: len(list((comm.out / "checkpoints").glob("step-????????"))) >= 2 and comm.step() > 12, comm)
    trial.at_step = comm.step()
    comm.pids()
    comm.end()
    newest = sorted((comm.out / "checkpoints").glob("step-????????"))[-1]
    file = newest / "training.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    bench.start_all(comm)
    if not comm.wait():
        trial.ended = "HUNG"
        return
    trial.message = said_of(rf"{newest.name}.*remove", comm.said())
    shutil.rmtree(newest)
    judge(bench, comm, trial)
    trial.passed = trial.passed and bool(trial.message)


def odd_worker(bench: Bench, trial: Trial, comm: Communicator, chance: random.Random) -> None:
    """Worker 1, or a newcomer, has something else than the rest: it is named, and nothing is learned with it."""
    steps = 100_000 if comm.live else STEPS
    words = bench.words(comm, steps=steps)
    if trial.fault == "other settings":
        words = bench.words(comm, steps=steps, seed=7)
    elif trial.fault == "other data":
        words = bench.words(comm, steps=steps, data=bench.other_data)
    else:
        copy = comm.folder / "other"
        shutil.copytree(Path(motley.__file__).parent, copy / "motley", ignore=shutil.ignore_patterns("*.pyc"))
        (copy / "motley" / "another.py").write_text("")
        words = ["env", f"PYTHONPATH={copy}", *words]
    pattern = rf"has {ODD[trial.fault]} "
    if not comm.live:
        bench.start(comm, odd=words)
        if not comm.wait():
            trial.ended = "HUNG"
            return
        refused, trial.message = not records(comm.out), said_of(pattern, comm.said())
        judge(bench, comm, trial)
        trial.passed = trial.passed and refused and bool(trial.message)
        return
    bench.start_all(comm, steps=steps)
    until(lambda: comm.step() >= 2, comm)
    trial.at_step = comm.step()
    with (comm.folder / "said-99").open("w") as said:
        sent = subprocess.Popen(words, stdout=said, stderr=said, text=True)
        deadline = time.monotonic() + LIMIT_SECONDS
        while sent.poll() is None and len(comm.members()[1]) <= comm.workers and time.monotonic() < deadline:
            time.sleep(0.05)
        trial.ended = "sent away" if sent.poll() is not None else "LET IN"
        sent.kill()
        status = sent.wait()
    trial.message = said_of(pattern, (comm.folder / "said-99").read_text())
    before = comm.step()
    works = until(lambda: comm.step() > max(before, ALIKE), comm)
    trial.passed = status == 2 and bool(trial.message) and works and compare(bench, comm, trial, ALIKE)


OTHER_TRIALS = {"full disk": full_disk, "broken newest checkpoint": broken_checkpoint} | dict.fromkeys(ODD, odd_worker)


def run(bench: Bench, trial: Trial, seed: int) -> Trial:
    """Make one trial, anew where the crew was done before it was struck."""
    for attempt in range(5):
        chance = random.Random(f"{seed} {trial.number} {attempt}")
        comm = Communicator(Path(tempfile.mkdtemp(dir=bench.folder, prefix="crew-")), trial.layout, trial.workers)
        began = time.monotonic()
        try:
            (survive if trial.fault in SURVIVED else OTHER_TRIALS[trial.fault])(bench, trial, comm, chance)
        except Missed:
            continue
        finally:
            comm.end()
            if trial.passed:
                shutil.rmtree(comm.folder, ignore_errors=True)  # of one that failed all is kept
            elif (comm.folder / "said-00").is_file():
                trial.message = trial.message or comm.said()[-300:].replace("\n", " ")
        trial.seconds = trial.seconds or round(time.monotonic() - began, 1)
        return trial
    trial.ended = "was always done before it could be struck"
    return trial


def planned(kills: int, others: int, seed: int) -> list[Trial]:
    """All trials in a random order; each kind of fault comes equally often, in layouts drawn at random."""
    chance = random.Random(seed)
    faults = [list(KILLS)[number % len(KILLS)] for number in range(kills)]
    faults += [OTHERS[number % len(OTHERS)] for number in range(others)]
    chance.shuffle(faults)
    trials = []
    for number, fault in enumerate(faults):
        layout = "live" if chance.random() < 0.3 else chance.choice(LAYOUTS)
        trials.append(Trial(number, fault, layout, chance.choice([2, 3])))
    return trials


# ------------------------------------------------------------------------------------------------ the table


def table(trials: Sequence[Trial]) -> str:
    """By fault and way of starting, by layout, and an example of what was said."""
    lines = ["| Fault | Way | Trials | Passed | How it ended | Longest, s | Largest difference of a loss |"]
    lines.append("|---|---|--:|--:|---|--:|--:|")
    for fault in (*SURVIVED, *OTHER_TRIALS):
        for way in ("torchrun", "live"):
            own = [trial for trial in trials if trial.fault == fault and (trial.layout == "live") == (way == "live")]
            if own:
                ends = Counter(trial.ended for trial in own).most_common()
                ended = ends[0][0] if len(ends) == 1 else ", ".join(f"{count} {end}" for end, count in ends)
                lines.append(f"| {fault} | {way} | {_counts(own)} | {ended} | {_longest(own)} | {_worst(own)} |")
    lines += [
        "",
        "| Layout | Trials | Passed | Kills among them | Largest difference of a loss |",
        "|---|--:|--:|--:|--:|",
    ]
    for layout in (*LAYOUTS, "live"):
        own = [trial for trial in trials if trial.layout == layout]
        if own:
            kills = sum(trial.fault in KILLS for trial in own)
            lines.append(f"| {layout} | {_counts(own)} | {kills} | {_worst(own)} |")
    lines += ["", "| Fault | What was said, for example |", "|---|---|"]
    for fault in (*SURVIVED, *OTHER_TRIALS):
        for live in (False, True):
            said = [t.message for t in trials if t.fault == fault and t.passed and (t.layout == "live") == live]
            if said:
                words = re.sub(r": \[/.*", " …", said[0])  # what PyTorch adds
                lines.append(f"| {fault}, {'live' if live else 'torchrun'} | {words.replace('|', ' ')} |")
    return "\n".join(lines)


def _counts(trials: Sequence[Trial]) -> str:
    return f"{len(trials)} | {sum(trial.passed for trial in trials)}"


def _longest(trials: Sequence[Trial]) -> str:
    return f"{max(trial.seconds for trial in trials):.0f}"


def _worst(trials: Sequence[Trial]) -> str:
    known = [trial.largest_difference for trial in trials if trial.largest_difference is not None]
    return f"{max(known):.1e}" if known else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where trials are kept; none: nothing is kept")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="trials made at the same time")
    parser.add_argument("--without", action="append", default=[], metavar="FAULT", help="left out this time")
    parser.add_argument("--report", action="store_true", help="only tell what is done so far")
    parser.add_argument("--quick", action="store_true", help="two trials, or one, within three minutes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    trials = planned(arguments.kills, arguments.others, arguments.seed)
    if arguments.quick:
        trials = [trial for trial in trials if trial.fault in KILLS][:QUICK_TRIALS]
    done: dict[int, Trial] = {}
    for trial in trials:
        file = folder / f"trial-{trial.number:04d}.json"
        if file.is_file():
            done[trial.number] = Trial(**json.loads(file.read_text()))
            if (found := done[trial.number]) and (found.fault, found.layout) != (trial.fault, trial.layout):
                sys.exit(f"{folder} holds trials of another seed or number; choose another --folder")
    if not arguments.report:
        bench = Bench(folder)

        def make(trial: Trial) -> None:
            run(bench, trial, arguments.seed)
            (folder / f"trial-{trial.number:04d}.json").write_text(json.dumps(asdict(trial)))
            done[trial.number] = trial
            mark = "passed" if trial.passed else "FAILED"
            what = f"{trial.layout}, {trial.workers} workers: {trial.fault} at step {trial.at_step}: {trial.ended}"
            where = f"{len(done)} of {len(trials)}, number {trial.number}"
            numbers = f"{trial.seconds} s, difference {trial.largest_difference}"
            print(f"{where} {mark} {what}, {numbers}: {trial.message}", file=sys.stderr, flush=True)

        todo = [trial for trial in trials if trial.number not in done and trial.fault not in arguments.without]
        budget = Budget(QUICK_SECONDS if arguments.quick else None)
        with kept(budget, "faults"), ThreadPoolExecutor(1 if arguments.quick else arguments.at_once) as pool:
            if arguments.quick:
                for trial in budget.each(todo):
                    make(trial)
            else:
                list(pool.map(make, todo))
    if arguments.folder is None:
        shutil.rmtree(folder)
    ordered = [done[number] for number in sorted(done)]
    print(json.dumps([asdict(trial) for trial in ordered]) if arguments.json else table(ordered))


if __name__ == "__main__":
    main()
