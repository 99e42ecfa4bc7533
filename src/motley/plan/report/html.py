"""A plan as one page: layers on chips, one step, memory, what each pool adds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motley.files import write_json, write_text
from motley.fleet.picture import PALETTE, pool_colour
from motley.fleet.units import size_text
from motley.page import Html, element, facts_table, figure, in_count, list_section, whole_page
from motley.plan.report.step_html import detail_caption, detail_svg, step_svg
from motley.plan.report.text import comparison_lines, seconds_text, stage_text, worth_text
from motley.progress import in_words
from motley.svg import LEFT, WIDTH, fits, legend, line, rect, short, svg, text, tile, tiles

PART_COLOURS = {
    "compute": "var(--first)",
    "communication": "var(--second)",
    "bubble": "var(--rule)",
    "optimizer": "var(--third)",
    "waiting": "url(#hatch)",
}
MEMORY_COLOURS: Mapping[str, str] = dict(
    zip(("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation"), PALETTE, strict=False)
)
BOX_SIZE = 11  # of the words in a stage's box
BADGE = (
    "display:inline-block;border:1px solid var(--bad);color:var(--bad);border-radius:8px;"
    "padding:5px 12px;margin-top:10px;font-size:14px;font-weight:600"
)


def write_plan(file: Path, plan: Mapping[str, Any]) -> Path:
    """Write the plan file, and beside it its page, whose path is returned."""
    write_json(file, plan)
    page = file.with_suffix(".html")
    write_text(page, plan_page(plan))
    return page


def plan_page(plan: Mapping[str, Any]) -> str:
    """HTML of the whole plan."""
    colours = {pool["pool"]: pool_colour(index) for index, pool in enumerate(plan["pools"])}
    money = plan["currency"]
    cards = [
        tile("time", f"{plan['days']:,.1f} days", f"goodput {plan['goodput']:.1%} with failures counted"),
        tile("price", f"{money}{in_count(plan['cost'])}", f"{short(plan['chip_hours'])} chip-hours"),
        tile("speed", f"{in_count(plan['tokens_per_second'])}\N{NO-BREAK SPACE}tokens/s", f"{plan['chips']:,} chips"),
        tile(
            "a step", seconds_text(plan["step_seconds"]), f"{plan['global_batch']:,} sequences of {plan['seq_len']:,}"
        ),
        tile(
            "energy",
            f"{plan['energy_kwh'] / 1000:,.{0 if plan['energy_kwh'] > 1e5 else 1}f} MWh",
            "all chips at their rated power",
        ),
        _sixth_card(plan),
    ]
    title = f"{plan['model']} on {plan['fleet']}"
    about = (
        f"{in_count(plan['tokens'])} tokens \N{MIDDLE DOT} objective: {plan.get('objective', 'time')} "
        f"\N{MIDDLE DOT} efficiencies of the framework {plan['framework']}"
    )
    biggest = max(plan["groups"], key=lambda group: group["share"])
    body = [
        element(
            "header",
            element("p", "motley plan", class_="brand"),
            element("h1", title),
            element("p", about, class_="muted"),
            *(element("p", f"Assumed, not measured: {note}", style=BADGE) for note in assumed(plan)),
        ),
        tiles(cards),
        *([_comparison_section(plan)] if len(plan["pools"]) > 1 else []),
        element(
            "section",
            element("h2", "Layers on chips"),
            figure(
                "Layers on chips",
                _layout_svg(plan, colours),
                "a row is a pipeline group, a box a stage of its pipeline, its width the layers of the stage; "
                "chips: of all replicas; exp.: experts of each layer on one chip",
            ),
        ),
        element(
            "section",
            element("h2", "One step"),
            element(
                "div",
                figure(
                    "All pipeline groups, second by second",
                    step_svg(plan, colours),
                    "a line is a chip of one replica of the model at its micro-batches, exchange between them included",
                ),
                figure("Seconds of each pipeline group", _split_svg(plan)),
                figure(
                    f"The pipeline of {' → '.join(biggest['pools'])}",
                    detail_svg(biggest, colours),
                    detail_caption(biggest),
                ),
                style="display:grid;gap:16px",
            ),
        ),
        element(
            "section", element("h2", "Memory of a chip"), figure("The fullest stage of each pool", _memory_svg(plan))
        ),
        element("section", element("h2", "Pools"), _pool_table(plan, colours)),
        element("section", element("h2", "Pipeline groups"), *(_group_facts(group) for group in plan["groups"])),
        list_section(
            "Assumptions",
            [
                *plan["notes"],
                f"efficiencies of the framework {plan['framework']}, prices of the fleet file",
                f"a checkpoint every {in_words(min(plan['checkpoint_interval_seconds'], 1e6))}",
            ],
        ),
    ]
    return whole_page(f"{title}: plan", body)


def _comparison_section(plan: Mapping[str, Any]) -> Html:
    return element(
        "section",
        element("h2", "Against what else one could do"),
        figure("Speed, tokens per second", _comparison_svg(plan)),
        element("ul", *(element("li", words) for words in comparison_lines(plan))),
    )


def _comparison_svg(plan: Mapping[str, Any]) -> str:
    compared = plan["comparison"]
    rows = [("this plan", plan["tokens_per_second"], "var(--first)")]
    if compared["even_split"]:
        rows.append(("even split", compared["even_split"]["tokens_per_second"], "var(--second)"))
    else:
        rows.append(("even split", 0.0, "var(--second)"))
    for name in (pool["pool"] for pool in plan["pools"]):
        alone = compared["alone"].get(name)
        rows.append((f"{name} alone", alone["tokens_per_second"] if alone else 0.0, "var(--third)"))
    most = max(value for _, value, _ in rows)
    parts: list[Html] = []
    for number, (name, value, colour) in enumerate(rows):
        y = 8 + 26 * number
        parts.append(text(LEFT - 10, y + 14, name, "end"))
        if value:
            width = (WIDTH - LEFT - 110) * value / most
            parts += [rect(LEFT, y, width, 18, colour), text(LEFT + width + 8, y + 14, short(value), size=12)]
        else:
            parts.append(text(LEFT, y + 14, "cannot hold the model", colour="var(--muted)", size=12))
    return svg(16 + 26 * len(rows), parts)


def assumed(plan: Mapping[str, Any]) -> list[str]:
    """Notes that say of a framework that it was not measured."""
    return [note for note in plan["notes"] if note.startswith("framework ")]


def _sixth_card(plan: Mapping[str, Any]) -> Html:
    """Mixed efficiency; with one pool, or where no pool can hold the model alone, how well the chips are used."""
    if len(plan["pools"]) > 1 and plan["mixed_efficiency"] is not None:
        return tile("mixed efficiency", f"{plan['mixed_efficiency']:.0%}", "of all pools' own speeds added up")
    used = [pool for pool in plan["pools"] if pool["chips"]]
    span = [f"{value:.0%}" for value in sorted({pool["mfu"] for pool in used})]
    return tile("MFU", span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}", "useful FLOPs over the chips' peak")


def _layout_svg(plan: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """A row a group, a box a stage. A box too narrow for its words has a number, explained below the row."""
    parts: list[Html] = []
    y = 6.0
    for group in plan["groups"]:
        island = f"island {group['island'] + 1} · " if plan["inner_steps"] else ""
        label = (
            f"{island}{' → '.join(group['pools'])}: {group['dp']:,} replica{'s' if group['dp'] > 1 else ''}, "
            f"{group['share']:.1%} of the batch, {_batches(group)}"
        )
        parts.append(text(10, y + 14, label))
        y += 22
        weights = [
            1.5 * stage["embedding"] + 1.5 * stage["head"] + _layers(stage) + stage["mtp"] for stage in group["stages"]
        ]
        scale = (WIDTH - 20) / sum(weights)
        x = 10.0
        height = 17 + 14 * max(len(_box_lines(stage, weight * scale)) for stage, weight in _zip(group, weights))
        numbered: list[str] = []
        for stage, weight in _zip(group, weights):
            width = weight * scale
            lines = _box_lines(stage, width)
            if not lines:
                numbered.append(f"{len(numbered) + 1}: {', '.join(_words(stage))}")
                lines = [str(len(numbered))]
            parts.append(rect(x, y, width, height, colours[stage["pool"]], _stage_tip(stage), 0.9))
            first = y + height / 2 + 4 - 7 * (len(lines) - 1)
            for number, words in enumerate(lines):
                parts.append(text(x + width / 2, first + 14 * number, words, "middle", "#fff", BOX_SIZE))
            x += width
        y += height
        for words in _wrapped(numbered):
            parts.append(text(10, y + 16, words, colour="var(--muted)", size=12))
            y += 16
        y += 16
    return svg(y, parts)


def _zip(group: Mapping[str, Any], weights: list[float]) -> list[tuple[Mapping[str, Any], float]]:
    return list(zip(group["stages"], weights, strict=True))


def _words(stage: Mapping[str, Any]) -> list[str]:
    """What a stage holds, piece by piece."""
    words = []
    if stage["layers"]:
        first, last = stage["layers"]
        words = [f"layer {first}" if first == last else f"layers {first}–{last}"]
    ends = [name for name in ("embedding", "mtp", "head") if stage[name]]
    words += [" + ".join(ends).replace("mtp", "MTP")] if ends else []
    words.append(f"{stage['chips']:,} chip{'s' * (stage['chips'] != 1)}")
    if stage["experts_per_chip"] and (stage["layers"] or stage["mtp"]):
        words.append(f"{stage['experts_per_chip']} experts a chip")
    return words


def _box_lines(stage: Mapping[str, Any], width: float) -> list[str]:
    """The same as lines that fit a box, shortened where it must be; nothing where nothing fits."""
    lines = _words(stage)
    for long, short_one in (("", ""), ("layers ", ""), ("embedding", "emb."), ("experts a", "exp. a"), (" a chip", "")):
        lines = [line.replace(long, short_one) if long else line for line in lines]
        if all(fits(line, width - 4, BOX_SIZE) for line in lines):
            return lines
    return []


def _wrapped(entries: list[str]) -> list[str]:
    """Entries of a legend in lines of the picture's width."""
    lines: list[str] = []
    for entry in entries:
        if lines and fits(f"{lines[-1]}    {entry}", WIDTH - 20, 12):
            lines[-1] += f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}\N{NO-BREAK SPACE} {entry}"
        else:
            lines.append(entry)
    return lines


def _layers(stage: Mapping[str, Any]) -> int:
    return stage["layers"][1] - stage["layers"][0] + 1 if stage["layers"] else 0


def _stage_tip(stage: Mapping[str, Any]) -> str:
    experts = f", {stage['experts_per_chip']} experts a chip" if stage["experts_per_chip"] else ""
    layers = f"layers {stage['layers'][0]} to {stage['layers'][1]}" if stage["layers"] else "no layers"
    return (
        f"{stage['pool']}: {layers}{experts}, {stage['chips']} x {stage['chip']}, "
        f"{size_text(sum(stage['memory_bytes'].values()))} of {size_text(stage['memory_limit_bytes'])}, "
        f"{seconds_text(stage['seconds_per_micro_batch'])} a micro-batch"
    )


def _split_svg(plan: Mapping[str, Any]) -> str:
    parts: list[Html] = []
    scale = (WIDTH - LEFT - 20) / plan["step_seconds"]
    for number, group in enumerate(plan["groups"]):
        y = 8 + 28 * number
        parts.append(text(LEFT - 10, y + 15, " → ".join(group["pools"]), "end"))
        x = float(LEFT)
        for name, colour in PART_COLOURS.items():
            width = group["seconds"][name] * scale
            if width > 0.3:
                parts.append(rect(x, y, width, 20, colour, f"{name}: {seconds_text(group['seconds'][name])}"))
            x += width
    bottom = 14 + 28 * len(plan["groups"])
    return svg(bottom + 20, [*parts, *legend(PART_COLOURS, bottom)])


def _memory_svg(plan: Mapping[str, Any]) -> str:
    fullest: dict[str, Mapping[str, Any]] = {}
    for group in plan["groups"]:
        for stage in group["stages"]:
            known = fullest.get(stage["pool"])
            if known is None or sum(stage["memory_bytes"].values()) > sum(known["memory_bytes"].values()):
                fullest[stage["pool"]] = stage
    most = max(stage["memory_limit_bytes"] for stage in fullest.values())
    scale = (WIDTH - LEFT - 150) / most
    parts: list[Html] = []
    for number, (pool, stage) in enumerate(fullest.items()):
        y = 8 + 30 * number
        x = float(LEFT)
        parts.append(text(LEFT - 10, y + 15, pool, "end"))
        for name, colour in MEMORY_COLOURS.items():
            size = stage["memory_bytes"][name]
            parts.append(rect(x, y, size * scale, 20, colour, f"{name}: {size_text(size)}"))
            x += size * scale
        limit = LEFT + stage["memory_limit_bytes"] * scale
        parts.append(line(limit, y - 3, limit, y + 23, "var(--bad)", 2))
        parts.append(text(limit + 6, y + 15, size_text(stage["memory_limit_bytes"]), size=12, colour="var(--muted)"))
    bottom = 14 + 30 * len(fullest)
    return svg(bottom + 20, [*parts, *legend(MEMORY_COLOURS, bottom)])


def _pool_table(plan: Mapping[str, Any], colours: Mapping[str, str]) -> Html:
    worth = {entry["pool"]: entry for entry in plan["comparison"]["marginal_value"]}
    names = (
        "",
        "pool",
        "chip",
        "site",
        "chips used",
        "idle",
        "precision",
        "MFU",
        "part of work",
        f"{plan['currency']} an hour",
        "without it",
    )
    rows = [element("tr", *(element("th", name) for name in names))]
    for pool in plan["pools"]:
        used = pool["chips"] > 0
        entry = worth.get(pool["pool"])
        without = worth_text(entry) if entry else ""
        cells = (
            pool["pool"],
            pool["chip"],
            pool["site"],
            f"{pool['chips']:,}",
            f"{pool['chips_idle']:,}",
            pool["precision"] if used else "",
            f"{pool['mfu']:.1%}" if used else "",
            f"{pool['flops_share']:.1%}" if used else "",
            _price(pool["chips"] * pool["price_per_hour"]),
            without,
        )
        dot = Html(f'<span style="color:{colours[pool["pool"]]}">\N{BLACK SQUARE}</span>')
        rows.append(element("tr", element("td", dot), *(element("td", cell) for cell in cells)))
    return element("table", *rows)


def _batches(group: Mapping[str, Any]) -> str:
    count, size = group["micro_batches"], group["micro_batch"]
    return f"{count:,} micro-batch{'es' * (count > 1)} of {size:,} sequence{'s' * (size > 1)}"


def _price(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:,.2f}"


def _group_facts(group: Mapping[str, Any]) -> Html:
    facts = [
        ("replicas x stages", f"{group['dp']} x {stage_text(group['stages'])}"),
        ("tensor parallel", ", ".join(f"{pool} {tp}" for pool, tp in group["tp"].items())),
        ("expert / context parallel", f"{group['ep']} / {group['cp']}"),
        ("schedule, recomputation", f"{group['schedule']}, {group['recompute']}"),
        ("ZeRO", f"{group['zero']}, optimizer states: {group['states']}"),
        (
            "batch",
            f"{group['sequences']:,} sequences, on every replica {_batches(group)}",
        ),
    ]
    return element("div", element("h3", " → ".join(group["pools"])), facts_table(facts))
