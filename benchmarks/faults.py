"""Faults: what a crew does when its workers are killed, paused, given a full disk, other code or other data.

    python benchmarks/faults.py [--trials 100] [--seed 0] [--quick] [--json]

Every trial starts a small crew (a model with experts and an MTP module, 40 steps, a checkpoint every 5) under torchrun
or live, does one thing to it at a random moment, lets the way of starting bring it to its end, and compares with a run
that nobody disturbed: every step's loss and tokens, once each. A trial passes when it ended within the limit, gave the
losses (to 1e-5) or, where the fault cannot be survived, a sentence, and left only whole checkpoints behind.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from motley.data.pack import DataConfig, prepare
from motley.train.crew import free_port

STEPS, LIMIT_SECONDS, PATIENCE = 40, 300.0, 10.0
SHAPE = Path(__file__).parents[1] / "examples" / "models" / "tiny.json"


@dataclass
class Crew:
    """A running job: what was started, and the processes of its workers."""

    folder: Path
    live: bool
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def workers(self) -> list[int]:
        """Process ids, worker 0 first: torchrun starts them in order, live ones sort by age."""
        if self.live:
            return [process.pid for process in self.started if process.poll() is None]
        found = subprocess.run(["pgrep", "-P", str(self.started[-1].pid)], capture_output=True, text=True).stdout
        return sorted(map(int, found.split()))

    def step(self) -> int:
        """Of the last record on disk."""
        file = self.out / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def said(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("said-*")))

    def running(self) -> bool:
        return any(process.poll() is None for process in self.started)


@dataclass
class Trial:
    """What was done and what came of it."""

    fault: str
    way: str
    at_step: int = 0
    seconds: float = 0.0
    ended: str = ""
    message: str = ""
    largest_difference: float | None = None
    passed: bool = False


class Bench:
    """Starts crews on one small data set; `alone` holds what an undisturbed process learns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = random.Random(0).choices(["one", "two", "three", "four", "five", "six", "seven"], k=8000)
        text = folder / "text.jsonl"
        lines = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        self.data = prepare(DataConfig(data=(str(text),), vocab_size=300), folder / "prepared").folder
        alone = Crew(folder / "alone", live=False)
        alone.folder.mkdir()
        subprocess.run(self.words(alone), check=True, capture_output=True)
        self.alone = records(alone.out)

    def words(self, crew: Crew, **settings: Any) -> list[str]:
        chosen = {
            "out": crew.out, "data": self.data, "model": SHAPE, "steps": STEPS, "batch_rows": 6,
            "micro_batch": 2, "seq_len": 64, "valid_every": 20, "checkpoint_every": 5, "precision": "fp32",
            "device": "cpu", "patience": PATIENCE,
        } | settings  # fmt: skip
        options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
        return [sys.executable, "-m", "motley", "pretrain", *options, *(["--live"] if crew.live else [])]

    def start(self, crew: Crew, workers: int = 1, restarts: int = 0, **settings: Any) -> None:
        """torchrun with so many workers, or one more live worker."""
        words = self.words(crew, **settings)
        if not crew.live:
            launcher = [f"--nproc-per-node={workers}", f"--max-restarts={restarts}", f"--master-port={free_port()}"]
            words = [sys.executable, "-m", "torch.distributed.run", *launcher, *words[1:]]
        with (crew.folder / f"said-{len(crew.started):02d}").open("w") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(words, stdout=said, stderr=said, text=True, env=environment)
        crew.started.append(process)


def records(out: Path) -> list[tuple[int, int, float]]:
    """(step, tokens, loss) of every training step on record."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["loss"]) for line in lines if line["kind"] == "train"]


def until(condition: Callable[[], Any], crew: Crew, limit: float = LIMIT_SECONDS) -> bool:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        if not crew.running():
            return False
        time.sleep(0.005)
    return False


# ------------------------------------------------------------------------------------------------ faults


def kill(crew: Crew, chance: random.Random, which: str) -> None:
    workers = crew.workers()
    os.kill(workers[0] if which == "worker 0" else chance.choice(workers[1:]), signal.SIGKILL)


def kill_in_checkpoint(crew: Crew, chance: random.Random) -> None:
    """Worker 0, while it writes."""
    writing = crew.out / "checkpoints"
    until(lambda: list(writing.glob("*.writing-*")), crew)
    os.kill(crew.workers()[0], signal.SIGKILL)


def kill_while_rebalancing(crew: Crew, chance: random.Random) -> None:
    """One is paused for a second, its rows go to others, and one of those dies two steps later."""
    first, second = chance.sample(crew.workers(), 2)
    os.kill(first, signal.SIGSTOP)
    time.sleep(1)
    os.kill(first, signal.SIGCONT)
    now = crew.step()
    until(lambda: crew.step() >= now + 2, crew)
    os.kill(second, signal.SIGKILL)


def pause(crew: Crew, chance: random.Random) -> None:
    victim = chance.choice(crew.workers())
    os.kill(victim, signal.SIGSTOP)
    time.sleep(PATIENCE / 3)
    os.kill(victim, signal.SIGCONT)


def stop_for_ever(crew: Crew, chance: random.Random) -> None:
    """The paused one is killed once the others have said that it is silent."""
    victim = chance.choice(crew.workers())
    os.kill(victim, signal.SIGSTOP)
    until(lambda: " lost " in crew.said(), crew)
    if crew.live:
        now = crew.step()
        until(lambda: crew.step() > now or not crew.running(), crew)
    os.kill(victim, signal.SIGKILL)


def kill_coordinator(crew: Crew, chance: random.Random) -> None:
    """torchrun itself, whose workers are left to themselves; of a live crew, worker 0, where the others met."""
    workers = crew.workers()
    if crew.live:
        os.kill(workers[0], signal.SIGKILL)
        return
    os.kill(crew.started[-1].pid, signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline and any(map(lives, workers)):
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


FAULTS: dict[str, Callable[[Crew, random.Random], None]] = {
    "kill a worker": lambda crew, chance: kill(crew, chance, "any"),
    "kill worker 0": lambda crew, chance: kill(crew, chance, "worker 0"),
    "kill worker 0 in a checkpoint": kill_in_checkpoint,
    "kill while rebalancing": kill_while_rebalancing,
    "kill the coordinator": kill_coordinator,
    "pause, shorter than patience": pause,
    "stop for ever": stop_for_ever,
}
REFUSED = ("other code", "other settings", "full disk", "broken newest checkpoint")


def survive(bench: Bench, fault: str, live: bool, chance: random.Random) -> Trial:
    """A fault that the way of starting is to survive."""
    trial = Trial(fault, "live" if live else "torchrun")
    crew = Crew(Path(tempfile.mkdtemp(dir=bench.folder)), live)
    workers = chance.choice([2, 3])
    for _ in range(workers if live else 1):
        bench.start(crew, workers, restarts=2)
    together = "workers go on" if live else '"train"'
    metrics = crew.out / "metrics.jsonl"
    until(lambda: metrics.is_file() and together in metrics.read_text(), crew)
    if live:
        until(lambda: _members(crew) == workers or crew.step() > STEPS // 2, crew)
    moment = crew.step() + chance.randint(1, 8)
    until(lambda: crew.step() >= moment, crew)
    time.sleep(chance.random() * 0.05)
    trial.at_step = crew.step()
    struck = time.monotonic()
    FAULTS[fault](crew, chance)
    if live and chance.random() < 0.5:
        bench.start(crew)  # a newcomer
    judge(bench, crew, trial, struck)
    trial.seconds = round(time.monotonic() - struck, 1)
    shutil.rmtree(crew.folder)
    return trial


def _members(crew: Crew) -> int:
    newest = sorted((crew.out / "crew").glob("crew-*.json"))
    try:
        return len(json.loads(newest[-1].read_text())["members"]) if newest else 0
    except FileNotFoundError:  # the next one was just written
        return 0


def judge(bench: Bench, crew: Crew, trial: Trial, struck: float) -> None:
    """Wait for the end, start the job once more if it was given up with a sentence, and compare."""
    until(lambda: not crew.running(), crew)
    if crew.running():
        trial.ended, trial.message = "HUNG", crew.said()[-300:]
        end(crew)
        return
    trial.message = sentence(crew.said())
    trial.ended = "by itself"
    if not (crew.out / "result.json").is_file():
        trial.ended = "after the command was given again"
        bench.start(crew, 2)
        until(lambda: not crew.running(), crew)
        end(crew)
    found = records(crew.out)
    same = [(step, tokens) for step, tokens, _ in found] == [(step, tokens) for step, tokens, _ in bench.alone]
    if same:
        pairs = zip(found, bench.alone, strict=True)
        trial.largest_difference = max(abs(a[2] - b[2]) / abs(b[2]) for a, b in pairs)
    whole = not list(crew.out.rglob("*.writing-*"))
    trial.passed = same and whole and (trial.largest_difference or 0) < 1e-5


def refuse(bench: Bench, fault: str, live: bool, chance: random.Random) -> Trial:
    """A fault that must be refused with a sentence, and whose mending lets the run go on."""
    trial = Trial(fault, "live" if live else "torchrun")
    crew = Crew(Path(tempfile.mkdtemp(dir=bench.folder)), live)
    struck = time.monotonic()
    environment = dict(os.environ)
    if fault == "full disk":
        crew.out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(crew.out)], check=True)
        bench.start(crew, 2)
        until(lambda: not crew.running(), crew)
        trial.message = sentence(crew.said())
        trial.passed = not crew.running() and "free some space" in crew.said()
        end(crew)
        subprocess.run(["umount", str(crew.out)], check=True)
        trial.ended = "with a sentence" if trial.passed else "HUNG"
    elif fault == "broken newest checkpoint":
        bench.start(crew, 2, steps=STEPS)
        until(lambda: len(list((crew.out / "checkpoints").glob("step-????????"))) >= 1 and crew.step() > 12, crew)
        end(crew)
        newest = sorted((crew.out / "checkpoints").glob("step-????????"))[-1]
        file = newest / "training.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        bench.start(crew, 2)
        until(lambda: not crew.running(), crew)
        trial.message = sentence(crew.said())
        shutil.rmtree(newest)  # as the sentence says
        refused = str(newest.name) in trial.message
        bench.start(crew, 2)
        judge(bench, crew, trial, struck)
        trial.passed = trial.passed and refused
    else:
        copy = crew.folder / "other"
        if fault == "other code":
            import motley

            shutil.copytree(Path(motley.__file__).parent, copy / "motley", ignore=shutil.ignore_patterns("*.pyc"))
            (copy / "motley" / "another.py").write_text("")
            environment["PYTHONPATH"] = str(copy)
        crew.live = True  # under torchrun all workers come from one folder
        trial.way = "live"
        bench.start(crew, steps=100_000)
        until(lambda: crew.step() >= 2, crew)
        words = bench.words(crew, steps=100_000, **({} if fault == "other code" else {"seed": 7}))
        sent = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        trial.message, trial.ended = sentence(sent.stderr), "sent away"
        named = "source code" if fault == "other code" else "seed"
        before = crew.step()
        works = until(lambda: crew.step() > before, crew)
        trial.passed = sent.returncode == 2 and named in sent.stderr and works
        end(crew)
    trial.seconds = round(time.monotonic() - struck, 1)
    shutil.rmtree(crew.folder, ignore_errors=True)
    return trial


def end(crew: Crew) -> None:
    """Kill what this trial started and what that started."""
    for process in crew.started:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in [*map(int, found), process.pid]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def sentence(said: str) -> str:
    """What motley said of the fault."""
    lines = [line for line in said.splitlines() if re.search(r"motley \w+: | lost |go(es|ing)? on from", line)]
    return lines[0][:240] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two trials")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for number in range(2 if arguments.quick else arguments.trials):
            fault = chance.choice([*FAULTS, *FAULTS, *REFUSED])
            live = chance.random() < 0.6
            trial = (survive if fault in FAULTS else refuse)(bench, fault, live, chance)
            trials.append(trial)
            mark = "passed" if trial.passed else "FAILED"
            what = f"{trial.way}: {trial.fault} at step {trial.at_step}: {trial.ended}, {trial.seconds} s"
            print(f"{number} {mark} {what}, difference {trial.largest_difference}: {trial.message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([asdict(trial) for trial in trials]))
        return
    print(
        "| Fault | Way | Trials | Passed | By itself | Longest s | Largest difference |\n|---|---|--:|--:|--:|--:|--:|"
    )
    for fault, way in sorted({(trial.fault, trial.way) for trial in trials}):
        own = [trial for trial in trials if (trial.fault, trial.way) == (fault, way)]
        passed, alone = sum(t.passed for t in own), sum(t.ended == "by itself" for t in own)
        worst = max((t.largest_difference or 0.0 for t in own), default=0.0)
        longest = max(t.seconds for t in own)
        print(f"| {fault} | {way} | {len(own)} | {passed} | {alone} | {longest:.0f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
