"""The commands `motley plan`, `plan describe`, `plan evaluate` and `plan simulate`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from motley.errors import InputError
from motley.files import write_text
from motley.fleet.inventory import load_fleet
from motley.plan.cost_model.framework import ALIASES, FRAMEWORKS
from motley.plan.network.describe import describe_model
from motley.plan.network.registry import find_network
from motley.plan.network.spec import NetworkSpec
from motley.plan.read_plan import read_plan
from motley.plan.report.html import write_plan
from motley.plan.report.plan_file import plan_comparison, plan_values
from motley.plan.report.simulation_html import simulation_page
from motley.plan.report.text import describe_text, evaluate_text, plan_text, simulate_text
from motley.plan.scaling_law import expected_loss, load_laws
from motley.plan.search.objective import Objective, best_plan
from motley.plan.search.search import Searcher
from motley.plan.simulation.simulate import SimulateSettings, simulate_plan
from motley.plan.validation.accuracy import evaluate_cases
from motley.plan.workload import Workload, default_batch
from motley.progress import Progress, note

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True)
class PlanConfig:
    """Find the best way to train a model on a fleet."""

    model: Model
    """A size (nano, micro, small, v2-lite, moonlight, v3), a published model by its usual name (Llama-3-70B, GPT-3
    175B, deepseek-ai/DeepSeek-V3), or a Hugging Face config.json."""
    fleet: Path = Path("fleet.yaml")
    """The fleet file (`motley fleet probe` writes one; examples/fleets/ has more)."""
    tokens: str = "100B"
    """Tokens to train on: 14.8T, 100B, 3M or a number."""
    seq_len: int | None = None
    """Tokens in a sequence; default 4096, or the model's context if that is less."""
    global_batch: int | None = None
    """Sequences in an optimizer step; default: DeepSeek's scaling law for the compute of this run."""
    objective: Objective = "time"
    """time; cost; chips (the fewest, under a deadline)."""
    deadline_days: float | None = None
    """The longest it may take, failures not counted."""
    framework: str = "motley"
    """Training framework whose efficiencies to assume: motley, or one of the published ones."""
    engine: str | None = None
    """Old name of --framework."""
    fp8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute products in fp8 on chips that can."""
    losses: Path | None = None
    """Laws of the loss from runs of your own (benchmarks/scaling_law.py writes them); default: those of motley's."""
    out: Path = Path("plan.json")
    """The plan file to write; its picture goes beside it as HTML."""

    def __post_init__(self) -> None:
        for option, name in (("--framework", self.framework), ("--engine", self.engine or self.framework)):
            if ALIASES.get(name, name) not in FRAMEWORKS:
                raise InputError(f"{option} is {name!r}; there are {', '.join(FRAMEWORKS)}")
        for name in ("seq_len", "global_batch", "deadline_days"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")


@dataclass(frozen=True)
class DescribeConfig:
    """Say what a model is: parameters, FLOPs, cache, memory."""

    model: Model
    seq_len: int | None = None
    """Tokens in a sequence, for the attention's part; default 4096, or the model's context if that is less."""

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 1:
            raise InputError(f"--seq-len is {self.seq_len}; it must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Predict the layouts of a CSV file."""

    cases: Path
    """Columns as in vTrain's published measurements; see docs/plan.md."""


@dataclass(frozen=True)
class SimulateConfig(SimulateSettings):
    """Replay a plan with failures, stragglers and checkpoints."""

    plan: Annotated[Path, tyro.conf.Positional] = Path("plan.json")
    out: Path | None = None
    """HTML picture; default: beside the plan."""


def plan(config: PlanConfig) -> dict[str, Any]:
    framework = config.framework
    if config.engine is not None:
        note("--engine is called --framework now")
        framework = config.engine
    shape = find_network(config.model)
    fleet = load_fleet(config.fleet)
    laws = load_laws(config.losses)
    tokens = parse_tokens(config.tokens)
    seq_len = _within_context(config.seq_len, shape)
    batch = config.global_batch or default_batch(shape, tokens, seq_len)
    if batch * seq_len > tokens:
        raise InputError(
            f"--tokens {config.tokens} are fewer than one step of {batch:,} sequences of {seq_len:,} tokens; "
            f"give more tokens or a smaller --global-batch"
        )
    workload = Workload(shape, tokens, seq_len, batch, ALIASES.get(framework, framework), config.fp8)
    with Progress("costing pipeline groups", total=None, unit="groups") as bar:
        searcher = Searcher(fleet, workload, lambda group: bar.advance(1, group=group))
    deadline = None if config.deadline_days is None else 86400 * config.deadline_days
    chosen, found = best_plan(searcher, config.objective, deadline)
    result = plan_values(found)
    result["objective"] = config.objective
    result["expected_loss"] = expected_loss(laws, shape, tokens)
    result |= plan_comparison(chosen, found)
    page = write_plan(config.out, result)
    return {**result, "plan_file": str(config.out), "page": str(page)}


def plan_summary(result: dict[str, Any]) -> str:
    return plan_text(result)


def describe(config: DescribeConfig) -> dict[str, Any]:
    shape = find_network(config.model)
    return describe_model(shape, _within_context(config.seq_len, shape))


def describe_summary(result: dict[str, Any]) -> str:
    return describe_text(result)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    result = evaluate_cases(config.cases)
    for said in result["notes"]:
        note(said)
    return result


def evaluate_summary(result: dict[str, Any]) -> str:
    return evaluate_text(result)


def simulate(config: SimulateConfig) -> dict[str, Any]:
    settings = SimulateSettings(**{item.name: getattr(config, item.name) for item in fields(SimulateSettings)})
    result = simulate_plan(read_plan(config.plan), settings)
    page = config.out or config.plan.with_name(f"{config.plan.stem}-simulated.html")
    write_text(page, simulation_page(result))
    return {**result, "page": str(page)}


def simulate_summary(result: dict[str, Any]) -> str:
    return simulate_text(result)


def parse_tokens(text: str) -> float:
    """`14.8T` → 14.8e12. Raises InputError for what is no count."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    digits = text[:-1] if text[-1:].isalpha() else text
    try:
        tokens = float(digits.replace("_", "").replace(",", "")) * scale
    except ValueError:
        tokens = math.nan
    if not 0 < tokens < 1e18 or (text[-1:].isalpha() and scale == 1.0):
        raise InputError(f"--tokens is {text!r}; write a number above 0 such as 14.8T, 100B or 3_000_000")
    return tokens


def _within_context(seq_len: int | None, shape: NetworkSpec) -> int:
    """The length asked for, or the usual one. Raises InputError where it exceeds the model's context."""
    if seq_len is not None and seq_len > shape.max_context:
        raise InputError(f"--seq-len {seq_len} is longer than the context of {shape.name}, {shape.max_context}")
    return seq_len or min(4096, shape.max_context)
