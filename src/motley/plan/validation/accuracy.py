"""`motley plan evaluate`: predict given layouts, and hold the predictions against measurements.

The rows are read by `cases.py`. A row that cannot be predicted says why and is left out of the summary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from motley.errors import InputError
from motley.plan.cost_model.configs import Floats, ParallelConfigs
from motley.plan.cost_model.memory import fullest_bytes
from motley.plan.cost_model.step_time import step_seconds
from motley.plan.validation.cases import Case, RefusedRow, read_cases, read_rows

__all__ = ["Case", "accuracy", "evaluate_cases", "memory_of", "predict", "rank_correlation", "read_cases"]


def predict(cases: Sequence[Case]) -> Floats:
    """Seconds of one step of each case; equal shapes on equal chips are costed together."""
    result = np.zeros(len(cases))
    for indices, configs in _alike(cases):
        first = cases[indices[0]]
        step = step_seconds(first.shape, configs, first.seq_len, first.hardware, first.framework, first.precision)
        result[indices] = step.total
    return result


def memory_of(cases: Sequence[Case]) -> Floats:
    """Bytes on the fullest chip of each case."""
    result = np.zeros(len(cases))
    for indices, configs in _alike(cases):
        first = cases[indices[0]]
        result[indices] = fullest_bytes(
            first.shape, configs, first.seq_len, first.hardware, first.framework, first.precision
        )
    return result


def _alike(cases: Sequence[Case]) -> Iterator[tuple[list[int], ParallelConfigs]]:
    """(indices, layouts) of cases that differ in nothing but their layout, all of one pipeline depth."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        place = (case.chip, case.hardware.network, case.hardware.chips_per_node)
        groups[case.shape, place, id(case.framework), case.precision, case.seq_len, case.layout["pp"]].append(index)
    for indices in groups.values():
        names = cases[indices[0]].layout.keys()
        yield (
            indices,
            ParallelConfigs.of(**{name: np.array([cases[i].layout[name] for i in indices]) for name in names}),
        )


def evaluate_cases(path: Path) -> dict[str, Any]:
    """Predictions for every row, and, where measurements are given, how far off they are.

    Raises InputError where the file cannot be used, or no row of it can be predicted (naming what is wrong with the
    first). Times without a unit are seconds or milliseconds, whichever is nearer to the predictions.
    """
    read = read_rows(path)
    cases = [row for row in read.rows if isinstance(row, Case)]
    refused = [row for row in read.rows if isinstance(row, RefusedRow)]
    if not cases:
        raise InputError(refused[0].error + (f" (and {len(refused) - 1:,} rows more)" if len(refused) > 1 else ""))
    seconds, memory = predict(cases), memory_of(cases)
    notes = []
    if read.ignored_columns:
        notes.append(f"columns not used: {', '.join(read.ignored_columns)}")
    if not read.unit_given and any(case.measured_seconds for case in cases):
        cases, unit = _with_unit(cases, seconds)
        notes.append(f"the measured times name no unit: taken as {unit}")
    rows = [_row(case, float(own), float(held)) for case, own, held in zip(cases, seconds, memory, strict=True)]
    rows += [{**vars(row), "predicted_seconds": None} for row in refused]
    if refused:
        notes.append(f"{len(refused):,} of {len(rows):,} rows could not be predicted: the first, {refused[0].error}")
    return {
        "cases": str(path),
        "ignored_columns": list(read.ignored_columns),
        "notes": notes,
        "rows_not_predicted": len(refused),
        **accuracy(rows),
        "rows": sorted(rows, key=lambda row: row["line"]),
    }


def _row(case: Case, predicted: float, memory: float) -> dict[str, Any]:
    """One predicted row of the result."""
    batch = case.layout["micro_batch"] * case.layout["micro_batches"] * case.layout["dp"]
    row: dict[str, Any] = {
        "line": case.line,
        "model": case.model,
        "chip": case.chip,
        "framework": case.framework.name,
        "precision": case.precision,
        "gpus": case.gpus,
        "predicted_seconds": predicted,
        "tokens_per_second": batch * case.seq_len / predicted,
        "memory_bytes": memory,
        "fits": memory <= case.hardware.memory_bytes,
    }
    if case.measured_seconds is not None:
        row["measured_seconds"] = case.measured_seconds
        row["relative_error"] = predicted / case.measured_seconds - 1
    if case.note:
        row["note"] = case.note
    return row


def _with_unit(cases: Sequence[Case], predicted: Floats) -> tuple[list[Case], str]:
    """Measured times as seconds, or as milliseconds if that brings their median nearer to the predictions."""
    ratios = [case.measured_seconds / own for case, own in zip(cases, predicted, strict=True) if case.measured_seconds]
    if float(np.median(ratios)) < math.sqrt(1000):
        return list(cases), "seconds"
    return [
        replace(case, measured_seconds=case.measured_seconds and 1e-3 * case.measured_seconds) for case in cases
    ], "milliseconds"


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and worst relative error over all measured rows, and Spearman's rank correlation (per model, and over all).

    The overall correlation is the mean of the models' own, weighted by their rows: whether the planner orders the
    layouts of one model rightly is what a search depends on. Where no model has three rows it is that of all rows.
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
    if ranked:
        overall = sum(value * count for value, count in ranked) / sum(count for _, count in ranked)
    else:
        overall = rank_correlation(
            [row["predicted_seconds"] for row in measured], [row["measured_seconds"] for row in measured]
        )
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
