"""How far the planner's predictions are from published measurements.

    python benchmarks/plan_accuracy.py --vtrain vtrain_single_node_a100.csv

Two tables. vTrain's single-node rows: the framework `megatron` is fitted anew to a random 70 % of them and judged by
the other 30 %, for several draws of the split; the shipped constants are judged by the rows they were not fitted to,
and once without the corrections at measured sizes, and with all rows of one hidden size left out. Then every row of
`calibration.csv` and of `chips.csv` (one small model on seven chips) under the shipped constants, misses included;
`held` rows were fitted to nothing.

--quick ends within 50 seconds: one split of every fifth row, and the tables under the shipped constants.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from budget import QUICK_SECONDS, Budget, kept
from fit_frameworks import HERE, errors, fit_megatron, megatron_paper, split, under, unfitted

from motley.plan.cost_model.framework import Framework, load_framework
from motley.plan.validation.accuracy import Case, evaluate_cases, predict, rank_correlation, read_cases

SEEDS = 5
QUICK_SHARE = 5  # one row of so many


def judged(cases: list[Case], framework: Framework) -> dict[str, float]:
    """Mean, worst-decile and worst error of `cases`, and the rank correlation within each model, averaged by rows."""
    own = under(cases, framework)
    off = np.sort(np.abs(errors(own)))
    predicted = predict(own)
    models: dict[str, list[int]] = {}
    for index, case in enumerate(own):
        models.setdefault(case.model, []).append(index)
    ranks = [
        (rank_correlation([predicted[i] for i in rows], [own[i].measured_seconds or 0.0 for i in rows]), len(rows))
        for rows in models.values()
    ]
    known = [(rank, count) for rank, count in ranks if rank is not None]
    return {
        "rows": len(off),
        "mean_relative_error": float(off.mean()),
        "worst_decile_relative_error": float(off[-max(1, len(off) // 10) :].mean()),
        "worst_relative_error": float(off[-1]),
        "rank_correlation": sum(rank * count for rank, count in known) / sum(count for _, count in known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vtrain", type=Path, required=True, help="vTrain's single_node CSV (MIT)")
    parser.add_argument("--quick", action="store_true", help="one split instead of five")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with kept(Budget(QUICK_SECONDS if arguments.quick else None), "plan_accuracy"):
        result = found(arguments)
    print(json.dumps(result) if arguments.json else told(result))


def found(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both tables."""
    vtrain = read_cases(arguments.vtrain, unfitted)
    if arguments.quick:
        vtrain = vtrain[::QUICK_SHARE]
    paper = megatron_paper()
    draws = []
    for seed in range(1 if arguments.quick else SEEDS):
        train, test = split(len(vtrain), seed)
        framework = fit_megatron([vtrain[i] for i in train], paper)
        draws.append({"seed": seed, **judged([vtrain[i] for i in test], framework)})
    held, framework = [vtrain[i] for i in split(len(vtrain))[1]], load_framework("megatron")
    others = {
        "shipped constants": judged(held, framework),
        "... without corrections": judged(held, replace(framework, measured=())),
    }
    for hidden in () if arguments.quick else sorted({case.shape.hidden_size for case in vtrain}):
        known = [case for case in vtrain if case.shape.hidden_size != hidden]
        unknown = [case for case in vtrain if case.shape.hidden_size == hidden]
        others[f"hidden {hidden} never seen"] = judged(unknown, fit_megatron(known, paper))
    table, chips = (evaluate_cases(HERE / name) for name in ("calibration.csv", "chips.csv"))
    return {"vtrain_refitted": draws, "vtrain_other": others, "calibration": table, "chips": chips}


def told(result: dict[str, Any]) -> str:
    draws, others = result["vtrain_refitted"], result["vtrain_other"]
    lines = ["vTrain, rows held out of the fit"]
    for name, draw in [*((f"seed {draw['seed']}", draw) for draw in draws), *others.items()]:
        lines.append(
            f"  {name:24} {draw['rows']:4} rows  mean {draw['mean_relative_error']:.2%}  "
            f"worst decile {draw['worst_decile_relative_error']:.2%}  worst {draw['worst_relative_error']:.1%}  "
            f"rank correlation {draw['rank_correlation']:.4f}"
        )
    lines.append(f"  median of the means {statistics.median(draw['mean_relative_error'] for draw in draws):.2%}")
    for name, rows in (("calibration.csv", result["calibration"]), ("chips.csv", result["chips"])):
        lines.append(name)
        for row in rows["rows"]:
            lines.append(
                f"  {row['relative_error']:+6.1%}  predicted {row['predicted_seconds']:8.3f} s, measured "
                f"{row['measured_seconds']:8.3f} s  {row['framework']:18} {row['model']:13} {row['gpus']:5} x "
                f"{row['chip']:15} {row['precision']}  {row['note'][:60]}"
            )
        lines.append(f"  mean {rows['mean_relative_error']:.2%}, worst {rows['worst_relative_error']:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
