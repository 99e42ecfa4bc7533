"""Tokens per second of one training step: ours beside transformers' `DeepseekV3ForCausalLM`, in one run.

Same configuration (the sizes `nano` and `micro` with a vocabulary of 4096), same weights' shapes, same batches of
8 x 512 tokens of real text, fresh for every step, so that routing changes as it does in training. Every side has a
process of its own, so that neither lives on memory the other freed; they take turns, and medians and ranges are over
turns.

Each side races in its best format and setting, found by a trial first:

    probe ─▶ formats that this machine multiplies in faster than it would emulate them
      ours          every format                                                         ─▶ the fastest
      transformers  every format x experts (eager, grouped_mm) x attention (sdpa, eager)
                       └▶ the fastest format and attention, every kind of experts, through torch.compile
                             └▶ the fastest of all with glibc's own treatment of freed memory  ─▶ the fastest

Freed memory is kept (motley.train.allocator) on both sides, as `motley pretrain` does; the last trial says what the
peer has of it. bf16 is autocast over fp32 weights on the peer's side and the compute dtype over fp32 weights on ours. A
trial that takes longer than its seconds is ended and written down as such.

Both have fused AdamW (this is the ratio), and ours its own default besides, Muon, which does more work a step. Products
of the optimizer do not count in the shares of the peak, which is that of the same format as the side's, measured on the
same machine just before. MTP is off on both sides (transformers does not train it). Importing, compiling and the first
steps are not counted, for either side.

    python benchmarks/train_throughput.py [--quick] [--json] [--sizes nano micro] [--turns 7]

--quick ends within 50 seconds, whatever the machine: the probe's best format, 2 rows, nothing compiled, and as many
turns as there is time for.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from budget import QUICK_SECONDS, Budget, kept
from machine import cpu_flags

from motley.data.pack import DataConfig, prepare
from motley.data.stream import Batch, TokenStream
from motley.fleet.device import ACTIVATIONS, Format, choose_device
from motley.fleet.probe import Machine, describe, probe
from motley.fleet.products import wait_for
from motley.model import SIZES, ModelConfig, Transformer, native
from motley.plan.network.flops import training_flops_per_token
from motley.train.allocator import keep_freed_memory
from motley.train.optimizer import Moments, Optimizer, OptimizerName
from motley.train.step import LossWeights, accumulate

ROWS, SEQ_LEN, VOCAB_SIZE, LEARNING_RATE = 8, 512, 4096, 1e-3
TEXT_BYTES, QUICK_TEXT_BYTES = 3_000_000, 300_000
COMM_TIMEOUT_SECONDS = 1800.0  # with a side's process

Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Ours:
    """One setting of ours."""

    optimizer: OptimizerName
    moments: Moments = "fp32"
    recompute: bool = False
    format: Format = "bf16"

    def __str__(self) -> str:
        more = ", bf16 moments" * (self.moments == "bf16") + ", recomputed" * self.recompute
        return f"motley, {'Muon' if self.optimizer == 'muon' else 'AdamW'}, {self.format}{more}"


@dataclass(frozen=True)
class Theirs:
    """One setting of transformers."""

    experts: str
    compiled: bool = False
    kept: bool = True  # freed memory
    checkpointed: bool = False
    attention: str = "sdpa"
    format: Format = "bf16"

    def __str__(self) -> str:
        more = ", compiled" * self.compiled + ", memory not kept" * (not self.kept)
        more += ", checkpointed" * self.checkpointed
        return f"transformers, AdamW, {self.format}, {self.experts}, {self.attention}{more}"


EXPERTS = ("grouped_mm", "eager")  # batched_mm copies weights per token: minutes a step on a CPU
ATTENTION = ("sdpa", "eager")


def formats(machine: Machine) -> list[Format]:
    """What a side may compute in: of fp32 and bf16 those that the probe measured, its own choice first.

    A format that the machine only emulates is dropped by the probe after one small product.
    """
    measured = {rate.dtype for rate in machine.matmul_rates}
    found: list[Format] = [name for name in ("fp32", "bf16") if name in measured]
    return sorted(found, key=lambda name: name != machine.compute_dtype)


def our_step(config: ModelConfig, device: torch.device, setting: Ours) -> Step:
    """One training step as `motley pretrain` takes it; returns the loss."""
    dtype = ACTIVATIONS[setting.format]
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
    model.set_attn_implementation(setting.attention)
    if setting.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    forward = torch.compile(loss_of) if setting.compiled else loss_of
    autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": setting.format == "bf16"}

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**autocast):
            loss = forward(batch.input_ids.to(device), batch.targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


@contextmanager
def noted_kernels() -> Iterator[set[str]]:
    """While inside, which of motley's own kernels were called."""
    called: set[str] = set()
    call = native.call

    def noting(name: str, *arguments: Any) -> None:
        called.add(name)
        call(name, *arguments)

    native.call = noting
    try:
        yield called
    finally:
        native.call = call


def serve(pipe: Connection, setting: Ours | Theirs, config: ModelConfig, rows: int, data: Path) -> None:
    """A side's process: answers each (position, steps) by the seconds that so many steps took, and the last loss.

    The first answer is of its kernels, and comes with the first step done.
    """
    device = choose_device("auto")
    if isinstance(setting, Ours) or setting.kept:
        keep_freed_memory()
    text = TokenStream(data, "train", SEQ_LEN)
    step = (
        our_step(config, device, setting) if isinstance(setting, Ours) else transformers_step(config, device, setting)
    )
    with noted_kernels() as kernels:
        step(text.rows(0, rows))
    pipe.send(sorted(kernels))
    while (task := pipe.recv()) is not None:
        position, steps = task
        seconds, loss = 0.0, float("nan")
        for number in range(steps):
            batch = text.rows(position + number * rows, rows)  # reading is not counted, for either side
            started = time.perf_counter()
            loss = step(batch)
            wait_for(device)
            seconds += time.perf_counter() - started
        pipe.send((seconds, loss))


class TooSlow(Exception):
    """A side did not answer in time; its process was ended."""


class Side:
    """One competitor: its process, its own place in the text, the tokens per second of each of its turns.

    Attributes:
        kernels: of ours, that its step calls; known once `ready` returned.
        longest: seconds of its longest step so far.
    """

    def __init__(self, setting: Ours | Theirs, config: ModelConfig, data: Path, rows: int = ROWS) -> None:
        self.setting, self.rows = setting, rows
        self.rates: list[float] = []
        self.position, self.loss, self.longest = rows, float("nan"), 0.0
        self.kernels: list[str] = []
        spawn = get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, setting, config, rows, data), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process ends the wait for its answer

    def ready(self, patience: float) -> None:
        """Wait until its first step, in which compilers work, is done. Raises TooSlow."""
        self.kernels = self._answer(patience)

    def turn(self, steps: int, counted: bool = True, patience: float = COMM_TIMEOUT_SECONDS) -> float:
        """Run `steps` steps; returns tokens per second. Raises TooSlow."""
        self._pipe.send((self.position, steps))
        seconds, self.loss = self._answer(patience)
        self.longest = max(self.longest, seconds / steps)
        self.position += steps * self.rows
        rate = steps * self.rows * SEQ_LEN / seconds
        if counted:
            self.rates.append(rate)
        return rate

    def _answer(self, patience: float) -> Any:
        try:
            if self._pipe.poll(min(patience, COMM_TIMEOUT_SECONDS)):
                return self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the process of {self.setting} died") from error
        self._process.kill()
        raise TooSlow(f"{self.setting}: no answer within {patience:.0f} s")

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self._pipe.send(None)
        self._process.join()

    def result(self) -> dict[str, Any]:
        return {
            "setting": dataclasses.asdict(self.setting),
            "median": statistics.median(self.rates),
            "least": min(self.rates),
            "most": max(self.rates),
            "turns": len(self.rates),
            "loss": self.loss,
        }


Trial = dict[Any, float | None]
"""Tokens per second by setting; None: it was ended because it took too long."""


def tried(setting: Any, config: ModelConfig, data: Path, plan: "Plan", into: Trial) -> None:
    """Put the median rate of a few turns of one step into the trial's table."""
    side = Side(setting, config, data, plan.rows)
    try:
        side.ready(plan.budget.patience(plan.start_seconds))
        until = time.monotonic() + plan.try_seconds
        for number in range(plan.try_turns + 1):  # the first is not counted
            patience = plan.budget.patience(until - time.monotonic())
            if number > 1 and side.longest > patience:
                break
            side.turn(1, counted=number > 0, patience=max(patience, 0.0))
        into[setting] = statistics.median(side.rates)
    except TooSlow:
        into[setting] = statistics.median(side.rates) if side.rates else None
    finally:
        side.end()


def fastest(trial: Trial) -> Any:
    """Raises TooSlow where none was quick enough."""
    rates = {setting: rate for setting, rate in trial.items() if rate is not None}
    if not rates:
        raise TooSlow(f"none of {', '.join(map(str, trial))} took a step in the time of a trial")
    return max(rates, key=lambda setting: rates[setting])


def best_of_ours(config: ModelConfig, data: Path, names: list[Format], plan: "Plan") -> tuple[Format, Trial]:
    """The format in which ours is fastest; with one there is nothing to try."""
    trial: Trial = {}
    if len(names) > 1:
        for name in names:
            tried(Ours("adamw", format=name), config, data, plan, trial)
    return (fastest(trial).format if trial else names[0]), trial


def best_of_theirs(config: ModelConfig, data: Path, names: list[Format], plan: "Plan") -> tuple[Theirs, Trial]:
    """The fastest of transformers' settings, and the rates of all that were tried."""
    trial: Trial = {}
    for name, experts, attention in itertools.product(names, EXPERTS, ATTENTION):
        tried(Theirs(experts, attention=attention, format=name), config, data, plan, trial)
    plainly = fastest(trial)
    for experts in EXPERTS:
        tried(replace(plainly, experts=experts, compiled=True), config, data, plan, trial)
    tried(replace(fastest(trial), kept=False), config, data, plan, trial)
    return fastest(trial), trial


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rows: of a batch.
        warm_up: steps before the first turn.
        turns, steps: of the race, and steps of a turn; turns end earlier where the budget does.
        trials: whether settings are tried before; without, the simplest of each kind race in the probe's format.
        try_turns, try_seconds: of a trial, after its first step.
        start_seconds: patience with that first step: imports, a compiler.
    """

    budget: Budget
    rows: int = ROWS
    warm_up: int = 10
    turns: int = 7
    steps: int = 6
    trials: bool = True
    try_turns: int = 5
    try_seconds: float = 90.0
    start_seconds: float = 900.0


def quick_plan() -> Plan:
    return Plan(Budget(QUICK_SECONDS), rows=2, warm_up=1, turns=7, steps=1, trials=False)


def race(machine: Machine, size: str, data: Path, plan: Plan) -> dict[str, Any]:
    """Run the comparison at one size. Raises TooSlow."""
    config = replace(SIZES[size], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
    names, trial = formats(machine), {}
    if plan.trials:
        ours, our_trial = best_of_ours(config, data, names, plan)
        best, their_trial = best_of_theirs(config, data, names, plan)
        peers, trial = [best], our_trial | their_trial
    else:
        ours, peers = names[0], [Theirs(experts, format=names[0]) for experts in EXPERTS]
    sides = [Side(setting, config, data, plan.rows) for setting in (Ours("adamw", format=ours), *peers)]
    sides.append(Side(Ours("muon", format=ours), config, data, plan.rows))
    for side in sides:  # all, before the first turn, so that none computes beside another's start
        side.ready(plan.budget.patience(plan.start_seconds))
    for side in sides:
        side.turn(plan.warm_up, counted=False, patience=plan.budget.left())
    for _ in plan.budget.turns(plan.turns):
        for side in sides:
            side.turn(plan.steps, patience=plan.budget.left())
    for side in sides:
        side.end()
    found = {str(side.setting): side.result() for side in sides}
    adamw, *all_theirs, muon = found.values()
    theirs = max(all_theirs, key=lambda side: side["median"])
    flops = training_flops_per_token(config, SEQ_LEN)
    # Once more: a busy moment of a shared machine must not pass for its peak.
    seen = (machine, probe(2.0)) if plan.trials else (machine,)
    rates = [rate for one in seen for rate in one.matmul_rates]
    peaks = {name: max(rate.gflops for rate in rates if rate.dtype == name) * 1e9 for name in formats(machine)}
    for side in found.values():
        side["share_of_peak"] = side["median"] * flops / peaks[side["setting"]["format"]]
    return {
        "ratio_to_transformers": adamw["median"] / theirs["median"],
        "ratio_to_transformers_with_muon": muon["median"] / theirs["median"],
        "ratio_at_the_whole_peak": max(peaks.values()) / flops / theirs["median"],
        "sides": found,
        "tried": {str(setting): rate for setting, rate in trial.items()},
        "settings": {
            "machine": describe(machine), "cpu_flags": cpu_flags(), "threads": torch.get_num_threads(),
            "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
            "own_kernels": {str(side.setting): side.kernels for side in sides if isinstance(side.setting, Ours)},
            "training_flops_per_token": flops, "rows": plan.rows, "seq_len": SEQ_LEN, "warm_up_steps": plan.warm_up,
            "steps_a_turn": plan.steps, "torch": torch.__version__, "transformers": version("transformers"),
            "config": config.to_hf(),
        },
    }  # fmt: skip


def table(size: str, result: dict[str, Any]) -> str:
    """The result for people."""
    settings = result["settings"]
    title = f"{size}, a step of {settings['rows']} x {settings['seq_len']} tokens"
    lines = [f"{title:<62} {'tokens/s':>9}   {'range over turns':<20} share of peak   last loss"]
    for name, side in result["sides"].items():
        spread = f"{side['least']:,.0f} … {side['most']:,.0f} ({side['turns']})"
        share = f"{side['share_of_peak']:6.1%} of {side['setting']['format']}"
        lines.append(f"{name:<62} {side['median']:9,.0f}   {spread:<20} {share}   {side['loss']:.3f}")
    lines += ["tried first, tokens/s:"] * bool(result["tried"])
    for name, rate in result["tried"].items():
        lines.append(f"  {name:<60} {'took too long' if rate is None else format(rate, '9,.0f')}")
    peaks = ", ".join(f"{gflops:,.0f} GFLOP/s in {name}" for name, gflops in settings["peak_gflops"].items())
    lines += [
        f"ratio to transformers {result['ratio_to_transformers']:.2f} "
        f"(with Muon, which costs more a step, {result['ratio_to_transformers_with_muon']:.2f}; "
        f"nothing but products at the best peak would be {result['ratio_at_the_whole_peak']:.2f})",
        f"peaks measured: {peaks}",
        *(
            f"motley's own kernels in {name}: {', '.join(used) or 'none'}"
            for name, used in settings["own_kernels"].items()
        ),
        "",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a look, of nano, within {QUICK_SECONDS:g} seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: nano and micro")
    parser.add_argument("--turns", type=int, default=Plan.turns, help=f"of {Plan.steps} steps each; not with --quick")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else Plan(Budget(), turns=arguments.turns)
    sizes = arguments.sizes or (["nano"] if arguments.quick else ["nano", "micro"])
    with kept(plan.budget, "train_throughput"), tempfile.TemporaryDirectory() as folder:
        machine = probe(2.0)
        text = DataConfig(vocab_size=VOCAB_SIZE, max_bytes=QUICK_TEXT_BYTES if arguments.quick else TEXT_BYTES)
        data = prepare(text, Path(folder, "data")).folder
        try:
            results = {size: race(machine, size, data, plan) for size in sizes}
        except TooSlow as slow:
            raise SystemExit(f"train_throughput: {slow}; this machine is too slow or too busy for it") from None
    if arguments.json:
        print(json.dumps(results))
        return
    print(describe(machine))
    print(f"CPU flags: {', '.join(cpu_flags()) or 'none of those that matter'}; {torch.get_num_threads()} threads\n")
    for size, result in results.items():
        print(table(size, result))


if __name__ == "__main__":
    main()
