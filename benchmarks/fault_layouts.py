"""Crews to be struck: small jobs in every layout, their processes, and what an undisturbed run of each gives."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import psutil

from motley.data.pack import DataConfig, prepare
from motley.parallel.communicator import free_port

STEPS, LIMIT_SECONDS, PATIENCE = 40, 300.0, 10.0
SHAPE = Path(__file__).parents[1] / "examples" / "models" / "tiny.json"
LAYOUTS = ("ZeRO 1", "ZeRO 2", "ZeRO 3", "pipeline", "spread experts", "islands")
"""Under torchrun; live workers each hold the whole model."""


@dataclass
class Communicator:
    """A running job: what was started, and the processes of its workers.

    Attributes:
        folder: of the trial.
        layout: one of LAYOUTS, or "live".
        workers: how many begin.
        started: torchrun, or live workers.
        seen: process ids of torchrun's workers, also of those that outlive it.
    """

    folder: Path
    layout: str
    workers: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    @property
    def live(self) -> bool:
        return self.layout == "live"

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def members(self) -> tuple[int, list[str]]:
        """(number, names) of the live crew at work, in the order of ranks."""
        for file in sorted((self.out / "elastic").glob("generation-*.json"), reverse=True):
            try:
                return int(file.stem.removeprefix("generation-")), json.loads(file.read_text())["members"]
            except FileNotFoundError:  # the next one was just written
                continue
        return 0, []

    def pids(self) -> list[int]:
        """Of the living workers, in the order of ranks."""
        if self.live:
            found = [int(name.rsplit("-", 1)[1]) for name in self.members()[1]]
        else:
            try:
                children = psutil.Process(self.started[-1].pid).children()
                ranks = {child.pid: int(child.environ().get("RANK", -1)) for child in children if lives(child.pid)}
            except psutil.NoSuchProcess:
                ranks = {}
            found = sorted(ranks, key=lambda pid: ranks[pid])
            self.seen.update(found)
        return [pid for pid in found if lives(pid)]

    def step(self) -> int:
        """Of the last record on disk."""
        lines = whole_lines(self.out)
        return json.loads(lines[-1])["step"] if lines else 0

    def said(self) -> str:
        """All that its processes printed, and its events."""
        printed = [file.read_text(errors="replace") for file in sorted(self.folder.glob("said-*"))]
        events = [record["message"] for record in map(json.loads, whole_lines(self.out)) if record["kind"] == "event"]
        return "\n".join([*printed, *events])

    def running(self) -> bool:
        return any(process.poll() is None for process in self.started) or any(map(lives, self.seen))

    def wait(self) -> bool:
        """Whether it ended within the limit."""
        until(lambda: not self.running(), self)
        return not self.running()

    def end(self) -> None:
        """Kill what this trial started and what that started."""
        for process in self.started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    self.seen.add(child.pid)
                process.kill()
            process.wait()
        for pid in filter(lives, self.seen):
            os.kill(pid, signal.SIGKILL)


def whole_lines(out: Path) -> list[bytes]:
    """Of the metrics on disk, without one that is just being written."""
    file = out / "metrics.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], Any], comm: Communicator, limit: float = LIMIT_SECONDS) -> bool:
    """Whether it came true before the crew ended or the limit was over."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        if not comm.running():
            return False
        time.sleep(0.01)
    return False


class Bench:
    """Starts crews on one small data set in `folder`; other data of the same kind lie beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.other_data = (self._data(seed) for seed in (0, 1))
        self._references = Lock()

    def _data(self, seed: int) -> Path:
        words = random.Random(seed).choices(["one", "two", "three", "four", "five", "six", "seven"], k=8000)
        text = self.folder / f"text-{seed}.jsonl"
        if not text.is_file():
            lines = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
            text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        return prepare(DataConfig(data=(str(text),), vocab_size=300), self.folder / f"prepared-{seed}").folder

    def words(self, comm: Communicator, **settings: Any) -> list[str]:
        """The command of one worker."""
        chosen = {
            "out": comm.out, "data": self.data, "model": SHAPE, "steps": STEPS, "batch_rows": 6,
            "micro_batch": 2, "seq_len": 64, "valid_every": 10, "checkpoint_every": 5, "precision": "fp32",
            "device": "cpu", "patience": PATIENCE,
        }  # fmt: skip
        if comm.layout.startswith("ZeRO"):
            chosen["zero"] = comm.layout[-1]
        elif comm.layout == "islands":
            chosen |= {"islands": 2, "sync_every": 5, "inner_steps": "planned", "outer_bits": 32}
        elif not comm.live and comm.layout != "alone":
            chosen["plan"] = self.folder / f"{comm.layout}-{comm.workers}.json"
            chosen["plan"].write_text(json.dumps(plan(comm.layout, comm.workers)))
        options = [f"--{name.replace('_', '-')}={value}" for name, value in (chosen | settings).items()]
        return [sys.executable, "-m", "motley", "pretrain", *options, *(["--elastic"] if comm.live else [])]

    def start(self, comm: Communicator, restarts: int = 0, odd: list[str] | None = None, **settings: Any) -> None:
        """torchrun with its workers, of which number 1 may run an odd command; or one more live worker."""
        words = self.words(comm, **settings)
        if not comm.live:
            options = [f"--nproc-per-node={comm.workers}", f"--max-restarts={restarts}"]
            options += [f"--master-port={free_port()}", "--no-python"]
            each = f"exec {shlex.join(words)}"
            if odd:
                each = f'if [ "$RANK" = 1 ]; then exec {shlex.join(odd)}; else {each}; fi'
            words = [sys.executable, "-m", "torch.distributed.run", *options, "bash", "-c", each]
        with (comm.folder / f"said-{len(comm.started):02d}").open("w") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            comm.started.append(subprocess.Popen(words, stdout=said, stderr=said, text=True, env=environment))

    def start_all(self, comm: Communicator, restarts: int = 0, **settings: Any) -> None:
        for _ in range(comm.workers if comm.live else 1):
            self.start(comm, restarts, **settings)

    def expected(self, comm: Communicator) -> list[tuple[str, int, int, float]]:
        """Records of a run that nobody disturbed: of one process, or of the same islands."""
        name = f"islands of {comm.workers}" if comm.layout == "islands" else "alone"
        with self._references:
            calm = Communicator(self.folder / name, comm.layout if comm.layout == "islands" else "alone", comm.workers)
            if not (calm.out / "result.json").is_file():
                calm.folder.mkdir(exist_ok=True)
                if calm.layout == "alone":
                    subprocess.run(self.words(calm), check=True, capture_output=True)
                else:
                    self.start(calm)
                    assert calm.wait(), calm.said()
        return records(calm.out)


def records(out: Path) -> list[tuple[str, int, int, float]]:
    """(kind, step, tokens, loss) of every training step and validation on record."""
    lines = [json.loads(line) for line in whole_lines(out)]
    return [
        (line["kind"], line["step"], line["tokens"], line["loss"])
        for line in lines
        if line["kind"] in ("train", "valid")
    ]


def plan(layout: str, workers: int) -> Mapping[str, Any]:
    """A plan file for two workers that share the model; of three, the last holds all of it."""

    def stage(first: int, last: int, head: bool) -> dict[str, Any]:
        kept = {"weights": 1e6, "gradients": 1e6, "optimizer": 1e6}
        return {
            "pool": "cores", "layers": [first, last], "mtp": head, "head": head,
            "memory_bytes": kept, "memory_limit_bytes": 1e9,
        }  # fmt: skip

    def team(stages: list[dict[str, Any]], copies: int, **more: Any) -> dict[str, Any]:
        usual = {"schedule": "1f1b", "island": 0, "ep": 1, "recompute": "none", "micro_batch": 1, "zero": 1, "cp": 1}
        own = {"pools": ["cores"], "tp": {"cores": 1}, "precision": {"cores": "fp32"}, "sequences": 3}
        return {**usual, **own, "dp": copies, "stages": stages, **more}

    whole = [stage(0, 1, True)]
    if layout == "pipeline":
        first = team([stage(0, 0, False), stage(1, 1, True)], 1, schedule="zero_bubble")
    else:
        first = team(whole, 2, ep=2, experts=[3, 1])
    teams = [first, *([team(whole, 1)] if workers == 3 else [])]
    return {"groups": teams, "pools": [{"pool": "cores"}], "chips": workers, "step_seconds": 0.1, "inner_steps": None}


def listener(pids: list[int], port: int) -> int | None:
    """Which of these processes waits for connections at a port."""
    for pid in filter(lives, pids):
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return pid
    return None


def master_port(comm: Communicator) -> int:
    """Where torchrun's workers meet, or the newest live crew."""
    if comm.live:
        newest = max((comm.out / "elastic").glob("generation-*.json"))
        return json.loads(newest.read_text())["port"]
    found = re.search(r"--master-port=(\d+)", " ".join(map(str, comm.started[-1].args)))  # type: ignore[arg-type]
    assert found is not None
    return int(found[1])
