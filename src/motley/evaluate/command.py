"""`motley eval` and `motley report`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from motley.data.conversation import ConversationEncoder
from motley.data.shards import TEXT
from motley.data.tasks import FAMILIES, fresh_problems, seen_questions
from motley.errors import InputError
from motley.evaluate.problems import evaluate_problems
from motley.evaluate.report import write_report
from motley.evaluate.text import bits_per_byte
from motley.files import write_json
from motley.fleet.device import choose_device
from motley.infer.load import open_engine
from motley.model import load
from motley.model.find import find_model
from motley.train.input_checks import check_data
from motley.train.run_folder import trained_within_documents


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model: bits per byte on held-out text, exact answers on fresh problems."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run or a checkpoint folder."""
    data: Path | None = None
    """A folder made by `motley data`; its held-out part is the text. None: no text is measured."""
    text_model: Path | None = None
    """The run whose model reads the text, if it is another one (before fine-tuning, say)."""
    confine_to_document: bool | None = None
    """Whether attention stays within each document while text is measured. None: as the run of the model trained, and
    across documents where its folder belongs to no run."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """Families of problems; none: no problems."""
    count: int = 500
    """Problems drawn."""
    max_tokens: int = 200
    """Longest answer, thinking included."""
    seen: tuple[Path, ...] = ()
    """Files of conversations the model was trained on: problems that occur there are not asked."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """File for the result, besides printing it."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run the requested measurements; the result has no entries for others."""
    if config.count < 1:
        raise InputError(f"--count is {config.count}; it must be at least 1")
    result: dict[str, Any] = {"model": str(config.model)}
    if config.data is not None:
        reader = find_model(config.text_model or config.model)
        check_data(config.data, TEXT, reader)
        confined = config.confine_to_document
        if confined is None:
            confined = bool(trained_within_documents(reader))
        model = load(reader, device=choose_device(config.device))
        result["text"] = {"model": str(reader), **bits_per_byte(model, config.data, confined=confined)}
    if config.families:
        engine = open_engine(config.model, config.device)
        seen = seen_questions(config.seen)
        problems = list(fresh_problems(config.families, config.count, config.seed, seen))
        report = evaluate_problems(engine, ConversationEncoder(engine.tokenizer), problems, config.max_tokens)
        result["problems"] = asdict(report)
    if config.out is not None:
        write_json(config.out, result)
    return result


def summary(result: dict[str, Any]) -> str:
    lines = []
    if text := result.get("text"):
        lines.append(
            f"text      {text['bits_per_byte']:.3f} bits per byte over {text['bytes']:,} bytes, "
            f"attention {text['attention']}"
        )
    if problems := result.get("problems"):
        rows = [("all problems", problems), *problems["families"].items()]
        lines += [
            f"{name:<18} {row['accuracy']:6.1%} ± {row['standard_error']:.1%}  of {row['count']}" for name, row in rows
        ]
    return "\n".join(lines) or "nothing to measure: give --data, --families or both"


@dataclass(frozen=True)
class ReportConfig:
    """Draw a run, or a whole journey, as one self-contained page."""

    run: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    """File to write; by default report.html in the run's folder."""


def report(config: ReportConfig) -> dict[str, Any]:
    return {"report": str(write_report(config.run, config.out or config.run / "report.html"))}


def report_summary(result: dict[str, Any]) -> str:
    return result["report"]
