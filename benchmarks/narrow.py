"""What narrow numbers do to the loss: the same model, data and seed trained with and without, held-out loss at the end.

    python benchmarks/narrow.py fp8|moments [--text FILE ...] [--steps 300] [--seeds 3] [--quick] [--json]

fp8       products in fp8 beside bf16. CPUs emulate fp8, so the seconds say what that costs and nothing about chips
          that have it.
moments   the optimizers' state in bf16 beside fp32.

Both sides are validated in bf16 on the same rows.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from motley.data.pack import DataConfig, prepare
from motley.train.config import PretrainConfig
from motley.train.metrics import read_metrics
from motley.train.pretrain import pretrain

COMMON: dict[str, Any] = {
    "model": "nano", "batch_rows": 8, "seq_len": 128, "micro_batch": 8, "device": "cpu", "checkpoint_every": 10**6,
    "valid_rows": 512,
}  # fmt: skip
SIDES: dict[str, dict[str, dict[str, str]]] = {
    "fp8": {"bf16": {"precision": "bf16"}, "fp8": {"precision": "fp8"}},
    "moments": {
        "fp32 moments": {"precision": "bf16", "moments": "fp32"},
        "bf16 moments": {"precision": "bf16", "moments": "bf16"},
    },
}
AIM = 0.0025  # of the loss: what the V3 report (3.3) found its runs in fp8 to stay within


def train(out: Path, data: Path, side: dict[str, str], steps: int, seed: int) -> tuple[float, float]:
    """(held-out loss in nats per token after the last step, seconds) of one run."""
    chosen = COMMON | {"steps": steps, "valid_every": steps, "seed": seed}
    pretrain(PretrainConfig(out=out, data=(str(data),), **chosen, **side))  # pyright: ignore[reportArgumentType]
    last = [record for record in read_metrics(out) if record["kind"] == "valid"][-1]
    return last["loss"], last["seconds"]


def compared(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses and seconds of both sides by seed, and the gap: how much larger the loss of the second is, relatively."""
    data = prepare(DataConfig(data=tuple(arguments.text), vocab_size=4096), folder / "data").folder
    steps, seeds = (10, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    sides = SIDES[arguments.what]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for seed in range(seeds):
        for name, side in sides.items():
            runs[name].append(train(folder / f"{name}-{seed}", data, side, steps, seed))
    losses = {name: [loss for loss, _ in seen] for name, seen in runs.items()}
    gaps = [narrow / base - 1 for base, narrow in zip(*losses.values(), strict=True)]
    return {
        "settings": COMMON | {"steps": steps}, "losses": losses, "gaps": gaps, "mean_gap": statistics.mean(gaps),
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
    with tempfile.TemporaryDirectory() as place:
        found = compared(arguments, Path(place))
    print(json.dumps(found) if arguments.json else told(found))


if __name__ == "__main__":
    main()
