"""`motley demo`: every stage of the journey on this machine, in minutes, ending at a page to talk to the model.

    probe → plan → data → problems → pretrain → sft → eval → export → report → serve
                                                      (each complete stage is remembered in journey.json)

The plan is made from a few real steps of the very model that will be trained, so that the time it promises can be
held against the time it took; both are shown at the end.
"""

import dataclasses
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from motley.data.pack import DataConfig, prepare
from motley.data.sources import list_files
from motley.data.tasks import FAMILIES, make_problems, write_jsonl
from motley.errors import InputError
from motley.evaluate.command import EvalConfig, evaluate
from motley.evaluate.export import ExportConfig, export
from motley.evaluate.report import write_report
from motley.files import read_json, write_json
from motley.fleet.probe import Machine, describe, probe
from motley.journey.about import about
from motley.journey.plan import DemoPlan, make_plan
from motley.journey.show import outcome, stage_line, times_table, welcome
from motley.plan.cost import active_parameters, kv_cache_bytes_per_token, parameters
from motley.progress import note
from motley.train.finetune import finetune
from motley.train.pretrain import pretrain
from motley.train.run import claimed

JOURNEY_FILE = "journey.json"
TEXT_BYTES = 32_000_000  # of one's own text; the standard library is not larger, and minutes of training need less


@dataclass(frozen=True)
class DemoConfig:
    """Train a small model on this machine and talk to it."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes; the same command goes on where it stopped."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|hf:NAME")] = ()
    """Your own text instead of the Python standard library: files, folders, or a dataset of the Hugging Face hub; up to
    32 MB of it are read."""
    minutes: float = 7.5
    """Time for the whole journey, serving apart; the plan fits into it."""
    serve: bool = True
    """Start the server at the end; not with --json, nor from Python."""
    port: int = 8321
    """Of the server; if it is taken, one of the next is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise InputError(f"--minutes is {self.minutes}; it must be above 0")


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
        with self._clock(stage):
            result = work()
        self.save()
        stage["result"] = result
        # A resumed training stage knows its whole time; the clock saw only this process.
        stage["seconds"] = max(stage["spent"], result.get("seconds", 0.0))
        self.save()
        return result

    @contextmanager
    def _clock(self, stage: dict[str, Any]):
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
    asked = {"data": list(config.data), "minutes": config.minutes, "seed": config.seed}
    with claimed(config.out):
        journey = Journey(config.out, asked)
        machine, plan = _planned(journey, config, console)
        facts = _stages(journey, config, machine, plan, console)
    console.print(times_table(journey.facts["stages"]))
    console.print(outcome(facts))
    return facts


def _planned(journey: Journey, config: DemoConfig, console: Console) -> tuple[Machine, DemoPlan]:
    """Measure and plan once; a resumed demo keeps its plan, or training would not be the same."""
    if "plan" in journey.facts:
        machine, plan = Machine.from_dict(journey.facts["machine"]), DemoPlan.from_json(journey.facts["plan"])
        seconds = _times(journey.facts["stages"])["predicted_seconds"]
        console.print(welcome(describe(machine), plan, seconds, resumed=True))
        return machine, plan
    started = time.monotonic()
    with console.status("measuring this machine"):
        machine = probe()
        plan = make_plan(machine, config.minutes, config.seed, time.monotonic() - started)
    seconds = time.monotonic() - started
    stages = [{"name": "probe", "title": "Measure and plan", "predicted_seconds": seconds, "seconds": seconds,
               "spent": seconds, "folder": None, "result": {}}]  # fmt: skip
    stages += [{"name": name, "title": title, "predicted_seconds": plan.seconds[name], "seconds": None, "spent": 0.0,
                "folder": folder, "result": None} for name, title, folder in STAGES]  # fmt: skip
    journey.save(machine=asdict(machine), plan=plan.to_json(), stages=stages)
    console.print(welcome(describe(machine), plan, seconds + sum(plan.seconds.values()), resumed=False))
    return machine, plan


STAGES = [  # name, title, run folder of the stage
    ("data", "Data and tokenizer", None),
    ("problems", "Problems with thinking", None),
    ("pretrain", "Pretraining", "pretrain"),
    ("sft", "Fine-tuning", "sft"),
    ("eval", "Evaluation", None),
    ("export", "Export", None),
    ("report", "Report", None),
]


def _stages(journey: Journey, config: DemoConfig, machine: Machine, plan: DemoPlan, console: Console) -> dict[str, Any]:
    out, exported = config.out, config.out / "export"
    conversations = out / "problems.jsonl"

    def data() -> dict[str, Any]:
        settings = DataConfig(
            data=config.data,
            vocab_size=plan.vocab_size,
            seed=config.seed,
            max_bytes=TEXT_BYTES if config.data else None,
        )
        if config.data:
            note(f"reading up to {TEXT_BYTES / 1e6:.0f} MB of {', '.join(config.data)}; `motley data` reads all of it")
        prepared = prepare(settings, out / "data")
        return {"summary": prepared.summary(), **read_json(out / "data" / "data.json")}

    def problems() -> dict[str, Any]:
        made = make_problems(tuple(FAMILIES), plan.problems, config.seed)
        return {"written": write_jsonl(made, conversations)}

    def pretraining() -> dict[str, Any]:
        return (
            pretrain(dataclasses.replace(plan.pretrain, out=out / "pretrain", data=(str(out / "data"),)), machine) or {}
        )

    def finetuning() -> dict[str, Any]:
        settings = dataclasses.replace(
            plan.finetune, out=out / "sft", model=out / "pretrain", data=(str(conversations),)
        )
        return finetune(settings, machine) or {}

    def evaluation() -> dict[str, Any]:
        return evaluate(EvalConfig(
            model=out / "sft", data=out / "data", text_model=out / "pretrain", count=plan.evaluated,
            seen=(conversations,), seed=config.seed,
        ))  # fmt: skip

    def exporting() -> dict[str, Any]:
        result = export(ExportConfig(out / "sft", exported))
        write_json(exported / "about.json", about(journey.stage("eval")["result"], plan, config.data))
        return result

    def reporting() -> dict[str, Any]:
        shape = plan.shape(read_json(exported / "config.json")["vocab_size"])
        journey.save(
            model={"name": plan.size, "config": shape.to_hf(), "parameters": parameters(shape),
                   "active_parameters": active_parameters(shape),
                   "kv_bytes_per_token": kv_cache_bytes_per_token(shape)},
            data=journey.stage("data")["result"], results=journey.stage("eval")["result"],
        )  # fmt: skip
        return {"report": str(write_report(out, out / "report.html"))}

    works = {"data": data, "problems": problems, "pretrain": pretraining, "sft": finetuning, "eval": evaluation,
             "export": exporting, "report": reporting}  # fmt: skip
    results = {name: journey.run(name, work, console) for name, work in works.items()}
    write_report(out, out / "report.html")  # once more, now that the report's own time is known
    return {**results["eval"], **_times(journey.facts["stages"]), "out": str(out), "model": str(exported),
            "report": str(out / "report.html")}  # fmt: skip


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
