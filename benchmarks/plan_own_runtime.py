"""Predicted against measured step time of motley's own runtime on this machine, one process.

    python benchmarks/plan_own_runtime.py          measure, predict with the constants in frameworks/motley-cpu*.yaml
    python benchmarks/plan_own_runtime.py --fit    measure, fit constants to half of the cases, judge by the rest; then
                                                   fit them to all, and write those

Every case is a shape and a batch: real steps of the training loop (forward, backward, clipping, optimizer) on random
tokens; the median of five, the better of two rounds. Passes are measured and fitted apart from the update. Products
are predicted from this machine's probe, not fitted.
In bf16 motley runs kernels of its own (framework `motley-cpu`), in fp32 PyTorch's operators (`motley-cpu-plain`). A
format that the machine only emulates, which the probe finds out, has no cases and no fit.

--quick ends within 50 seconds: shorter probes, every fifth case once, and of those as many as there is time for.
"""

import argparse
import json
import platform
import statistics
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from budget import QUICK_SECONDS, Budget, kept
from fit_frameworks import write
from scipy.optimize import least_squares

from motley.demo.trial import step_seconds as measured_step_seconds
from motley.fleet.inventory import parse_fleet
from motley.fleet.probe import Machine, probe
from motley.fleet.write import fleet_text
from motley.model import SIZES, ModelConfig
from motley.plan.cost_model.configs import ParallelConfigs
from motley.plan.cost_model.framework import Framework, load_framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.cost_model.step_time import step_seconds
from motley.plan.network.spec import deepseek
from motley.progress import Progress
from motley.train.config import PretrainConfig

PROBE_SECONDS, QUICK_PROBE_SECONDS = 20.0, 5.0
ROUNDS = 2  # of all cases: a busy minute of the machine then spoils no case in all of them
WRITTEN = (
    "Written by benchmarks/plan_own_runtime.py --fit, `waiting` by plan_uneven.py; "
    "constants: motley.plan.cost_model.framework."
)
DESCRIPTIONS = {
    "motley-cpu": "motley's own runtime on CPUs, one process, in bf16 with kernels of its own.",
    "motley-cpu-plain": "motley's own runtime on CPUs, one process, in fp32 with PyTorch's operators.",
}


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    rows: int
    micro_batch: int
    seq_len: int
    optimizer: str
    dtype: str
    threads: int

    @property
    def framework(self) -> str:
        return "motley-cpu" if self.dtype == "bf16" else "motley-cpu-plain"


def cases(cores: int) -> list[Case]:
    """Widths, depths, experts, vocabularies, contexts, batches, optimizers, formats, threads, one thing at a time."""
    nano, micro = replace(SIZES["nano"], vocab_size=2048), replace(SIZES["micro"], vocab_size=2048)
    mid = replace(micro, hidden_size=384, moe_intermediate_size=192, intermediate_size=1024, num_hidden_layers=5)
    wide = replace(micro, hidden_size=512, moe_intermediate_size=256, intermediate_size=1536, num_hidden_layers=4)
    dense = replace(micro, n_routed_experts=None, n_group=1, topk_group=1)
    found = []
    for name, config in {
        "nano": nano,
        "micro": micro,
        "mid": mid,
        "wide": wide,
        "dense": dense,
        "nano, 8 layers": replace(nano, num_hidden_layers=8),
        "micro, 32 experts": replace(micro, n_routed_experts=32),
        "nano, vocabulary 16k": replace(nano, vocab_size=16384),
        "micro, no MTP": replace(micro, num_nextn_predict_layers=0),
    }.items():
        found.append(Case(name, config, 16, 16, 256, "muon", "bf16", cores))
        found.append(Case(name, config, 8, 8, 512, "adamw", "bf16", cores))
        found.append(Case(name, config, 8, 8, 256, "muon", "fp32", cores))
        found.append(Case(name, config, 4, 4, 512, "adamw", "fp32", cores))
    found += [
        Case("nano", nano, 32, 32, 256, "muon", "bf16", cores),
        Case("micro", micro, 4, 4, 1024, "muon", "bf16", cores),
        Case("nano", nano, 8, 8, 256, "muon", "bf16", cores),
        Case("mid", mid, 16, 16, 512, "muon", "bf16", cores),
        Case("wide", wide, 4, 4, 256, "muon", "bf16", cores),
        Case("dense", dense, 8, 8, 1024, "muon", "bf16", cores),
        Case("nano", nano, 16, 16, 256, "muon", "fp32", cores),
        Case("micro", micro, 2, 2, 1024, "muon", "fp32", cores),
    ]
    for dtype in ("bf16", "fp32"):
        found += [
            Case("nano", nano, 16, 16, 64, "muon", dtype, 1),
            Case("nano", nano, 4, 4, 64, "muon", dtype, 1),
            Case("nano", nano, 8, 8, 256, "adamw", dtype, 1),
            Case("micro", micro, 8, 8, 128, "muon", dtype, 1),
            Case("dense", dense, 8, 8, 64, "muon", dtype, 1),
            Case("nano", nano, 64, 16, 64, "muon", dtype, 1),
            Case("nano", nano, 32, 4, 64, "adamw", dtype, 1),
            Case("nano, no MTP", replace(nano, num_nextn_predict_layers=0), 16, 16, 64, "muon", dtype, 1),
            Case("nano, no MTP", replace(nano, num_nextn_predict_layers=0), 32, 4, 128, "adamw", dtype, 1),
            Case("nano", nano, 32, 8, 128, "muon", dtype, cores),
            Case("micro", micro, 16, 4, 128, "muon", dtype, 1),
            Case("dense", dense, 16, 4, 128, "adamw", dtype, cores),
            Case("mid", mid, 16, 4, 128, "muon", dtype, cores),
        ]
    return found


def measure(case: Case) -> tuple[float, float]:
    """Seconds of a step's passes, and of its update."""
    config = PretrainConfig(
        batch_rows=case.rows,
        micro_batch=case.micro_batch,
        seq_len=case.seq_len,
        optimizer=case.optimizer,  # type: ignore[arg-type]
    )
    torch.set_num_threads(case.threads)
    return measured_step_seconds(case.config, config, torch.device("cpu"), case.dtype, steps=5)  # type: ignore[arg-type]


def predict(case: Case, hardware: dict[int, Hardware], framework: Framework) -> tuple[float, float]:
    """The same, predicted; `hardware` by the number of threads."""
    framework = replace(framework, muon=case.optimizer == "muon")
    configs = ParallelConfigs.of(
        tp=1,
        cp=1,
        ep=1,
        dp=1,
        pp=1,
        micro_batch=case.micro_batch,
        micro_batches=case.rows // case.micro_batch,
        recompute=0,
        schedule=0,
        chunks=1,
        zero=0,
    )
    shape = deepseek(case.config, case.name)
    step = step_seconds(shape, configs, case.seq_len, hardware[case.threads], framework, case.dtype)
    return float((step.total - step.optimizer)[0]), float(step.optimizer[0])


START = {
    "matmul_efficiency": (0.75, 0.2),
    "kernel_seconds": (3e-5, 0.7),
    "stream_passes": (10, 0.7),
    "gradient_passes": (12, 0.5),
    "logit_bytes": (30, 0.5),
    "attention_efficiency": (0.4, 0.3),
    "score_bytes": (4, 0.7),
    "host_forward_seconds": (5e-4, 0.7),
    "host_backward_seconds": (8e-4, 0.7),
    "head_seconds": (2e-3, 0.7),
    "optimizer_passes": (36, 0.3),
    "muon_efficiency": (1, 0.5),
    "optimizer_seconds": (2e-4, 0.7),
    "step_seconds": (2e-3, 0.7),
    "expert_seconds": (1e-3, 0.7),
}


def fit(name: str, measured: list[tuple[Case, tuple[float, float]]], hardware: dict[int, Hardware]) -> Framework:
    """Constants with which passes, and passes and update together, come out as measured."""
    base = replace(
        load_framework("motley"),
        name=name,
        description=DESCRIPTIONS[name],
        overlap_power=1.0,
        stream_efficiency=1.0,
        attention_backward=2.5,
        recompute="none",
        zero=0,
        measured=(),
        measured_on="",
        expert_padding=32.0,
        expert_imbalance=1.0,
        state_bytes={"weight": 4, "gradient": 4, "optimizer": 8},
        waiting=load_framework(name).waiting,  # from benchmarks/plan_uneven.py --fit
        fitted=("all cases of benchmarks/plan_own_runtime.py; products come from the machine's own probe",),
    )
    names = list(START)
    centre = np.log([value for value, _ in START.values()])
    spread = np.array([value for _, value in START.values()])

    def framework_of(logs: np.ndarray) -> Framework:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        rate = values.pop("matmul_efficiency")
        return replace(base, matmul_efficiency={"bf16": rate, "fp32": rate}, **values)

    def residuals(logs: np.ndarray) -> np.ndarray:
        framework = framework_of(logs)
        misses = []
        for case, (passes, update) in measured:
            own = predict(case, hardware, framework)
            misses += [np.log(own[0] / passes), np.log(sum(own) / (passes + update))]
        return np.concatenate([np.array(misses) * 8, (logs - centre) / spread * 0.2])

    return framework_of(least_squares(residuals, centre, max_nfev=80).x)


MeasuredColumn = list[tuple[Case, tuple[float, float]]]


def possible(machine: Machine, every: list[Case]) -> list[Case]:
    """Cases in formats that the machine multiplies in by itself."""
    formats = {rate.dtype for rate in machine.matmul_rates}
    return [case for case in every if case.dtype in formats]


def measured_cases(quick: bool, budget: Budget) -> tuple[Machine, dict[int, Hardware], MeasuredColumn]:
    """(this machine with all its threads, its hardware by number of threads, cases with seconds of their parts)."""
    seconds = QUICK_PROBE_SECONDS if quick else PROBE_SECONDS
    threads_before = torch.get_num_threads()
    machine = probe(seconds, torch.device("cpu"), grid=True)
    hardware = {}
    for threads in {machine.threads, 1}:
        torch.set_num_threads(threads)
        own = machine if threads == machine.threads else probe(seconds, torch.device("cpu"), grid=True)
        hardware[threads] = Hardware.of_pool(parse_fleet(fleet_text([own]), "probe").pools[0])
    every = possible(machine, cases(machine.threads))
    every = sorted(every[::5], key=lambda case: case.rows * case.seq_len) if quick else every
    rounds = 1 if quick else ROUNDS
    times: dict[Case, list[tuple[float, float]]] = {}
    with Progress("measuring", total=rounds * len(every), unit="cases") as bar:
        for case in budget.each(every * rounds):
            times.setdefault(case, []).append(measure(case))
            bar.advance(1)
    torch.set_num_threads(threads_before)
    return machine, hardware, [(case, min(own, key=sum)) for case, own in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--quick", action="store_true", help="every fifth case, one round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.fit and arguments.quick:
        parser.error("constants are not fitted to a quick look: leave --quick or --fit out")
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    with kept(budget, "plan_own_runtime"):
        machine, hardware, measured = measured_cases(arguments.quick, budget)
    used = measured
    frameworks = {name: load_framework(name) for name in DESCRIPTIONS}
    if arguments.fit:
        used = []
        for name in DESCRIPTIONS:
            own = [(case, seconds) for case, seconds in measured if case.framework == name]
            if not own:
                print(f"{name} stays as it is: this machine only emulates its format")
                continue
            own = [own[i] for i in np.random.default_rng(0).permutation(len(own))]
            frameworks[name] = fit(name, own[: len(own) // 2], hardware)
            used += own[len(own) // 2 :]
            write(fit(name, own, hardware), WRITTEN)
        print(f"fitted to {len(measured) - len(used)} cases; the other {len(used)}:")
    rows = [(case, sum(parts), sum(predict(case, hardware, frameworks[case.framework]))) for case, parts in used]
    errors = [predicted / seconds - 1 for _, seconds, predicted in rows]
    if arguments.json:
        print(
            json.dumps(
                {
                    "machine": machine.name,
                    "mean_relative_error": statistics.mean(map(abs, errors)),
                    "worst_relative_error": max(map(abs, errors)),
                    "rows": [
                        asdict(case) | {"config": None, "measured_seconds": seconds, "predicted_seconds": predicted}
                        for case, seconds, predicted in rows
                    ],
                }
            )
        )
        return
    print(f"{machine.name}, {machine.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    for (case, seconds, predicted), error in zip(rows, errors, strict=True):
        print(
            f"  {case.name:22} {case.rows:3} by {case.micro_batch:2} x {case.seq_len:4} {case.optimizer:5} "
            f"{case.dtype} x {case.threads}  "
            f"measured {1e3 * seconds:7.1f} ms  predicted {1e3 * predicted:7.1f} ms  {error:+.1%}"
        )
    print(f"mean error {statistics.mean(map(abs, errors)):.1%}, worst {max(map(abs, errors)):.1%}, {len(rows)} cases")


if __name__ == "__main__":
    main()
