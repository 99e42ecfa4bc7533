"""Plans, predictions and replays as text for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from motley.fleet.units import size_text
from motley.page import in_count
from motley.progress import in_words
from motley.tables import as_text

WIDTH = 130
BAR = 24
MOST_REFUSED = 20  # rows of a file that could not be predicted, told one by one
PARTS = ("compute", "communication", "bubble", "optimizer")


def plan_text(plan: Mapping[str, Any]) -> str:
    """The plan as tables: the whole, the pools, the pipeline groups, what it is compared with."""
    money = plan["currency"]
    facts = _table(
        f"{plan['model']} on {plan['fleet']}, {in_count(plan['tokens'])} tokens, framework {plan['framework']}"
    )
    step = plan["step_split_seconds"]
    split = ", ".join(f"{name} {step[name] / plan['step_seconds']:.0%}" for name in PARTS)
    facts.add_row("speed", f"{plan['tokens_per_second']:,.0f} tokens/s on {plan['chips']:,} chips")
    facts.add_row("step", f"{seconds_text(plan['step_seconds'])} for {plan['global_batch']:,} sequences: {split}")
    facts.add_row("time", f"{plan['days']:,.1f} days (goodput {plan['goodput']:.1%} with failures counted)")
    facts.add_row(
        "price", f"{money}{plan['cost']:,.0f}, {plan['chip_hours']:,.0f} chip-hours, {plan['energy_kwh']:,.0f} kWh"
    )
    pools = Table("pool", "chip", "chips", "precision", "MFU", "part of work", "memory of a chip", title_justify="left")
    for pool in plan["pools"]:
        if pool["chips"]:
            memory = f"{size_text(pool['memory_bytes'])} of {size_text(pool['memory_limit_bytes'])}"
            idle = f" (+{pool['chips_idle']:,} idle)" if pool["chips_idle"] else ""
            pools.add_row(
                pool["pool"],
                pool["chip"],
                f"{pool['chips']:,}{idle}",
                pool["precision"],
                f"{pool['mfu']:.1%}",
                f"{pool['flops_share']:.1%}",
                memory,
            )
        else:
            pools.add_row(pool["pool"], pool["chip"], f"0 (+{pool['chips_idle']:,} idle)", "", "", "", "")
    groups = Table(
        "group",
        "share",
        "replicas",
        "stages",
        "tensor",
        "expert",
        "context",
        "micro-batch",
        "recompute",
        "ZeRO",
        "schedule",
        "step",
        title_justify="left",
    )
    for group in plan["groups"]:
        tensor = ", ".join(str(value) for value in dict.fromkeys(group["tp"].values()))
        busy = sum(value for name, value in group["seconds"].items() if name != "waiting")
        groups.add_row(
            " → ".join(group["pools"]),
            f"{group['share']:.1%}",
            str(group["dp"]),
            stage_text(group["stages"]),
            tensor,
            str(group["ep"]),
            str(group["cp"]),
            f"{group['micro_batches']} x {group['micro_batch']}",
            group["recompute"],
            f"{group['zero']}, {group['states']}" if group["zero"] else "-",
            group["schedule"],
            seconds_text(busy),
        )
    parts: list[Table | str] = [facts, pools, groups, *comparison_lines(plan)]
    if plan.get("expected_loss"):
        parts.append(loss_text(plan["expected_loss"]))
    parts += [f"note: {note}" for note in plan["notes"]]
    if "plan_file" in plan:
        parts.append(
            f"Plan: {plan['plan_file']}; picture: {plan['page']}; replay: motley plan simulate {plan['plan_file']}"
        )
    return as_text(*parts, width=WIDTH)


def loss_text(expected: Mapping[str, Any]) -> str:
    """What loss the plan's tokens buy, and how far that is from anything measured."""
    beyond, about = expected["times_beyond"], expected["about"]
    if expected["nats_per_token"] is None:
        far = f"this is {beyond:,.0f} times the compute of the largest run that it would rest on"
        return f"expected loss: not said, {far} ({about})"
    far = f"{beyond:,.1f} times the compute of the largest run behind it" if beyond > 1 else "within the runs behind it"
    return (
        f"expected loss: {expected['nats_per_token']:.3f} nats a token, with twice the tokens "
        f"{expected['with_twice_the_tokens']:.3f} ({about}; {far})"
    )


def stage_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """`8: 4 4 4 3`: how many, and the layers of each (a range where there are many)."""
    layers = [stage["layers"][1] - stage["layers"][0] + 1 if stage["layers"] else 0 for stage in stages]
    if len(layers) == 1:
        return "1"
    if len(layers) <= 8:
        return f"{len(layers)}: {' '.join(map(str, layers))}"
    return f"{len(layers)}: {min(layers)} to {max(layers)}"


def comparison_lines(plan: Mapping[str, Any]) -> list[str]:
    """What the mix gains, and what each pool is worth."""
    compared, money = plan["comparison"], plan["currency"]
    lines = []
    if len(plan["pools"]) > 1:
        cannot = compared["pools_that_cannot_alone"]
        beside = f" ({', '.join(cannot)} cannot hold the model alone: the best share of the peak is assumed)"
        lines.append(
            f"mixed efficiency: {plan['mixed_efficiency']:.1%} of what the pools used reach alone, added up"
            f"{beside if cannot else ''}"
        )
        even = compared["even_split"]
        lines.append(
            "even split (every chip the same part): impossible, some pool cannot hold the model"
            if even is None
            else f"even split (every chip the same part): {even['relative_speed']:.0%} of this plan's speed"
        )
    if (fastest := compared["fastest_pool"]) and len(plan["pools"]) > 1:
        lines.append(
            f"fastest pool alone ({fastest['pool']}): {fastest['relative_speed']:.0%} of this plan's speed, "
            f"{money}{fastest['cost']:,.0f}"
        )
    lines += [f"drop {entry['pool']}: {worth_text(entry)}" for entry in compared["marginal_value"]]
    return lines


def worth_text(entry: Mapping[str, Any]) -> str:
    """What leaving a pool out does: `4 % slower, 11 % cheaper`."""
    if entry["needed"]:
        return "the model no longer fits"
    price = f"{abs(entry['cheaper']):.1%} {'cheaper' if entry['cheaper'] >= 0 else 'dearer'}"
    return f"{entry['slower']:.1%} slower, {price}"


def describe_text(result: Mapping[str, Any]) -> str:
    facts = _table(f"{result['model']}  ({result['source']})")
    facts.add_row(
        "parameters",
        f"{result['parameters'] / 1e9:,.2f} B, {result['active_parameters'] / 1e9:,.2f} B active for a token",
    )
    if result["mtp_parameters"]:
        facts.add_row("MTP modules", f"{result['mtp_parameters'] / 1e9:,.2f} B besides")
    facts.add_row(
        "training",
        f"{result['training_flops_per_token'] / 1e9:,.4g} GFLOP a token at {result['context_length']:,} tokens",
    )
    facts.add_row("KV cache", f"{result['kv_cache_bytes_per_token']:,} bytes a token (bf16)")
    facts.add_row("weights", f"{size_text(result['memory']['weights_bf16_bytes'])} in bf16")
    facts.add_row("training state", f"{size_text(result['memory']['training_state_bytes'])} (18 bytes a parameter)")
    rows = Table("part", "parameters", "active", "forward GFLOP a token", title_justify="left")
    for part in result["parts"]:
        rows.add_row(
            part["name"], f"{part['parameters']:,}", f"{part['active']:,}", f"{part['forward_flops'] / 1e9:,.4g}"
        )
    return as_text(facts, rows, width=WIDTH)


def evaluate_text(result: Mapping[str, Any]) -> str:
    """Every row (the worst forty of many), those that could not be predicted, then the summary."""
    predicted = [row for row in result["rows"] if "error" not in row]
    refused = [row for row in result["rows"] if "error" in row]
    shown = predicted
    if len(predicted) > 100:
        shown = sorted(predicted, key=lambda row: -abs(row.get("relative_error", 0.0)))[:40]
    table = Table(
        "line", "model", "chips", "chip", "framework", "memory", "predicted", "measured", "error", "note",
        title_justify="left",
    )  # fmt: skip
    for row in shown:
        table.add_row(
            str(row["line"]),
            row["model"],
            f"{row['gpus']:,}",
            row["chip"],
            row["framework"],
            f"{size_text(row['memory_bytes'])}{'' if row['fits'] else ' !'}",
            seconds_text(row["predicted_seconds"]),
            seconds_text(row["measured_seconds"]) if "measured_seconds" in row else "",
            f"{row['relative_error']:+.1%}" if "relative_error" in row else "",
            row.get("note", "")[:44],
        )
    parts: list[Table | str] = [table]
    if len(shown) < len(predicted):
        parts.append(f"the {len(shown)} rows of {len(predicted):,} that are furthest off; --json has all")
    if over := sum(not row["fits"] for row in predicted):
        parts.append(f"! estimated to need more memory than the chip has: {over:,} rows")
    parts += [f"not predicted: {row['error']}" for row in refused[:MOST_REFUSED]]
    if len(refused) > MOST_REFUSED:
        parts.append(f"and {len(refused) - MOST_REFUSED:,} rows more that could not be predicted; --json has all")
    if result["measured_rows"]:
        models = Table("model", "rows", "mean error", "worst", "rank correlation", title_justify="left")
        for name, entry in result["models"].items():
            models.add_row(
                name,
                str(entry["rows"]),
                f"{entry['mean_relative_error']:.1%}",
                f"{entry['worst_relative_error']:.1%}",
                _correlation(entry["rank_correlation"]),
            )
        without = f" ({len(refused):,} rows more could not be predicted)" if refused else ""
        parts += [
            models,
            f"{result['measured_rows']:,} measured rows{without}: mean error {result['mean_relative_error']:.2%}, "
            f"worst {result['worst_relative_error']:.1%}, worst decile {result['worst_decile_relative_error']:.1%}, "
            f"rank correlation {_correlation(result['rank_correlation'])}",
        ]
    return as_text(*parts, width=WIDTH)


def simulate_text(result: Mapping[str, Any]) -> str:
    facts = _table(f"{result['model']} on {result['fleet']}: {len(result['runs'])} replays")
    facts.add_row("without failures", f"{result['days_without_failures']:,.1f} days on {result['chips']:,} chips")
    facts.add_row(
        "with", f"{result['days_p50']:,.1f} days (90 % between {result['days_p5']:,.1f} and {result['days_p95']:,.1f})"
    )
    facts.add_row(
        "goodput",
        f"{result['goodput']:.1%}; to first order expected without missing chips: {result['expected_goodput']:.1%}",
    )
    facts.add_row(
        "failures", f"{result['failures_mean']:,.0f}, one every {result['hours_between_failures']:,.1f} hours"
    )
    facts.add_row(
        "checkpoints",
        f"every {in_words(result['checkpoint_interval_seconds'])}; "
        f"best: {in_words(result['suggested_interval_seconds'])}",
    )
    facts.add_row("lost to", ", ".join(f"{name} {share:.1%}" for name, share in result["lost_share"].items()))
    return as_text(facts, f"Picture: {result['page']}" if "page" in result else "", width=WIDTH)


def seconds_text(seconds: float) -> str:
    if seconds >= 100:
        return in_words(seconds)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    return table


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
