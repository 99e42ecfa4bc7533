"""Tokens per second of one training step: ours beside transformers' `DeepseekV3ForCausalLM`, in one run.

Same configuration (the sizes `nano` and `micro` with a vocabulary of 4096), same weights' shapes, same batches of
8 x 512 tokens of real text, fresh for every step, so that routing changes as it does in training. Every side has a
process of its own, so that neither lives on memory the other freed; they take turns, and medians and ranges are over
turns.

transformers runs in bf16 autocast with fused AdamW, in the fastest of the settings below, found by a trial first: its
expert implementations, plain and through torch.compile, and with freed memory kept as ours is. Ours runs as `motley
pretrain` does, once with fused AdamW like the peer (this is the ratio) and once with its own default, Muon, which does
more work a step. Products of the optimizer do not count in the shares of the peak. MTP is off on both sides
(transformers does not train it).

    python benchmarks/train_throughput.py [--quick] [--json] [--sizes nano micro]
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from motley.data.pack import DataConfig, prepare
from motley.data.stream import Batch, TokenStream
from motley.fleet.device import ACTIVATIONS, choose_device, number_format
from motley.fleet.probe import Machine, describe, probe
from motley.model import SIZES, ModelConfig, Transformer, native
from motley.plan.cost import training_flops_per_token
from motley.train.kept import keep_freed_memory
from motley.train.optimizer import Moments, Optimizer, OptimizerName
from motley.train.step import LossWeights, accumulate

ROWS, SEQ_LEN, VOCAB_SIZE, LEARNING_RATE = 8, 512, 4096, 1e-3
TEXT_BYTES = 3_000_000

Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Ours:
    """One setting of ours."""

    optimizer: OptimizerName
    moments: Moments = "fp32"
    recompute: bool = False

    def __str__(self) -> str:
        more = ", bf16 moments" * (self.moments == "bf16") + ", recomputed" * self.recompute
        return f"motley, {'Muon' if self.optimizer == 'muon' else 'AdamW'}{more}"


@dataclass(frozen=True)
class Theirs:
    """One setting of transformers."""

    experts: str
    compiled: bool = False
    kept: bool = False  # freed memory
    checkpointed: bool = False

    def __str__(self) -> str:
        more = ", compiled" * self.compiled + ", memory kept" * self.kept + ", checkpointed" * self.checkpointed
        return f"transformers, AdamW, {self.experts}{more}"


# batched_mm copies weights per token: minutes a step on a CPU.
QUICK_SETTINGS = (Theirs("eager"), Theirs("grouped_mm"))
SETTINGS = (*QUICK_SETTINGS, Theirs("eager", compiled=True), Theirs("grouped_mm", compiled=True))


def own_kernels() -> bool:
    return choose_device("auto").type == "cpu" and native.runs()


def our_step(config: ModelConfig, device: torch.device, dtype: torch.dtype, setting: Ours) -> Step:
    """One training step as `motley pretrain` takes it; returns the loss."""
    model = Transformer(config)
    model.initialize(0)
    model.to(device)
    model.compute_dtype, model.recompute = dtype, setting.recompute
    optimizer = Optimizer(model.named_parameters(), setting.optimizer, 0.1, dtype, moments=setting.moments)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        losses = accumulate(model, batch, len(batch.input_ids), LossWeights(mtp=0.0), confined=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(LEARNING_RATE)
        for gate, counts in zip(model.gates(), losses.expert_counts, strict=True):
            gate.rebalance(counts, 1e-3)
        return losses.main

    return step


def transformers_step(config: ModelConfig, device: torch.device, setting: Theirs) -> Step:
    """The same step through transformers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values = {name: value for name, value in config.to_hf().items() if name not in ("architectures", "model_type")}
    torch.manual_seed(0)
    with device:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    model.set_experts_implementation(setting.experts)
    if setting.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    forward = torch.compile(loss_of) if setting.compiled else loss_of

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(batch.input_ids.to(device), batch.targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def serve(pipe: Connection, setting: Ours | Theirs, config: ModelConfig, dtype: torch.dtype, data: Path) -> None:
    """A side's process: answers each (position, steps) by the seconds that so many steps took, and the last loss."""
    device = choose_device("auto")
    if isinstance(setting, Ours) or setting.kept:
        keep_freed_memory()
    if isinstance(setting, Ours):
        step = our_step(config, device, dtype, setting)
    else:
        step = transformers_step(config, device, setting)
    rows = TokenStream(data, "train", SEQ_LEN)
    while (task := pipe.recv()) is not None:
        position, steps = task
        seconds, loss = 0.0, float("nan")
        for number in range(steps):
            batch = rows.rows(position + number * ROWS, ROWS)  # reading is not counted, for either side
            started = time.perf_counter()
            loss = step(batch)
            seconds += time.perf_counter() - started
        pipe.send((seconds, loss))


class Side:
    """One competitor: its process, its own place in the text, the tokens per second of each of its turns."""

    def __init__(self, setting: Ours | Theirs, config: ModelConfig, dtype: torch.dtype, data: Path) -> None:
        self.name = str(setting)
        self.rates: list[float] = []
        self.position, self.loss = 0, float("nan")
        spawn = get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, setting, config, dtype, data), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process ends the wait for its answer

    def turn(self, steps: int, counted: bool = True) -> float:
        """Run `steps` steps; returns tokens per second."""
        self._pipe.send((self.position, steps))
        try:
            seconds, self.loss = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the process of {self.name} died") from error
        self.position += steps * ROWS
        rate = steps * ROWS * SEQ_LEN / seconds
        if counted:
            self.rates.append(rate)
        return rate

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def result(self) -> dict[str, float]:
        return {
            "median": statistics.median(self.rates),
            "least": min(self.rates),
            "most": max(self.rates),
            "loss": self.loss,
        }


def best_setting(
    config: ModelConfig, dtype: torch.dtype, data: Path, settings: tuple[Theirs, ...], turns: int
) -> tuple[Theirs, dict[str, float]]:
    """The fastest of transformers' settings, and the median rate of each in a trial of `turns` turns of one step."""
    rates: dict[Theirs, float] = {}

    def try_out(setting: Theirs) -> None:
        side = Side(setting, config, dtype, data)
        side.turn(4 if setting.compiled else 2, counted=False)
        for _ in range(turns):
            side.turn(1)
        rates[setting] = statistics.median(side.rates)
        side.end()

    for setting in settings:
        try_out(setting)
    try_out(dataclasses.replace(max(rates, key=lambda setting: rates[setting]), kept=True))
    return max(rates, key=lambda setting: rates[setting]), {str(setting): rate for setting, rate in rates.items()}


def race(machine: Machine, size: str, data: Path, quick: bool) -> dict[str, Any]:
    """Run the comparison at one size."""
    warm_up, turns, steps = (1, 3, 1) if quick else (10, 7, 6)
    dtype = ACTIVATIONS[number_format("auto", lambda: machine)]
    config = dataclasses.replace(SIZES[size], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
    best, trial = best_setting(config, dtype, data, QUICK_SETTINGS if quick else SETTINGS, 2 if quick else 5)
    sides = [Side(setting, config, dtype, data) for setting in (Ours("muon"), Ours("adamw"), best)]
    for side in sides:
        side.turn(warm_up, counted=False)
    for _ in range(turns):
        for side in sides:
            side.turn(steps)
    for side in sides:
        side.end()
    ours, ours_adamw, theirs = (side.result() for side in sides)
    peak = machine.peak_gflops(machine.compute_dtype) * 1e9
    flops = training_flops_per_token(config, SEQ_LEN)
    return {
        "ratio_to_transformers": ours_adamw["median"] / theirs["median"],
        "ratio_to_transformers_with_muon": ours["median"] / theirs["median"],
        "share_of_peak": ours_adamw["median"] * flops / peak,
        "share_of_peak_with_muon": ours["median"] * flops / peak,
        "share_of_peak_transformers": theirs["median"] * flops / peak,
        "ratio_at_the_whole_peak": peak / flops / theirs["median"],
        "tokens_per_second": dict(zip((side.name for side in sides), (ours, ours_adamw, theirs), strict=True)),
        "settings": {
            "machine": describe(machine), "dtype": machine.compute_dtype, "peak_gflops": peak / 1e9,
            "own_kernels": own_kernels(), "training_flops_per_token": flops, "rows": ROWS, "seq_len": SEQ_LEN,
            "warm_up_steps": warm_up, "turns": turns, "steps_a_turn": steps, "transformers_settings_tried": trial,
            "torch": torch.__version__, "config": config.to_hf(),
        },
    }  # fmt: skip


def table(size: str, result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [f"{size + ', training step':<58} {'tokens/s':>9}   range over turns   last loss"]
    for name, side in result["tokens_per_second"].items():
        lines.append(
            f"{name:<58} {side['median']:9,.0f}   {side['least']:,.0f} … {side['most']:,.0f}   {side['loss']:.3f}"
        )
    tried = ", ".join(f"{name} {rate:,.0f}" for name, rate in settings["transformers_settings_tried"].items())
    lines += [
        f"tried first: {tried}",
        f"ratio to transformers {result['ratio_to_transformers']:.2f} "
        f"(with Muon, which costs more a step, {result['ratio_to_transformers_with_muon']:.2f}; "
        f"nothing but products at their peak would be {result['ratio_at_the_whole_peak']:.2f})",
        f"share of the {settings['dtype']} peak measured, {settings['peak_gflops']:,.0f} GFLOP/s: "
        f"{result['share_of_peak']:.1%}, with Muon {result['share_of_peak_with_muon']:.1%}, "
        f"transformers {result['share_of_peak_transformers']:.1%}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, nothing compiled, only nano by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=list(SIZES),
    )
    arguments = parser.parse_args()
    sizes = arguments.sizes or (["nano"] if arguments.quick else ["nano", "micro"])
    machine = probe(2.0)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(vocab_size=VOCAB_SIZE, max_bytes=TEXT_BYTES), Path(folder, "data")).folder
        results = {size: race(machine, size, data, arguments.quick) for size in sizes}
    if arguments.json:
        print(json.dumps(results))
        return
    print(describe(machine))
    print(
        native.missing() or f"motley's own kernels: {'in use' if own_kernels() else 'not for this device'}", end="\n\n"
    )
    for size, result in results.items():
        print(table(size, result))


if __name__ == "__main__":
    main()
