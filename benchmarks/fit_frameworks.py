"""Fit the constants of frameworks to published measurements; write `src/motley/plan/cost_model/frameworks/*.yaml`.

    python benchmarks/fit_frameworks.py --vtrain vtrain_single_node_a100.csv [--quick]

What is fitted to what: `megatron` to a random 70 % of vTrain's single-node rows and four rows of Megatron's own paper;
the other frameworks start from it and move only the constants named below, each held by a prior, to the few rows
that are published for them (`calibration.csv`, use = fit). Rows with use = held are never looked at here. `deepseek`
is not fitted at all but derived from the others and its report. `motley-cpu` comes from
benchmarks/plan_own_runtime.py.

--quick ends within 50 seconds: `megatron` alone, fitted to every tenth of those rows, and nothing is written.
"""

import argparse
import csv
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml
from budget import QUICK_SECONDS, Budget, kept
from scipy.optimize import least_squares

from motley.files import write_text
from motley.plan.cost_model.framework import Framework
from motley.plan.validation.accuracy import Case, predict, read_cases

HERE = Path(__file__).parent
OUT = HERE.parent / "src/motley/plan/cost_model/frameworks"
SEED, TRAIN_SHARE = 0, 0.7
QUICK_SHARE = 10  # one row of so many
Priors = dict[str, tuple[float, float]]  # constant → (centre, spread of its logarithm)

START = Framework(
    name="megatron",
    description="Megatron-LM and Megatron-DeepSpeed of 2022: attention not fused, gradients exchanged at the end.",
    matmul_efficiency={"bf16": 0.9, "fp16": 0.9, "fp32": 0.9},
    half_rows=200.0,
    half_inner=60.0,
    half_outer=60.0,
    kernel_seconds=5e-6,
    attention_efficiency=0.0,
    attention_backward=2.0,
    score_bytes=14.0,
    stream_passes=8.0,
    stream_efficiency=0.8,
    gradient_passes=0.0,
    sequence_parallel="unless full recompute",
    logit_bytes=40.0,
    head_seconds=2e-3,
    host_forward_seconds=8e-4,
    host_backward_seconds=8e-4,
    overlap_power=4.0,
    collective_seconds=2e-5,
    network_seconds=4e-5,
    link_efficiency=0.7,
    network_efficiency=0.7,
    message_seconds=1e-4,
    hidden_gradients=0.0,
    hidden_experts=0.0,
    hidden_shards=0.0,
    expert_imbalance=1.0,
    expert_padding=0.0,
    expert_seconds=0.0,
    expert_bytes=(2.0, 2.0),
    gradient_bytes=2.0,
    weight_bytes=2.0,
    optimizer_passes=36.0,
    muon=False,
    muon_efficiency=1.0,
    optimizer_seconds=5e-5,
    step_seconds=1e-3,
    skew=0.0,
    waiting=0.0,
    most_tensor=8,
    most_context=16,
    most_zero=3,
    zero_over="group",
    schedules=("1f1b", "interleaved"),
    mtp_with_head=False,
    balanced_stages=False,
    recomputes=("none", "selective", "full"),
    recompute="full",
    zero=0,
    state_bytes={"weight": 2, "gradient": 4, "optimizer": 12},
    measured_on="A100-80GB-SXM",
    measured=(),
    fitted=(),
)
MEGATRON: Priors = {
    "matmul_efficiency": (0.85, 0.1),
    "half_rows": (250, 0.5),
    "half_inner": (60, 0.5),
    "half_outer": (60, 0.5),
    "kernel_seconds": (5e-6, 0.5),
    "score_bytes": (14, 0.4),
    "stream_passes": (10, 0.4),
    "host_forward_seconds": (8e-4, 0.7),
    "host_backward_seconds": (8e-4, 0.7),
    "collective_seconds": (2e-5, 1),
    "link_efficiency": (0.7, 0.2),
    "message_seconds": (1e-4, 1),
    "gradient_bytes": (2, 0.1),
    "optimizer_passes": (36, 0.2),
    "optimizer_seconds": (5e-5, 1),
    "step_seconds": (1e-3, 1),
    "logit_bytes": (40, 0.5),
    "head_seconds": (2e-3, 0.7),
    "overlap_power": (4, 0.5),
}
LATER: dict[str, tuple[str, dict[str, object], Priors]] = {
    "megatron-core": (
        "Megatron-Core of 2024 and later: fused attention, gradients and shards exchanged behind the backward pass.",
        {
            "attention_efficiency": 0.5,
            "attention_backward": 2.5,
            "hidden_gradients": 0.9,
            "hidden_experts": 0.5,
            "hidden_shards": 0.9,
            "expert_imbalance": 1.1,
            "sequence_parallel": "always",
            "recompute": "selective",
            "zero": 1,
            "score_bytes": 0.0,
            "host_forward_seconds": 4e-4,
            "host_backward_seconds": 4e-4,
        },
        {
            "matmul_efficiency": (0.9, 0.06),
            "attention_efficiency": (0.5, 0.15),
            "stream_passes": (8, 0.4),
            "network_efficiency": (0.7, 0.3),
            "hidden_gradients": (0.85, 0.1),
            "skew": (0.01, 0.7),
        },
    ),
    "torchtitan": (
        "torchtitan with FSDP2 and torch.compile: everything sharded, gathered behind computing.",
        {
            "attention_efficiency": 0.5,
            "attention_backward": 2.5,
            "hidden_gradients": 0.9,
            "hidden_experts": 0.0,
            "hidden_shards": 0.95,
            "expert_imbalance": 1.1,
            "sequence_parallel": "always",
            "recompute": "selective",
            "zero": 3,
            "schedules": ("1f1b", "interleaved", "zero_bubble"),
            "score_bytes": 0.0,
            "host_forward_seconds": 3e-4,
            "host_backward_seconds": 3e-4,
        },
        {
            "matmul_efficiency": (0.9, 0.1),
            "fp8": (0.6, 0.3),
            "attention_efficiency": (0.5, 0.2),
            "stream_passes": (6, 0.4),
            "hidden_shards": (0.9, 0.1),
            "skew": (0.005, 0.7),
        },
    ),
    "torchtitan-eager": (
        "torchtitan with FSDP2, without torch.compile: every norm and activation passes through memory alone.",
        {},
        {"stream_passes": (14, 0.5)},
    ),
    "megatron-deepspeed": (
        "Megatron-DeepSpeed of 2022 on hundreds of nodes: the gradient exchange and its stragglers show.",
        {},
        {"matmul_efficiency": (0.85, 0.1), "skew": (0.02, 0.7), "network_efficiency": (0.5, 0.5)},
    ),
    "megatron-unfused": (
        "A Megatron-DeepSpeed fork with nothing fused in attention, as Sailor's authors measured it.",
        {"recompute": "none", "host_forward_seconds": 8e-4, "host_backward_seconds": 8e-4},
        {
            "matmul_efficiency": (0.7, 0.3),
            "score_bytes": (30, 0.8),
            "stream_passes": (10, 0.5),
            "hidden_gradients": (0.5, 0.3),
            "link_efficiency": (0.6, 0.3),
        },
    ),
}
PARENT = {"torchtitan-eager": "torchtitan"}


SM_SHARE = 112 / 132  # V3 report 3.2.2: 20 of an H800's 132 multiprocessors are kept for communication


def fp8_gain(titan: Framework) -> float:
    """What products in fp8 reach of fp8's dense rate over what they reach of bf16's in bf16, measured in torchtitan."""
    return titan.matmul_efficiency["fp8"] / titan.matmul_efficiency["bf16"]


def deepseek(core: Framework, titan: Framework) -> Framework:
    """DeepSeek's own trainer, from its report and other frameworks' constants: no measurement of it is used.

    Products and attention are Megatron-Core's on the multiprocessors left for computing; fp8 gains on bf16 what it
    gains in torchtitan; DualPipe hides the expert exchange, dispatch goes in fp8, combining in bf16 (report 3.2, 3.3).
    """
    rate = {name: value * SM_SHARE for name, value in core.matmul_efficiency.items()}
    return replace(
        core,
        name="deepseek",
        description="DeepSeek's trainer as its reports describe it: DualPipe, hidden expert exchange, fp8 products.",
        matmul_efficiency={**rate, "fp8": rate["bf16"] * fp8_gain(titan)},
        attention_efficiency=core.attention_efficiency * SM_SHARE,
        expert_bytes=(1.0, 2.0),
        schedules=("1f1b", "zero_bubble", "dualpipe"),
        balanced_stages=True,
        fitted=("derived from megatron-core, torchtitan and the V3 report (3.2, 3.3); fitted to nothing",),
    )


def motley(titan: Framework, core: Framework) -> Framework:
    """Our own runtime on accelerators: assumed to reach what PyTorch's own trainer reaches, until it is measured."""
    return replace(
        titan,
        name="motley",
        muon=True,
        description="motley's own runtime on accelerators. NOT MEASURED YET: torchtitan's constants are assumed.",
        hidden_gradients=core.hidden_gradients,
        hidden_experts=0.5,
        most_tensor=1,  # what the runtime has
        most_context=1,
        most_zero=1,
        schedules=("1f1b", "zero_bubble"),
        balanced_stages=True,
        zero=1,
        fitted=("torchtitan's constants are assumed until a run on accelerators is measured",),
    )


def with_values(start: Framework, names: list[str], logs: np.ndarray) -> Framework:
    """`start` with some constants replaced; `matmul_efficiency` sets every format but fp8, which has its own."""
    values = dict(zip(names, np.exp(logs).tolist(), strict=True))
    rate = dict(start.matmul_efficiency)
    if "matmul_efficiency" in values:
        rate = {key: rate.get(key, 0) if key == "fp8" else values["matmul_efficiency"] for key in rate}
        del values["matmul_efficiency"]
    if "fp8" in values:
        rate["fp8"] = values.pop("fp8")
    for share in ("hidden_gradients", "hidden_shards"):
        if share in values:
            values[share] = min(values[share], 0.99)
    return replace(start, matmul_efficiency=rate, **values)


def under(cases: list[Case], framework: Framework) -> list[Case]:
    return [replace(case, framework=framework) for case in cases]


def fit(start: Framework, priors: Priors, cases: list[Case], weights: np.ndarray) -> Framework:
    names = list(priors)
    centre = np.log([value for value, _ in priors.values()])
    spread = np.array([value for _, value in priors.values()])
    measured = np.array([case.measured_seconds for case in cases])

    def residuals(logs: np.ndarray) -> np.ndarray:
        seconds = predict(under(cases, with_values(start, names, logs)))
        return np.concatenate([weights * np.log(seconds / measured), 0.5 * (logs - centre) / spread])

    return with_values(start, names, least_squares(residuals, centre, max_nfev=60).x)


def with_corrections(framework: Framework, cases: list[Case]) -> Framework:
    """Measured points of a layer's time: what the formula misses at each (rows, hidden size, tp), training rows."""
    points: dict[tuple[float, float, float], float] = {}
    measured = np.array([case.measured_seconds for case in cases])
    for _ in range(6):
        table = tuple((*key, factor) for key, factor in sorted(points.items()))
        misses = np.log(measured / predict(under(cases, replace(framework, measured=table))))
        cells = defaultdict(list)
        for case, miss in zip(cases, misses, strict=True):
            rows = float(case.layout["micro_batch"] * case.seq_len)
            cells[rows, float(case.shape.hidden_size), float(case.layout["tp"])].append(miss)
        for key, own in cells.items():
            points[key] = points.get(key, 1.0) * float(np.exp(np.mean(own)))
    return replace(framework, measured=tuple((*key, round(factor, 4)) for key, factor in sorted(points.items())))


def unfitted(name: str) -> Framework:
    """What rows are read with before any framework is fitted."""
    return replace(START, name=name, matmul_efficiency={**START.matmul_efficiency, "fp8": 0.6})


def megatron_paper() -> list[Case]:
    """The rows of calibration.csv that `megatron` is fitted to besides vTrain's."""
    return [case for case in read_cases(HERE / "calibration.csv", unfitted) if case.framework.name == "megatron"]


def fit_megatron(train: list[Case], paper: list[Case]) -> Framework:
    """The formula's constants, then the points where measured layers differ from it."""
    weights = np.concatenate([np.ones(len(train)), np.full(len(paper), 4.0)])
    return with_corrections(fit(START, MEGATRON, train + paper, weights), train)


def split(count: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """(rows to fit to, rows to judge by)."""
    order = np.random.default_rng(seed).permutation(count)
    cut = int(TRAIN_SHARE * count)
    return order[:cut], order[cut:]


def errors(cases: list[Case]) -> np.ndarray:
    return predict(cases) / np.array([case.measured_seconds for case in cases]) - 1


def write(framework: Framework, header: str) -> None:
    values = {name: rounded(value) for name, value in asdict(framework).items()}
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=118)
    write_text(OUT / f"{framework.name}.yaml", f"# {header}\n{body}")


def rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [rounded(item) for item in value]
    return value


def fit_told(name: str, off_by: np.ndarray) -> str:
    """How far a fit is off some rows, for people."""
    off = np.sort(np.abs(off_by))
    tenth = max(1, len(off) // 10)
    return (
        f"vTrain {name}: {len(off)} rows, mean {off.mean():.2%}, worst decile {off[-tenth:].mean():.2%}, "
        f"worst {off[-1]:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vtrain", type=Path, required=True, help="vTrain's single_node CSV (MIT)")
    parser.add_argument("--quick", action="store_true", help="megatron alone, to a tenth of the rows; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        with kept(Budget(QUICK_SECONDS), "fit_frameworks"):
            vtrain = read_cases(arguments.vtrain, unfitted)[::QUICK_SHARE]
            train, test = split(len(vtrain))
            framework = fit_megatron([vtrain[i] for i in train], megatron_paper())
            for name, chosen in (("train", train), ("held out", test)):
                print(fit_told(name, errors(under([vtrain[i] for i in chosen], framework))))
        return
    written = (
        "Written by benchmarks/fit_frameworks.py; meaning of each constant: motley.plan.cost_model.framework.Framework."
    )

    cases = read_cases(HERE / "calibration.csv", unfitted)
    uses = [row["use"] for row in csv.DictReader((HERE / "calibration.csv").open())]
    published = [case for case, use in zip(cases, uses, strict=True) if use == "fit"]

    vtrain = read_cases(arguments.vtrain, unfitted)
    train, test = split(len(vtrain))
    megatron = replace(
        fit_megatron([vtrain[i] for i in train], megatron_paper()),
        fitted=(
            f"{len(train)} of {len(vtrain)} single-node rows of vTrain (arXiv 2312.12391, data MIT), seed {SEED}",
            "four rows of arXiv 2205.05198, table 5",
            "measured: mean ratio of those rows to the formula at each (rows, hidden size, tp)",
        ),
    )
    write(megatron, written)
    for name, chosen in (("train", train), ("held out", test)):
        print(fit_told(name, errors(under([vtrain[i] for i in chosen], megatron))))
    done = {"megatron": megatron}
    for name, (description, changed, priors) in LATER.items():
        start = replace(done[PARENT.get(name, "megatron")], name=name, description=description, **changed)  # type: ignore[arg-type]
        start = replace(start, measured=(), measured_on="")
        if "fp8" in priors:
            start = replace(start, matmul_efficiency={**start.matmul_efficiency, "fp8": 0.6})
        own = [case for case in published if case.framework.name == name]
        fitted = fit(start, priors, own, np.full(len(own), 8.0))
        sources = tuple(dict.fromkeys(case.note.split(":")[0] for case in own))
        done[name] = replace(fitted, fitted=(f"started from {PARENT.get(name, 'megatron')}", *sources))
        write(done[name], written)
        print(name, {key: rounded(getattr(done[name], key)) for key in (*priors, "matmul_efficiency") if key != "fp8"})
    core, titan = done["megatron-core"], done["torchtitan"]
    done["megatron-core"] = core = replace(
        core, matmul_efficiency={**core.matmul_efficiency, "fp8": core.matmul_efficiency["bf16"] * fp8_gain(titan)}
    )
    write(core, written)
    write(deepseek(core, titan), written)
    write(motley(done["torchtitan"], done["megatron-core"]), written)
    for case in published:
        off = float(errors(under([case], done[case.framework.name]))[0])
        print(
            f"{off:+7.1%}  {case.framework.name:17} {case.model:13} {case.gpus:5} {case.chip:15} {case.precision} "
            f"{case.note[:50]}"
        )


if __name__ == "__main__":
    main()
