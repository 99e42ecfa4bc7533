"""What narrow numbers do to the loss: the same model, data and seed trained with and without, held-out loss at the end.

    python benchmarks/narrow.py fp8|moments [--text FILE ...] [--steps 300] [--seeds 3] [--quick] [--json]

fp8       products in fp8 beside bf16. CPUs emulate fp8, so the seconds say what that costs and nothing about chips
          that have it.
moments   the optimizers' state in bf16 beside fp32.

Everything else is in the format that `motley pretrain` would choose here; beside fp8 it is bf16 in any case, because
that is what stands between fp8 products. Where the machine only emulates bf16 (CPUs without such products) that takes
hours, and is said before. Both sides are validated in the same format on the same rows.

--quick ends within 50 seconds: a tiny model, few short rows, and as many steps as there is time for.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from budget import QUICK_SECONDS, Budget, kept
from machine import best_format

from motley.data.pack import DataConfig, prepare
from motley.progress import note
from motley.train.config import PretrainConfig
from motley.train.metrics import read_metrics
from motley.train.pretrain import pretrain

COMMON: dict[str, Any] = {
    "model": "nano", "batch_rows": 8, "seq_len": 128, "micro_batch": 8, "device": "cpu", "checkpoint_every": 10**6,
    "valid_rows": 512,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "model": str(Path(__file__).parents[1] / "examples" / "models" / "tiny.json"), "batch_rows": 2, "micro_batch": 2,
    "seq_len": 32, "valid_rows": 8,
}  # fmt: skip
QUICK_VOCAB_SIZE, QUICK_TEXT_BYTES, QUICK_STEPS = 512, 200_000, (2, 10)
SIDES: dict[str, dict[str, dict[str, str]]] = {
    "fp8": {"bf16": {"precision": "bf16"}, "fp8": {"precision": "fp8"}},
    "moments": {"fp32 moments": {"moments": "fp32"}, "bf16 moments": {"moments": "bf16"}},
}
AIM = 0.0025  # of the loss: what the V3 report (3.3) found its runs in fp8 to stay within


def train(out: Path, data: Path, settings: dict[str, Any], steps: int, seed: int) -> tuple[float, float]:
    """(held-out loss in nats per token after the last step, seconds) of one run."""
    chosen = settings | {"steps": steps, "valid_every": steps, "seed": seed}
    pretrain(PretrainConfig(out=out, data=(str(data),), **chosen))  # pyright: ignore[reportArgumentType]
    last = [record for record in read_metrics(out) if record["kind"] == "valid"][-1]
    return last["loss"], last["seconds"]


def compared(arguments: argparse.Namespace, folder: Path, budget: Budget) -> dict[str, Any]:
    """Losses and seconds of both sides by seed, and the gap: how much larger the loss of the second is, relatively."""
    size, most = (QUICK_VOCAB_SIZE, QUICK_TEXT_BYTES) if arguments.quick else (4096, None)
    data = prepare(DataConfig(data=tuple(arguments.text), vocab_size=size, max_bytes=most), folder / "data").folder
    precision = best_format()
    if arguments.what == "fp8" and precision == "fp32" and not arguments.quick:
        note("this machine only emulates bf16, so both sides take many times what they would in fp32: hours")
    common = COMMON | (QUICK if arguments.quick else {}) | {"precision": precision}
    steps, seeds = (arguments.steps, arguments.seeds)
    sides = SIDES[arguments.what]
    if arguments.quick:
        few, many = QUICK_STEPS
        began = time.perf_counter()
        for name, side in sides.items():  # how long the shortest runs take says whether there is time for longer ones
            train(folder / f"{name}-first", data, common | side, few, 0)
        steps, seeds = (many if budget.allows(many / few * (time.perf_counter() - began)) else few), 1
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for seed in range(seeds):
        for name, side in sides.items():
            runs[name].append(train(folder / f"{name}-{seed}", data, common | side, steps, seed))
    losses = {name: [loss for loss, _ in seen] for name, seen in runs.items()}
    gaps = [narrow / base - 1 for base, narrow in zip(*losses.values(), strict=True)]
    return {
        "settings": common | {"steps": steps}, "losses": losses, "gaps": gaps, "mean_gap": statistics.mean(gaps),
        "seconds": {name: statistics.median(seconds for _, seconds in seen) for name, seen in runs.items()},
    }  # fmt: skip


def told(found: dict[str, Any]) -> str:
    lines = [" ".join(f"{name}={value}" for name, value in found["settings"].items())]
    for name, losses in found["losses"].items():
        lines.append(f"  {name:12} {' '.join(f'{loss:.4f}' for loss in losses)}  {found['seconds'][name]:.0f} s a run")
    gaps = " ".join(f"{gap:+.2%}" for gap in found["gaps"])
    verdict = "within" if abs(found["mean_gap"]) <= AIM else "beyond"
    lines.append(f"  gap          {gaps}  mean {found['mean_gap']:+.2%}, {verdict} {AIM:.2%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SIDES))
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    with kept(budget, "narrow"), tempfile.TemporaryDirectory() as place:
        found = compared(arguments, Path(place), budget)
    print(json.dumps(found) if arguments.json else told(found))


if __name__ == "__main__":
    main()
