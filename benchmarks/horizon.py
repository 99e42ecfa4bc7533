"""The race's horizon: when the ordinary network knows more than the counts that ours learns from.

    python benchmarks/horizon.py --text FILE ... [--size small] [--minutes 60] [--learning-rate 0.002] [--rows 4]
                                 [--compiled] [--tokens-per-second RATE] [--folder runs/horizon] [--quick] [--json]

One whole run of the ordinary recipe (thrift.py chooses learning rate, rows and compilation; its choices of 2026-11 are
the defaults), its held-out loss at many marks, beside that of the counts alone on the same rows. Its schedule ends with
the run, so a shorter whole run would have passed the counts somewhat earlier: where the curve passes is an upper limit.

On a busy machine give --tokens-per-second, a rate measured on the quiet one: then tokens tell the time. Such a run can
be broken off; the same command goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from budget import QUICK_SECONDS, Budget, kept
from machine import best_format
from thrift_runs import HELD_OUT_ROWS, counted, trained
from thrift_sides import SEQ_LEN, Llama, Recipe

from motley.data.pack import DataConfig, prepare
from motley.data.stream import TokenStream
from motley.errors import InputError
from motley.files import write_json
from motley.fleet.device import choose_device
from motley.train.allocator import keep_freed_memory

VOCAB_SIZE = 4096
SHAPES = {
    "small": Llama(VOCAB_SIZE, 192, 384, 4, 4),
    "large": Llama(VOCAB_SIZE, 384, 1024, 7, 6),
    "gpu": Llama(VOCAB_SIZE, 768, 2048, 14, 12),
}
"""The ordinary networks: about 3, 15 and 100 million parameters."""
HORIZON_MARKS = tuple(mark / 40 for mark in range(1, 40))
QUICK_RUN_SECONDS, QUICK_TEXT_BYTES, QUICK_ROWS = 10.0, 300_000, 1


def ordinary_recipe(shape: Llama, precision: Literal["bf16", "fp32"], learning_rate: float = 2e-3) -> Recipe:
    """The ordinary recipe, before anything is chosen."""
    return Recipe(
        shape, learning_rate, optimizer="adamw", schedule="cosine", final_share=0.1, mtp_weight=0.0, precision=precision
    )


def passes(curve: list[tuple[float, int, float]], loss: float) -> tuple[float, int, float] | None:
    """The first (seconds, tokens, loss) of a curve from which on it stays below `loss`; None: it does not."""
    first = None
    for point in curve:
        first = None if point[2] >= loss else first or point
    return first


def horizon(
    recipe: Recipe,
    data: Path,
    device: torch.device,
    seconds: float,
    tokens_per_second: float | None = None,
    checkpoint: Path | None = None,
    held_out_rows: int = HELD_OUT_ROWS,
    marks: tuple[float, ...] = HORIZON_MARKS,
) -> dict[str, Any]:
    """What `trained` gives of `recipe`, the counts' own loss ("counts"), and where the one passes the other."""
    rows = TokenStream(data, "train", SEQ_LEN)
    held_out = TokenStream(data, "valid", SEQ_LEN, shuffle=False)
    counts = counted(rows, held_out, recipe.shape.vocab_size, held_out_rows)
    run = trained(recipe, rows, held_out, device, 0, seconds, held_out_rows, marks, tokens_per_second, checkpoint)
    return {
        **run, "recipe": dataclasses.asdict(recipe), "tokens_per_second": tokens_per_second, "counts": counts,
        "passes": passes(run["curve"], counts["loss"]),
    }  # fmt: skip


def told(found: dict[str, Any]) -> str:
    """The result for people."""
    counts, at = found["counts"], found["passes"]
    said = "by tokens" if found["tokens_per_second"] else "by the clock"
    lines = [
        f"counts alone     {counts['tokens']:12,} tokens in {counts['seconds']:7.1f} s   {counts['loss']:.4f}",
        f"ordinary network {found['tokens']:12,} tokens in {found['seconds']:7.1f} s   {found['loss']:.4f}   ({said})",
    ]
    lines += [
        f"{'':16} {tokens:12,} tokens at {seconds:7.1f} s   {loss:.4f}" for seconds, tokens, loss in found["curve"]
    ]
    lines.append(
        f"it does not pass the counts within {found['seconds']:.0f} s"
        if at is None
        else f"it is below the counts from {at[0]:.0f} s and {at[1]:,} tokens on"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens, a step")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")
    parser.add_argument("--tokens-per-second", type=float, help="let tokens tell the time, at this rate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/horizon"))
    parser.add_argument("--quick", action="store_true", help="ten seconds of it, within 50 seconds in all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "horizon"):
            found = run_of(arguments)
    except InputError as error:
        raise SystemExit(f"horizon: {error}") from None
    print(json.dumps(found) if arguments.json else told(found))


def run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `horizon` finds under these settings; kept in the folder unless it is a quick one."""
    keep_freed_memory()  # as thrift.py does
    device = choose_device(arguments.device)
    wanted = best_format(device) if arguments.precision == "auto" else arguments.precision
    precision = "bf16" if wanted == "bf16" else "fp32"
    recipe = dataclasses.replace(
        ordinary_recipe(SHAPES[arguments.size], precision, arguments.learning_rate),
        batches=((0.0, QUICK_ROWS if arguments.quick else arguments.rows),), compiled=arguments.compiled,
    )  # fmt: skip
    most = QUICK_TEXT_BYTES if arguments.quick else None
    text = DataConfig(data=tuple(arguments.text), vocab_size=VOCAB_SIZE, max_bytes=most)
    data = prepare(text, arguments.folder / ("data-quick" if arguments.quick else "data")).folder
    if arguments.quick:
        found = horizon(recipe, data, device, QUICK_RUN_SECONDS, held_out_rows=4, marks=())
    else:
        rate = arguments.tokens_per_second
        checkpoint = arguments.folder / "checkpoint.safetensors" if rate else None
        found = horizon(recipe, data, device, 60 * arguments.minutes, rate, checkpoint)
        write_json(arguments.folder / "result.json", found)
    return found


if __name__ == "__main__":
    main()
