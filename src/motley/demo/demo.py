"""`motley demo`: every stage of the journey on this machine, in minutes, ending at a page to talk to the model.

    probe → plan → data → problems → pretrain → sft → eval → export → report → serve
                                  ↑          ↑        (each complete stage is remembered in journey.json)
                                 the plan again, with the time that is left

The plan is made from a few real steps of the very model that will be trained, so that the time it promises can be
held against the time it took; both are shown at the end. Where other work came or went meanwhile, what is still to be
trained is planned again to end when it was promised.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from motley.data.pack import DataConfig, prepare
from motley.data.sources import list_files
from motley.data.tasks import make_problems, write_jsonl
from motley.demo.about import about
from motley.demo.levels import levels_of
from motley.demo.plan import DemoPlan, make_plan, replan, step_again, warnings
from motley.demo.show import outcome, replanned, skill, stage_line, times_table, welcome
from motley.errors import InputError
from motley.evaluate.command import EvalConfig, evaluate
from motley.evaluate.export import ExportConfig, export
from motley.evaluate.report import write_report
from motley.files import read_json, write_json
from motley.fleet.probe import Machine, describe, probe
from motley.plan.network.flops import active_parameters, kv_cache_bytes_per_token, parameters
from motley.progress import note
from motley.train.pretrain import pretrain
from motley.train.run_folder import claimed
from motley.train.sft import sft

JOURNEY_FILE = "journey.json"


@dataclass(frozen=True)
class DemoConfig:
    """Train a small model on this machine and talk to it."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes; the same command goes on where it stopped."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|hf:NAME")] = ()
    """Your own text instead of the Python standard library: files, folders, or a dataset of the Hugging Face hub; as
    much of it is read as training here needs, 4 to 32 MB."""
    minutes: float = 8.0
    """Time for the whole journey, serving apart; the plan fits into it."""
    level: str = "auto"
    """What is learned: auto takes the richest level that this machine learns in the time; five, five-small, three and
    three-easy go from five kinds of problem to three easy ones (five-micro: on a GPU)."""
    serve: bool = True
    """Start the server at the end; not with --json, nor from Python."""
    port: int = 8321
    """Of the server; if it is taken, one of the next is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise InputError(f"--minutes is {self.minutes}; it must be above 0")
        levels_of("cpu", self.level)


class Journey:
    """What has been done so far, kept in `journey.json` after every stage."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.file = folder / JOURNEY_FILE
        self.facts: dict[str, Any] = {
            "asked": asked,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": [],
        }
        if self.file.is_file():
            self.facts = read_json(self.file)
            for name, value in asked.items():
                before = self.facts["asked"].get(name)
                if before != value:
                    raise InputError(
                        f"{folder} holds a demo with {name}={before!r}, now asked for {value!r}; "
                        "choose another --out, or remove the folder to begin again"
                    )

    def save(self, **facts: Any) -> None:
        self.facts |= facts
        write_json(self.file, self.facts)

    def stage(self, name: str) -> dict[str, Any]:
        return next(stage for stage in self.facts["stages"] if stage["name"] == name)

    def run(self, name: str, work: Callable[[], dict[str, Any]], console: Console) -> dict[str, Any]:
        """The result of stage `name`: remembered if it was complete, else worked out now."""
        stage = self.stage(name)
        if stage["seconds"] is not None:
            console.print(stage_line(stage, remembered=True))
            return stage["result"]
        console.print(stage_line(stage))
        with self.clock(stage):
            result = work()
        self.save()
        stage["result"] = result
        # A resumed training stage knows its whole time; the clock saw only this process.
        stage["seconds"] = max(stage["spent"], result.get("seconds", 0.0))
        self.save()
        return result

    @contextmanager
    def clock(self, stage: dict[str, Any]) -> Iterator[None]:
        """Count what happens here to the time of `stage`."""
        started = time.monotonic()
        try:
            yield
        finally:
            stage["spent"] += time.monotonic() - started
            self.save()


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run, or go on with, the whole journey up to the report; returns what it amounts to."""
    console = Console(stderr=True)
    if config.data:
        list_files(config.data)  # a path that cannot be read is said before anything is measured
    asked = {"data": list(config.data), "minutes": config.minutes, "level": config.level, "seed": config.seed}
    with claimed(config.out):
        journey = Journey(config.out, asked)
        machine = _planned(journey, config, console)
        facts = Stages(journey, config, machine).run(console)
    console.print(times_table(journey.facts["stages"]))
    console.print(outcome(facts))
    return facts


def _planned(journey: Journey, config: DemoConfig, console: Console) -> Machine:
    """Measure and plan once; a resumed demo keeps its plan, or training would not be the same."""
    if "plan" in journey.facts:
        machine, plan = Machine.from_dict(journey.facts["machine"]), DemoPlan.from_json(journey.facts["plan"])
        torch.set_num_threads(machine.threads)
        seconds = _times(journey.facts["stages"])["predicted_seconds"]
        console.print(welcome(describe(machine), plan, seconds, resumed=True))
        return machine
    started = time.monotonic()
    note("measuring this machine")
    machine = probe()
    torch.set_num_threads(machine.threads)  # PyTorch counts the cores of a container with a quota, not its share
    plan = make_plan(
        machine, config.minutes, config.seed, time.monotonic() - started, levels_of(machine.device, config.level)
    )
    seconds = time.monotonic() - started
    stages = [{"name": "probe", "title": "Measure and plan", "predicted_seconds": seconds, "seconds": seconds,
               "spent": seconds, "folder": None, "result": {}}]  # fmt: skip
    stages += [{"name": name, "title": title, "predicted_seconds": plan.seconds[name], "seconds": None, "spent": 0.0,
                "folder": folder, "result": None} for name, title, folder in STAGES]  # fmt: skip
    journey.save(machine=asdict(machine), plan=plan.to_json(), stages=stages, revisions=[])
    console.print(welcome(describe(machine), plan, seconds + sum(plan.seconds.values()), resumed=False))
    longer = longer_command(config, plan.enough_minutes or config.minutes)
    for said in warnings(plan, machine, config.minutes, longer):
        note(said)
    return machine


def longer_command(config: DemoConfig, minutes: float) -> str:
    """The same demo with more time, in a folder of its own, as a line for the shell."""
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "motley" else [sys.executable, "-m", "motley"]
    out = config.out.with_name(f"{config.out.name}-{minutes:g}-minutes")
    options = ["--out", str(out), "--minutes", f"{minutes:g}", "--seed", str(config.seed)]
    options += ["--level", config.level] if config.level != "auto" else []
    options += ["--data", *config.data] if config.data else []
    return shlex.join([*program, "demo", *options])


STAGES = [  # name, title, run folder of the stage
    ("data", "Data and tokenizer", None),
    ("problems", "Problems with thinking", None),
    ("pretrain", "Pretraining", "pretrain"),
    ("sft", "Fine-tuning", "sft"),
    ("eval", "Evaluation", None),
    ("export", "Export", None),
    ("report", "Report", None),
]


def _replanned(journey: Journey, stage: str, machine: Machine, console: Console) -> None:
    """Look at the plan again before a training stage begins; once begun, a stage keeps what it was given.

    What was promised stays the measure: the stages still to come are fitted into what is left of that.
    """
    if any(revision["before"] == stage for revision in journey.facts["revisions"]):
        return
    plan, stages = DemoPlan.from_json(journey.facts["plan"]), journey.facts["stages"]
    step = plan.step_seconds[1]
    with journey.clock(journey.stage(stage)):
        if stage == "sft":
            step = step_again(plan, machine, journey.stage("pretrain")["result"]["seconds"])
        spent = sum(one["seconds"] or one["spent"] for one in stages)
    promised = min(_times(stages)["predicted_seconds"], 60 * journey.facts["asked"]["minutes"])
    left = promised - spent
    new = replan(plan, stage, left, step, levels_of(machine.device, journey.facts["asked"]["level"]))
    revision = {"before": stage, "left_seconds": left, "step_seconds": step, "level": new.level,
                "pretrain_steps": new.pretrain.steps, "finetune_steps": new.finetune.steps}  # fmt: skip
    for one in stages:
        if one["seconds"] is None:
            one["planned_seconds"] = new.seconds[one["name"]]
    if (new.families, new.problems) != (plan.families, plan.problems):
        journey.stage("problems")["seconds"] = None  # others are needed, or more
    journey.save(plan=new.to_json(), revisions=[*journey.facts["revisions"], revision])
    if (said := replanned(plan, new, stage, left)) is not None:
        console.print(said)


@dataclass
class Stages:
    """What each stage does, by its name; the plan is read from the journey, since it may have been made again."""

    journey: Journey
    config: DemoConfig
    machine: Machine

    @property
    def plan(self) -> DemoPlan:
        return DemoPlan.from_json(self.journey.facts["plan"])

    @property
    def conversations(self) -> Path:
        return self.config.out / "problems.jsonl"

    @property
    def exported(self) -> Path:
        return self.config.out / "export"

    def data(self) -> dict[str, Any]:
        config, plan = self.config, self.plan
        settings = DataConfig(
            data=config.data, vocab_size=plan.vocab_size, seed=config.seed, max_bytes=plan.text_bytes
        )  # fmt: skip
        source = ", ".join(config.data) or "the Python standard library"
        note(f"reading up to {plan.text_bytes / 1e6:.0f} MB of {source}; `motley data` reads all of it")
        prepared = prepare(settings, config.out / "data")
        return {"summary": prepared.summary(), **read_json(config.out / "data" / "data.json")}

    def problems(self) -> dict[str, Any]:
        plan = self.plan
        made = make_problems(plan.families, plan.problems, self.config.seed)
        return {"written": write_jsonl(made, self.conversations), "families": list(plan.families)}

    def pretrain(self) -> dict[str, Any]:
        out = self.config.out
        settings = dataclasses.replace(self.plan.pretrain, out=out / "pretrain", data=(str(out / "data"),))
        return pretrain(settings, self.machine) or {}

    def sft(self) -> dict[str, Any]:
        out = self.config.out
        settings = dataclasses.replace(
            self.plan.finetune, out=out / "sft", model=out / "pretrain", data=(str(self.conversations),)
        )
        return sft(settings, self.machine) or {}

    def eval(self) -> dict[str, Any]:
        out, plan = self.config.out, self.plan
        return evaluate(EvalConfig(
            model=out / "sft", data=out / "data", text_model=out / "pretrain", families=plan.families,
            count=plan.evaluated, seen=(self.conversations,), seed=self.config.seed,
        ))  # fmt: skip

    def export(self) -> dict[str, Any]:
        result = export(ExportConfig(self.config.out / "sft", self.exported))
        told = about(self.journey.stage("eval")["result"], self.plan, self.config.data)
        write_json(self.exported / "about.json", told)
        return result

    def report(self) -> dict[str, Any]:
        out, journey, plan = self.config.out, self.journey, self.plan
        shape = plan.shape(read_json(self.exported / "config.json")["vocab_size"])
        journey.save(
            model={"name": plan.size, "config": shape.to_hf(), "parameters": parameters(shape),
                   "active_parameters": active_parameters(shape),
                   "kv_bytes_per_token": kv_cache_bytes_per_token(shape)},
            data=journey.stage("data")["result"], results=journey.stage("eval")["result"],
            skill=skill(plan),
        )  # fmt: skip
        return {"report": str(write_report(out, out / "report.html"))}

    def run(self, console: Console) -> dict[str, Any]:
        """All of them in turn; what the journey amounts to."""
        results, out = {}, self.config.out
        for name, _, folder in STAGES:
            if folder is not None and self.journey.stage(name)["seconds"] is None:
                _replanned(self.journey, name, self.machine, console)
                if self.journey.stage("problems")["seconds"] is None:
                    self.journey.run("problems", self.problems, console)
            results[name] = self.journey.run(name, getattr(self, name), console)
        write_report(out, out / "report.html")  # once more, now that the report's own time is known
        return {**results["eval"], **_times(self.journey.facts["stages"]), "out": str(out),
                "model": str(self.exported), "report": str(out / "report.html")}  # fmt: skip


def _times(stages: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "predicted_seconds": sum(stage["predicted_seconds"] for stage in stages),
        "seconds": sum(stage["seconds"] or 0.0 for stage in stages),
    }


def serve_model(config: DemoConfig) -> None:
    """Serve what the journey made, if that is asked for, until it is stopped."""
    from motley.serve.app import ServeConfig, serve

    if config.serve:
        Console(stderr=True).print("The same command starts the server again at once.")
        serve(ServeConfig(model=config.out / "export", port=config.port), other_ports=20)


def summary(result: dict[str, Any]) -> str:
    """What standard output keeps; the rest was shown on the way."""
    return f"report {result['report']}   model {result['model']}"
