"""What sparse layers, finer experts and shared ones are worth in a short run, and whether all experts are used.

    python benchmarks/experts.py --text FILE ... [--size tiny] [--steps 160] [--seeds 1] [--speeds 0.001 rule]
                                 [--rows e8 dense ...] [--folder runs/experts] [--json] [--quick]

The recipe of the race (docs/thrift.md) at equal tokens: schedule by steps, counts of the text, short sequences first,
4 rows of 256 tokens a step, fp32. Each network trains once with each speed of the router's bias; `rule` is what
`motley pretrain` takes for so many steps. Beside the held-out loss stands what share of a layer's tokens the busiest
expert took in the last tenth of the run, of the layer where it was largest.

Every finished run is a file in --folder: broken off, the same command goes on. --quick ends within 50 seconds: runs of
four steps, as many as there is time for.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from budget import QUICK_SECONDS, Budget, kept

from motley.data.pack import DataConfig, prepare
from motley.data.stream import TokenStream
from motley.errors import InputError
from motley.files import read_json, write_json
from motley.model import SIZES, ModelConfig, Transformer
from motley.progress import note
from motley.train.expert_balance import ByLength, imbalance
from motley.train.lr_schedule import factor, sequence_length
from motley.train.ngram_targets import NgramTargets, counts_of
from motley.train.optimizer import Optimizer
from motley.train.step import LossWeights, accumulate
from motley.train.validation import summed_nats

VOCAB_SIZE, SEQ_LEN, ROWS, HELD_OUT_ROWS = 4096, 256, 4, 128
RATE, EMBEDDING_RATE, NGRAMS = 5.6e-3, 10.0, 0.85
LENGTHS = ((32, 0.25), (64, 0.5), (128, 0.75))

NANO = replace(SIZES["nano"], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
BASES = {
    "nano": NANO,
    "tiny": replace(
        NANO, hidden_size=96, num_hidden_layers=3, num_attention_heads=2, kv_lora_rank=32, intermediate_size=256,
        moe_intermediate_size=64,
    ),
}  # fmt: skip


def networks(base: ModelConfig) -> dict[str, ModelConfig]:
    """What is compared: in each a token meets as many parameters as in the first."""
    inner = base.moe_intermediate_size
    return {
        "e8": base,
        "dense": replace(base, n_routed_experts=None, intermediate_size=3 * inner),
        "e16": replace(base, n_routed_experts=16),
        "fine16 2 shared": replace(
            base, n_routed_experts=16, moe_intermediate_size=inner // 2, num_experts_per_tok=4, n_shared_experts=2
        ),
        "none shared": replace(base, n_shared_experts=None, num_experts_per_tok=3),
        "2 shared": replace(base, n_shared_experts=2, num_experts_per_tok=1),
    }


def trained(shape: ModelConfig, data: Path, steps: int, speed: float, seed: int) -> dict[str, Any]:
    """One run: held-out loss in nats per token, the busiest expert's share, seconds of CPU time."""
    rows, held_out = TokenStream(data, "train", SEQ_LEN, seed), TokenStream(data, "valid", SEQ_LEN, shuffle=False)
    model = Transformer(shape)
    model.initialize(seed)
    hints = NgramTargets(counts_of(rows, shape.vocab_size, torch.device("cpu")), NGRAMS)
    optimizer = Optimizer(model.named_parameters(), "muon", 0.0, torch.float32, EMBEDDING_RATE)
    started, uneven = time.process_time(), []
    for step in range(steps):
        optimizer.zero_grad()
        batch = rows.rows(step * ROWS, ROWS).cut(sequence_length(LENGTHS, SEQ_LEN, step / steps))
        losses = accumulate(model, batch, len(batch.input_ids), LossWeights(0.0, ngrams=hints), confined=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(RATE * factor(step, steps, "wsd", round(0.05 * steps), 0.4, 0.05))
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=True):
            gate.rebalance(counts, speed)
        uneven.append([imbalance(counts) / len(counts) for counts in losses.expert_counts])
    looked_at = min(HELD_OUT_ROWS, held_out.rows_per_epoch)
    counted = int((held_out.rows(0, looked_at).targets >= 0).sum())
    last = uneven[-max(1, steps // 10) :]
    shares = [sum(layer) / len(last) for layer in zip(*last, strict=True)]
    return {
        "loss": summed_nats(model, held_out, looked_at, confined=False) / counted, "busiest": max(shares, default=None),
        "cpu_seconds": time.process_time() - started, "tokens": steps * ROWS * SEQ_LEN,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--size", choices=list(BASES), default="tiny")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--speeds", nargs="+", default=["0.001", "rule"], help="of the bias; rule: by the steps")
    parser.add_argument("--rows", nargs="+", choices=list(networks(NANO)), default=list(networks(NANO)))
    parser.add_argument("--folder", type=Path, default=Path("runs/experts"))
    parser.add_argument("--json", action="store_true", help="print one JSON object a run")
    parser.add_argument("--quick", action="store_true", help="a look whether it works; ends within 50 seconds")
    arguments = parser.parse_args()
    if not arguments.quick:
        compare(arguments, Budget())
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        kept(Budget(QUICK_SECONDS), "experts") as budget,
    ):
        arguments.steps, arguments.folder, arguments.size = 4, Path(folder), "tiny"
        compare(arguments, budget)


def compare(arguments: argparse.Namespace, budget: Budget) -> None:
    """Train what was not trained before, and print every run."""
    try:
        settings = DataConfig(
            data=tuple(arguments.text), vocab_size=VOCAB_SIZE, max_bytes=3_000_000 if arguments.quick else None
        )
        data = prepare(settings, arguments.folder / "data").folder
    except InputError as error:
        raise SystemExit(f"experts: {error}") from None
    shapes = networks(BASES[arguments.size])
    runs = [
        (seed, name, said)
        for seed in range(arguments.seeds)
        for name in arguments.rows
        for said in (arguments.speeds if shapes[name].n_routed_experts else ["0"])
    ]
    for seed, name, said in budget.each(runs):
        speed = float(ByLength.of(arguments.steps)) if said == "rule" else float(said)
        file = f"{arguments.size}-{arguments.steps}-{name.replace(' ', '-')}-{speed:g}-{seed}.json"
        if not (arguments.folder / file).is_file():
            write_json(arguments.folder / file, trained(shapes[name], data, arguments.steps, speed, seed))
        found = {"network": name, "speed": speed, "seed": seed, **read_json(arguments.folder / file)}
        busiest = "" if found["busiest"] is None else f"   busiest expert {found['busiest']:.0%}"
        line = f"{name:<16} speed {speed:<6g} seed {seed}   loss {found['loss']:.4f}{busiest}"
        print(json.dumps(found)) if arguments.json else note(line)


if __name__ == "__main__":
    main()
