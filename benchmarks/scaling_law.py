"""Laws of the loss: small dense and sparse models trained for several lengths, and what their losses fall like.

    python benchmarks/scaling_law.py --text FILE ... [--folder runs/scaling] [--write FILE] [--quick] [--json]

Four widths, four lengths, dense and sparse: 32 runs of `motley pretrain` on the same rows, each with a whole schedule
of its own. Sparse models have eight experts, of which a token meets two and a shared one; dense ones are as wide as
that. The law (motley.plan.scaling_law) is fitted to all runs of a kind; how well it foretells is judged by one that has
not seen the quarter with the most compute. --write keeps the laws in a file, which `motley plan --losses` takes.

Every finished run stays in --folder: broken off, the same command goes on. All compute in the format that `motley
pretrain` would choose here. --quick ends within 50 seconds: the least that a law takes (three widths and lengths), of
few and short rows; where there is no time for a kind, it is left out.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from budget import QUICK_SECONDS, Budget, kept
from machine import best_format
from pictures import draw_laws
from thrift import dense, ours

from motley.data.pack import DataConfig, prepare
from motley.files import write_json, write_text
from motley.fleet.device import Format
from motley.model import ModelConfig
from motley.plan.network.flops import multiplying_parameters
from motley.plan.scaling_law import DENSE, SPARSE, FittedRun, LossLaw, fitted
from motley.progress import note
from motley.train.config import PretrainConfig
from motley.train.metrics import read_metrics
from motley.train.pretrain import pretrain

VOCAB_SIZE, SEQ_LEN, BATCH_ROWS, VALID_ROWS = 4096, 256, 16, 256
SHAPES = {
    64: ours(64, 3, 2, 32, 176, 48),
    96: ours(96, 4, 2, 32, 256, 64),
    128: ours(128, 4, 3, 48, 352, 96),
    192: ours(192, 4, 4, 64, 512, 128),
}
TOKENS = (250_000, 500_000, 1_000_000, 2_000_000)
QUICK_WIDTHS, QUICK_TOKENS, QUICK_ROWS, QUICK_TEXT_BYTES = (64, 96, 128), (1_024, 2_048, 4_096), 2, 300_000
LEARNING_RATE, EMBEDDING_RATE = 4e-3, 10.0
RECIPE = (
    "{count} runs of motley, {least:.1f} to {most:.1f} million parameters, up to {tokens:.2g} million tokens of {text}"
)


def shape_of(width: int, kind: str) -> ModelConfig:
    sparse = replace(SHAPES[width], num_nextn_predict_layers=0)
    return sparse if kind == SPARSE else dense(sparse)


def trained(folder: Path, data: Path, shape: ModelConfig, steps: int, rows: int, precision: Format) -> float:
    """Held-out loss at the end of a run of `rows` a step, in nats per token."""
    config = folder.with_suffix(".json")
    write_json(config, shape.to_hf())
    pretrain(
        PretrainConfig(
            out=folder,
            data=(str(data),),
            model=str(config),
            steps=steps,
            batch_rows=rows,
            seq_len=SEQ_LEN,
            micro_batch=rows,
            learning_rate=LEARNING_RATE,
            embedding_rate=EMBEDDING_RATE,
            mtp_weight=0.0,
            warmup_steps=max(4, steps // 20),
            valid_every=10**6,
            valid_rows=VALID_ROWS * rows // BATCH_ROWS,
            checkpoint_every=10**6,
            keep_last=1,
            precision=precision,
            device="cpu",
        )
    )
    return [one for one in read_metrics(folder) if one["kind"] == "valid"][-1]["loss"]


def judged(runs: list[FittedRun]) -> tuple[float, int]:
    """(mean relative error of a law on the quarter of runs with the most compute, unseen by it; their number)"""
    ordered = sorted(runs, key=lambda run: run.flops)
    kept = len(runs) - len(runs) // 4
    law = fitted(ordered[:kept], "")
    errors = [abs(law.loss(run.parameters, run.tokens) / run.loss - 1) for run in ordered[kept:]]
    return sum(errors) / len(errors), len(errors)


def measured(
    folder: Path, data: Path, widths: Sequence[int], lengths: Sequence[int], text: str, rows: int, budget: Budget
) -> dict[str, Any]:
    """By kind: its runs, its law, and how well that foretells; the kinds for which there is time, dense ones first."""
    found: dict[str, Any] = {}
    precision = best_format()
    for kind in budget.each((DENSE, SPARSE)):
        runs = []
        for width in widths:
            shape = shape_of(width, kind)
            for tokens in lengths:
                steps = tokens // (rows * SEQ_LEN)
                loss = trained(folder / f"{kind}-{width}-{tokens}", data, shape, steps, rows, precision)
                runs.append(FittedRun(multiplying_parameters(shape), steps * rows * SEQ_LEN, loss))
                note(f"{kind:6} {width:4} wide, {runs[-1].parameters:,} parameters, {tokens:,} tokens: {loss:.4f}")
        sizes = [run.parameters / 1e6 for run in runs]
        longest = max(run.tokens for run in runs) / 1e6
        about = RECIPE.format(count=len(runs), least=min(sizes), most=max(sizes), tokens=longest, text=text)
        law = fitted(runs, about)
        error, count = judged(runs)
        found[kind] = {"runs": [asdict(run) for run in runs], "law": asdict(law), "ahead": error, "ahead_runs": count}
    return found


def told(found: dict[str, Any]) -> str:
    lines = []
    for kind, one in found.items():
        law = LossLaw(**one["law"])
        lines += [
            f"{kind}: loss = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}, "
            f"{law.runs} runs, off by {law.error:.2%}; fitted without the {one['ahead_runs']} largest, off by "
            f"{one['ahead']:.2%} there",
            f"{'parameters':>12} "
            + " ".join(f"{tokens:>11,}" for tokens in sorted({r["tokens"] for r in one["runs"]})),
        ]
        for parameters in sorted({run["parameters"] for run in one["runs"]}):
            own = sorted((run["tokens"], run["loss"]) for run in one["runs"] if run["parameters"] == parameters)
            lines.append(f"{parameters:12,} " + " ".join(f"{loss:11.4f}" for _, loss in own))
        for flops in (1e13, 1e14, 1e15):
            parameters, tokens = law.best_split(flops)
            loss = law.loss(parameters, tokens)
            lines.append(f"  {flops:.0e} FLOPs: {loss:.3f} at {parameters:,.0f} parameters, {tokens:,.0f} tokens")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--write", type=Path, help="keep the laws in this file")
    parser.add_argument("--quick", action="store_true", help="three widths and lengths, a few steps each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    most = QUICK_TEXT_BYTES if arguments.quick else None
    text = DataConfig(data=tuple(arguments.text), vocab_size=VOCAB_SIZE, max_bytes=most)
    folder = arguments.folder / ("quick" if arguments.quick else "whole")
    widths, lengths, rows = tuple(SHAPES), TOKENS, BATCH_ROWS
    if arguments.quick:
        widths, lengths, rows = QUICK_WIDTHS, QUICK_TOKENS, QUICK_ROWS
    name = ", ".join(Path(file).name for file in arguments.text) or "Python's standard library"
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    with kept(budget, "scaling_law"):
        data = prepare(text, folder / "data").folder
        found = measured(folder, data, widths, lengths, name, rows, budget)
        write_json(folder / "result.json", found)
        draw_laws(found, folder / "laws.svg")
    if arguments.write:
        laws = {"laws": {kind: one["law"] for kind, one in found.items()}}
        said = f"# Written by benchmarks/scaling_law.py --write on {date.today().isoformat()}; "
        said += "read by motley.plan.scaling_law.\n"
        write_text(arguments.write, said + yaml.safe_dump(laws, sort_keys=False))
    print(json.dumps(found) if arguments.json else told(found))


if __name__ == "__main__":
    main()
