"""`motley plan evaluate`: predict given layouts, and hold the predictions against measurements.

A case is a row of a CSV file. Columns as vTrain publishes its measurements (arXiv 2312.12391), in any order:

    # GPUs, global batch, micro batch, hidden size, attention heads, # layers, sequence length,
    tensor parallelism, data parallelism, pipeline parallelism, iteration time (ms)

and, where they matter: chip, model, vocabulary, recompute, precision, engine, expert parallelism, context parallelism,
virtual stages, schedule, zero, chips per node, network (Gb/s) (of a node), intermediate size, key-value heads, note.
"""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motley.errors import InputError
from motley.fleet.chips import find_chip
from motley.plan.engine import Engine, load_engine
from motley.plan.hardware import Hardware
from motley.plan.known import find_shape, known_shapes
from motley.plan.layout import RECOMPUTES, SCHEDULES, Floats, Layouts
from motley.plan.shape import Shape, gpt, llama
from motley.plan.step import step_seconds

DEFAULT_CHIP = "A100-80GB-SXM"
DEFAULT_ENGINE = "megatron"
NEWER_ENGINE = "megatron-core"  # of chips with fp8, which came after that Megatron
VOCABULARY = {"gpt": 50304, "llama": 32000}  # GPT-2's, padded as Megatron does; Llama's
GIGABIT = 1e9 / 8
NAMES = {
    "gpus": "gpus",
    "chips": "gpus",
    "num gpus": "gpus",
    "global batch": "global_batch",
    "global batch size": "global_batch",
    "micro batch": "micro_batch",
    "micro batch size": "micro_batch",
    "hidden size": "hidden_size",
    "attention heads": "heads",
    "heads": "heads",
    "layers": "layers",
    "num layers": "layers",
    "sequence length": "seq_len",
    "seq len": "seq_len",
    "tensor parallelism": "tp",
    "tp": "tp",
    "data parallelism": "dp",
    "dp": "dp",
    "pipeline parallelism": "pp",
    "pp": "pp",
    "expert parallelism": "ep",
    "ep": "ep",
    "context parallelism": "cp",
    "cp": "cp",
    "iteration time": "measured",
    "measured": "measured",
    "chip": "chip",
    "gpu": "chip",
    "model": "model",
    "vocabulary": "vocabulary",
    "vocab": "vocabulary",
    "vocabulary size": "vocabulary",
    "vocab size": "vocabulary",
    "recompute": "recompute",
    "precision": "precision",
    "engine": "engine",
    "virtual stages": "chunks",
    "schedule": "schedule",
    "zero": "zero",
    "chips per node": "chips_per_node",
    "network": "network",
    "intermediate size": "intermediate_size",
    "key-value heads": "kv_heads",
    "kv heads": "kv_heads",
    "note": "note",
    "source": "source",
    "use": "use",
}
WHOLE = (
    "gpus",
    "global_batch",
    "micro_batch",
    "hidden_size",
    "heads",
    "layers",
    "seq_len",
    "tp",
    "dp",
    "pp",
    "ep",
    "cp",
    "vocabulary",
    "chunks",
    "chips_per_node",
    "intermediate_size",
    "kv_heads",
)
SHAPED = ("hidden_size", "heads", "layers")
RECOMPUTE_WORDS = {
    "": None,
    "none": "none",
    "no": "none",
    "0": "none",
    "false": "none",
    "selective": "selective",
    "full": "full",
    "yes": "full",
    "1": "full",
    "true": "full",
    "all": "full",
}
PRECISION_WORDS = {
    "": None,
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp8": "fp8",
    "fp32": "fp32",
    "float32": "fp32",
}
SCHEDULE_WORDS = {
    "": None,
    "1f1b": "1f1b",
    "interleaved": "1f1b",  # how often, `virtual stages` says
    "zero_bubble": "zero_bubble",
    "dualpipe": "dualpipe",
}
SECONDS_IN = {"s": 1.0, "ms": 1e-3, "": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Case:
    """One layout to predict; `measured_seconds` is None where nothing was measured."""

    line: int
    model: str
    shape: Shape
    chip: str
    engine: Engine
    precision: str
    hardware: Hardware
    seq_len: int
    gpus: int
    layout: Mapping[str, int]
    measured_seconds: float | None
    note: str


def read_cases(path: Path, load: Callable[[str], Engine] = load_engine) -> list[Case]:
    """`load` finds an engine by name. Raises InputError naming file, line and column of what cannot be used."""
    columns, scale, _, rows = _read_table(path)
    cases = []
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) != len(columns):
            raise InputError(f"{where}: {len(row)} cells under {len(columns)} column names")
        values = {name: cell.strip() for name, cell in zip(columns, row, strict=True) if name}
        cases.append(_case(values, number, where, path.parent, scale, load))
    return cases


def predict(cases: Sequence[Case]) -> Floats:
    """Seconds of one step of each case; equal shapes on equal chips are costed together."""
    result = np.zeros(len(cases))
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        key = (
            case.shape,
            case.chip,
            case.hardware.network,
            case.hardware.chips_per_node,
            id(case.engine),
            case.precision,
            case.seq_len,
            case.layout["pp"],
        )
        groups[key].append(index)
    for indices in groups.values():
        first = cases[indices[0]]
        names = first.layout.keys()
        layouts = Layouts.of(**{name: np.array([cases[i].layout[name] for i in indices]) for name in names})
        step = step_seconds(first.shape, layouts, first.seq_len, first.hardware, first.engine, first.precision)
        result[indices] = step.total
    return result


def evaluate_cases(path: Path) -> dict[str, Any]:
    """Predictions for every row, and, where measurements are given, how far off they are."""
    cases = read_cases(path)
    seconds = predict(cases)
    rows = []
    for case, predicted in zip(cases, seconds, strict=True):
        row: dict[str, Any] = {
            "line": case.line,
            "model": case.model,
            "chip": case.chip,
            "engine": case.engine.name,
            "precision": case.precision,
            "gpus": case.gpus,
            "predicted_seconds": float(predicted),
            "tokens_per_second": case.layout["micro_batch"]
            * case.layout["micro_batches"]
            * case.layout["dp"]
            * case.seq_len
            / float(predicted),
        }
        if case.measured_seconds is not None:
            row["measured_seconds"] = case.measured_seconds
            row["relative_error"] = float(predicted) / case.measured_seconds - 1
        if case.note:
            row["note"] = case.note
        rows.append(row)
    return {"cases": str(path), "ignored_columns": _read_table(path)[2], **accuracy(rows), "rows": rows}


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and worst relative error over all measured rows, and Spearman's rank correlation (per model, and over all).

    The overall correlation is the mean of the models' own, weighted by their rows: whether the planner orders the
    layouts of one model rightly is what a search depends on.
    """
    measured = [row for row in rows if "measured_seconds" in row]
    if not measured:
        return {"measured_rows": 0}
    errors = np.sort([abs(row["relative_error"]) for row in measured])
    tail = errors[-max(1, len(errors) // 10) :]
    models: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in measured:
        models[row["model"]].append(row)
    per_model = {}
    for model, own in models.items():
        own_errors = np.array([abs(row["relative_error"]) for row in own])
        correlation = rank_correlation(
            [row["predicted_seconds"] for row in own], [row["measured_seconds"] for row in own]
        )
        per_model[model] = {
            "rows": len(own),
            "mean_relative_error": float(own_errors.mean()),
            "worst_relative_error": float(own_errors.max()),
            "rank_correlation": correlation,
        }
    ranked = [(entry["rank_correlation"], entry["rows"]) for entry in per_model.values()]
    ranked = [(value, count) for value, count in ranked if value is not None]
    overall = sum(value * count for value, count in ranked) / sum(c for _, c in ranked) if ranked else None
    return {
        "measured_rows": len(measured),
        "mean_relative_error": float(errors.mean()),
        "worst_relative_error": float(errors[-1]),
        "worst_decile_relative_error": float(tail.mean()),
        "rank_correlation": overall,
        "models": per_model,
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank. None for fewer than 3 or no spread."""
    if len(first) < 3:
        return None
    a, b = _ranks(np.asarray(first)), _ranks(np.asarray(second))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


# --------------------------------------------------------------------------------------------- reading


def _read_table(path: Path) -> tuple[list[str], dict[str, float], list[str], list[tuple[int, list[str]]]]:
    """(field of each column, scales, columns not used, rows with their line numbers)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    lines = enumerate(csv.reader(io.StringIO(text)), start=1)
    rows = [(number, row) for number, row in lines if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise InputError(f"{path} holds no cases: it needs a line of column names and a line for each layout")
    columns, scale, ignored = _columns(path, rows[0][1])
    return columns, scale, ignored, rows[1:]


def _columns(path: Path, header: Sequence[str]) -> tuple[list[str], dict[str, float], list[str]]:
    """Field of each column ("" for those not used), the scale of columns with a unit, names of unknown columns."""
    columns: list[str] = []
    ignored: list[str] = []
    scale: dict[str, float] = {}
    for cell in header:
        plain = cell.strip().lower().replace("_", " ").lstrip("# ").strip()
        unit = match.group(1).strip() if (match := re.search(r"\(([^)]*)\)", plain)) else ""
        plain = re.sub(r"\s*\([^)]*\)", "", plain).strip()
        if not plain:
            columns.append("")
            continue
        if plain not in NAMES:
            columns.append("")
            ignored.append(cell.strip())
            continue
        name = NAMES[plain]
        if name in columns:
            raise InputError(f"{path}, line 1: two columns mean {name!r}")
        if name == "measured":
            if unit not in SECONDS_IN:
                raise InputError(f"{path}, line 1: iteration time in {unit!r}; write (ms) or (s)")
            scale["measured"] = SECONDS_IN[unit]
        if name == "network" and unit not in ("", "gb/s"):
            raise InputError(f"{path}, line 1: network in {unit!r}; write (Gb/s), gigabits per second of a node")
        columns.append(name)
    missing = [name for name in ("gpus", "global_batch", "micro_batch") if name not in columns]
    if missing:
        raise InputError(f"{path}, line 1: lacks the columns {', '.join(missing)}")
    return columns, scale, ignored


def _case(
    values: Mapping[str, str],
    line: int,
    where: str,
    base: Path,
    scale: Mapping[str, float],
    load: Callable[[str], Engine],
) -> Case:
    numbers = {name: _whole(values[name], name, where) for name in WHOLE if values.get(name)}
    try:
        shape = _shape(values, numbers, base)
        chip = find_chip(values.get("chip") or DEFAULT_CHIP)
        engine = load((values.get("engine") or (NEWER_ENGINE if "fp8" in chip.flops else DEFAULT_ENGINE)).lower())
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    tp, pp, cp, ep = (numbers.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
    gpus, micro = _given(numbers, "gpus", where), _given(numbers, "micro_batch", where)
    batch = _given(numbers, "global_batch", where)
    dp = numbers.get("dp", max(1, gpus // (tp * pp * cp)))
    if tp * pp * cp * dp != gpus:
        raise InputError(
            f"{where}: tensor {tp} x pipeline {pp} x context {cp} x data {dp} is {tp * pp * cp * dp}, "
            f"not the {gpus} chips of the row"
        )
    if batch % (dp * micro):
        raise InputError(
            f"{where}: a global batch of {batch} cannot be cut into {dp} equal shares of micro-batches of {micro}"
        )
    if shape.blocks[0].heads % tp:
        raise InputError(f"{where}: {shape.blocks[0].heads} attention heads cannot be cut {tp} ways")
    if pp > shape.num_layers:
        raise InputError(f"{where}: {pp} pipeline stages for {shape.num_layers} layers")
    if ep > 1 and (not shape.experts or shape.experts % ep or (dp * cp) % ep):
        raise InputError(f"{where}: expert parallelism {ep} needs experts and data-parallel ranks that it divides")
    precision = _word(values.get("precision", ""), PRECISION_WORDS, "precision", where) or chip.best_precision()
    if precision not in chip.flops or precision not in engine.matmul_efficiency:
        raise InputError(
            f"{where}: {chip.name} under {engine.name} does not compute in {precision}; "
            f"possible: {', '.join(p for p in chip.flops if p in engine.matmul_efficiency)}"
        )
    recompute = _word(values.get("recompute", ""), RECOMPUTE_WORDS, "recompute", where) or engine.recompute
    schedule = _word(values.get("schedule", ""), SCHEDULE_WORDS, "schedule", where) or SCHEDULES[0]
    network = _positive(values["network"], "network", where) * GIGABIT if values.get("network") else None
    hardware = Hardware.of_chip(chip, numbers.get("chips_per_node"), network)
    measured = _positive(values["measured"], "iteration time", where) if values.get("measured") else None
    layout = {
        "tp": tp,
        "cp": cp,
        "ep": ep,
        "dp": dp,
        "pp": pp,
        "micro_batch": micro,
        "micro_batches": batch // (dp * micro),
        "recompute": RECOMPUTES.index(recompute),
        "schedule": SCHEDULES.index(schedule),
        "chunks": numbers.get("chunks", 1),
        "zero": _zero(values.get("zero"), engine, where),
    }
    return Case(
        line=line,
        model=values.get("model") or f"{shape.family} h{shape.hidden_size} L{shape.num_layers}",
        shape=shape,
        chip=chip.name,
        engine=engine,
        precision=precision,
        hardware=hardware,
        seq_len=numbers.get("seq_len", min(shape.max_context, 4096)),
        gpus=gpus,
        layout=layout,
        measured_seconds=None if measured is None else measured * scale["measured"],
        note=values.get("note", ""),
    )


def _shape(values: Mapping[str, str], numbers: Mapping[str, int], base: Path) -> Shape:
    """From `model` where it names a known shape or a file; else from the columns, in the family `model` hints at."""
    model = values.get("model", "")
    named = model and (model.lower() in known_shapes() or (base / model).exists())
    if named:
        shape = find_shape(model, base)
        given = {"hidden_size": shape.hidden_size, "layers": shape.num_layers, "heads": shape.blocks[0].heads}
        wrong = [name for name in SHAPED if numbers.get(name, given[name]) != given[name]]
        if wrong:
            raise InputError(f"{wrong[0]} is {numbers[wrong[0]]}, but {model} has {given[wrong[0]]}")
        return shape
    missing = [name for name in SHAPED if name not in numbers]
    if missing:
        raise InputError(f"model {model!r} is no known shape or config.json, so the row needs {', '.join(missing)}")
    hidden, heads, layers = (numbers[name] for name in SHAPED)
    seq = numbers.get("seq_len", 2048)
    if re.search(r"llama|mistral|qwen|vicuna", model.lower()):
        rule = 256 * math.ceil(8 * hidden / 3 / 256)
        return llama(
            hidden,
            layers,
            heads,
            numbers.get("kv_heads", heads),
            numbers.get("intermediate_size", rule),
            seq,
            numbers.get("vocabulary", VOCABULARY["llama"]),
            model,
            "",
        )
    return gpt(
        hidden,
        layers,
        heads,
        seq,
        numbers.get("vocabulary", VOCABULARY["gpt"]),
        model or "gpt",
        "",
        ffn=numbers.get("intermediate_size"),
    )


def _zero(text: str | None, engine: Engine, where: str) -> int:
    if not text:
        return engine.zero
    if text not in ("0", "1", "2", "3"):
        raise InputError(f"{where}: zero is {text!r}; write 0, 1, 2 or 3")
    return int(text)


def _given(numbers: Mapping[str, int], name: str, where: str) -> int:
    if name not in numbers:
        raise InputError(f"{where}: {name.replace('_', ' ')} is empty")
    return numbers[name]


def _word(text: str, words: Mapping[str, str | None], name: str, where: str) -> str | None:
    if text.lower() not in words:
        raise InputError(f"{where}: {name} is {text!r}; write one of {', '.join(word for word in words if word)}")
    return words[text.lower()]


def _whole(text: str, name: str, where: str) -> int:
    value = _positive(text, name, where)
    if value != int(value):
        raise InputError(f"{where}: {name.replace('_', ' ')} is {text}; it must be a whole number")
    return int(value)


def _positive(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where}: {name.replace('_', ' ')} is {text!r}, which is no number") from None
    if not 0 < value < math.inf:
        raise InputError(f"{where}: {name.replace('_', ' ')} is {text}; it must be above 0")
    return value
