"""Tokens per second of one training step: ours beside transformers' `DeepseekV3ForCausalLM`, in one run.

Same configuration (the size `micro`: hidden 256, 6 layers, 16 experts top-4, vocabulary 4096), same weights' shapes,
same batches of 8 x 512 tokens of real text, fresh for every step, so that routing changes as it does in training.
transformers runs in bf16 autocast with fused AdamW and the fastest of its expert implementations, chosen by a trial
first; ours runs as `motley pretrain` does, once with fused AdamW like the peer (this is the ratio) and once with its
own default, Muon, which does more work a step. Products of the optimizer do not count in the shares of the peak.
MTP is off on both sides (transformers does not train it). The sides take turns; medians and ranges are over turns.

    python benchmarks/train_throughput.py [--quick] [--json]
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from motley.data.pack import DataConfig, prepare
from motley.data.stream import Batch, TokenStream
from motley.fleet.device import ACTIVATIONS, choose_device, number_format
from motley.fleet.probe import describe, probe
from motley.model import SIZES, ModelConfig, Transformer
from motley.plan.cost import training_flops_per_token
from motley.train.optimizer import Optimizer, OptimizerName
from motley.train.step import LossWeights, accumulate

ROWS, SEQ_LEN, VOCAB_SIZE, LEARNING_RATE = 8, 512, 4096, 1e-3
TEXT_BYTES = 3_000_000
EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies weights per token: minutes a step on a CPU

Step = Callable[[Batch], float]


def our_step(config: ModelConfig, device: torch.device, dtype: torch.dtype, optimizer_name: OptimizerName) -> Step:
    """One training step as `motley pretrain` takes it; returns the loss."""
    model = Transformer(config)
    model.initialize(0)
    model.to(device)
    model.compute_dtype = dtype
    optimizer = Optimizer(model.named_parameters(), optimizer_name, 0.1, dtype)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        losses = accumulate(model, batch, ROWS, LossWeights(mtp=0.0), confined=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(LEARNING_RATE)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=True):
            gate.rebalance(counts, 1e-3)
        return losses.main

    return step


def transformers_step(config: ModelConfig, device: torch.device, experts: str) -> Step:
    """The same step through transformers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values = {name: value for name, value in config.to_hf().items() if name not in ("architectures", "model_type")}
    torch.manual_seed(0)
    with device:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(batch.input_ids.to(device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten().to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


class Side:
    """One competitor: its step, its own place in the text, the tokens per second of each of its turns."""

    def __init__(self, name: str, step: Step, rows: TokenStream) -> None:
        self.name, self.step, self.rows = name, step, rows
        self.rates: list[float] = []
        self.position = 0
        self.loss = float("nan")

    def turn(self, steps: int, counted: bool = True) -> float:
        """Run `steps` steps; returns tokens per second. Reading the rows is not counted, for either side."""
        seconds = 0.0
        for _ in range(steps):
            batch = self.rows.rows(self.position, ROWS)
            self.position += ROWS
            started = time.perf_counter()
            self.loss = self.step(batch)
            seconds += time.perf_counter() - started
        rate = steps * ROWS * SEQ_LEN / seconds
        if counted:
            self.rates.append(rate)
        return rate

    def result(self) -> dict[str, float]:
        return {
            "median": statistics.median(self.rates),
            "least": min(self.rates),
            "most": max(self.rates),
            "loss": self.loss,
        }


def race(warm_up: int, turns: int, steps: int) -> dict[str, Any]:
    """Run the comparison; `turns` turns of `steps` steps each after `warm_up` steps."""
    machine = probe(2.0)
    device = choose_device("auto")
    dtype = ACTIVATIONS[number_format("auto", lambda: machine)]
    config = dataclasses.replace(SIZES["micro"], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(vocab_size=VOCAB_SIZE, max_bytes=TEXT_BYTES), Path(folder, "data")).folder
        rows = TokenStream(data, "train", SEQ_LEN)
        trials = {name: transformers_step(config, device, name) for name in EXPERT_IMPLEMENTATIONS}
        trial_rates: dict[str, float] = {}
        for name, step in trials.items():
            side = Side(name, step, rows)
            side.turn(1, counted=False)
            trial_rates[name] = side.turn(2)
        best = max(trial_rates, key=lambda name: trial_rates[name])
        sides = [
            Side("motley, Muon", our_step(config, device, dtype, "muon"), rows),
            Side("motley, AdamW", our_step(config, device, dtype, "adamw"), rows),
            Side(f"transformers, AdamW, experts {best}", trials[best], rows),
        ]
        del trials
        for side in sides:
            side.turn(warm_up, counted=False)
        for _ in range(turns):
            for side in sides:
                side.turn(steps)
    ours, ours_adamw, theirs = (side.result() for side in sides)
    peak = machine.peak_gflops(machine.compute_dtype) * 1e9
    flops = training_flops_per_token(config, SEQ_LEN)
    return {
        "ratio_to_transformers": ours_adamw["median"] / theirs["median"],
        "ratio_to_transformers_with_muon": ours["median"] / theirs["median"],
        "share_of_peak": ours_adamw["median"] * flops / peak,
        "share_of_peak_with_muon": ours["median"] * flops / peak,
        "share_of_peak_transformers": theirs["median"] * flops / peak,
        "tokens_per_second": dict(zip((side.name for side in sides), (ours, ours_adamw, theirs), strict=True)),
        "settings": {
            "machine": describe(machine), "dtype": machine.compute_dtype, "peak_gflops": peak / 1e9,
            "training_flops_per_token": flops, "rows": ROWS, "seq_len": SEQ_LEN, "warm_up_steps": warm_up,
            "turns": turns, "steps_a_turn": steps, "expert_implementations_tried": trial_rates,
            "torch": torch.__version__,
            "config": config.to_hf(),
        },
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [result["settings"]["machine"], "", f"{'training step':<42} {'tokens/s':>9}   range over turns   last loss"]
    for name, side in result["tokens_per_second"].items():
        lines.append(
            f"{name:<42} {side['median']:9,.0f}   {side['least']:,.0f} … {side['most']:,.0f}   {side['loss']:.3f}"
        )
    lines += [
        "",
        f"ratio to transformers {result['ratio_to_transformers']:.2f} "
        f"(with Muon, which costs more a step, {result['ratio_to_transformers_with_muon']:.2f})",
        f"share of the {result['settings']['dtype']} peak measured, {result['settings']['peak_gflops']:,.0f} GFLOP/s: "
        f"{result['share_of_peak']:.1%}, with Muon {result['share_of_peak_with_muon']:.1%}, "
        f"transformers {result['share_of_peak_transformers']:.1%}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns: under 50 seconds on two cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = race(1, 3, 2) if arguments.quick else race(10, 7, 6)
    print(json.dumps(result) if arguments.json else table(result))


if __name__ == "__main__":
    main()
