"""Words of commands of ours for a tiny model, and what their runs leave behind."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from spawned_ranks import MOTLEY, free_port

from motley.train.config import PretrainConfig

STEPS = 30
TINY_FILE = Path(__file__).parents[1] / "examples" / "models" / "tiny.json"
TINY = json.loads(TINY_FILE.read_text())
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def command(out: Path, data: Path, shape: Path, **settings: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "out": out, "data": data, "model": shape, "steps": STEPS, "batch_rows": 4, "micro_batch": 3, "seq_len": 64,
        "valid_every": 10, "checkpoint_every": 7, "keep_last": 2, "precision": "bf16", "warmup_steps": 5,
        "device": "cpu", "seq_len_warmup": "16:0.3,32:0.6", "ngram_weight": 0.5,
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (chosen | settings).items()]
    return [*MOTLEY, "pretrain", *options]


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the machine's memory decides, or what is said of repeated and long steps."""
    clock = {"seconds", "tokens_per_second", "memory_bytes"}
    values = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("computed again", "usually it takes")
    values = [record for record in values if not any(said in record.get("message", "") for said in clocks)]
    return [{k: v for k, v in record.items() if k not in clock} for record in values]


def assert_same_run(out: Path, whole: Path) -> None:
    assert records(out) == records(whole)
    for file in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/training.safetensors"):
        found, expected = load_file(out / file), load_file(whole / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].equal(tensor), f"{file}: {name} differs"


def run_settings(out: Path, data: Path, **others: Any) -> PretrainConfig:
    chosen: dict[str, Any] = {"steps": 12, "batch_rows": 2, "micro_batch": 2, "seq_len": 32, "checkpoint_every": 1,
                              "valid_every": 100, "valid_rows": 4, "warmup_steps": 2, "precision": "fp32",
                              "device": "cpu"}  # fmt: skip
    return PretrainConfig(out=out, data=(str(data),), **chosen | others)


def torchrun(workers: int, arguments: list[str], *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}", *options]
    return [*launcher, f"--master-port={free_port()}", "-m", "motley", *arguments[3:]]


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] in ("train", "valid")]


def until(condition: Any, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


def children(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def steps_done(out: Path) -> int:
    """Of the last record that a run wrote."""
    file = out / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def events(out: Path) -> list[str]:
    """What happened, but not how long it took: that is another matter on a busy machine."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    messages = [record["message"] for record in records if record["kind"] == "event"]
    return [message for message in messages if "usually it takes" not in message]


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
