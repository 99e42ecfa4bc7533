"""A plan as one page that one would show to a director: who holds what, one step, memory, what each pool is worth."""

from collections.abc import Mapping
from typing import Any

from motley.fleet.picture import PALETTE, pool_colour
from motley.fleet.units import size_text
from motley.page import Html, element, facts_table, figure, in_count, list_section, whole_page
from motley.plan.show import comparison_lines, seconds_text, stage_text, worth_text
from motley.plan.timeline import timeline
from motley.progress import in_words
from motley.svg import LEFT, WIDTH, legend, rect, short, svg, text, tile

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
GANTT_STAGES, GANTT_MICRO_BATCHES = 12, 16


def plan_page(plan: Mapping[str, Any]) -> str:
    """HTML of the whole plan."""
    colours = {pool["pool"]: pool_colour(index) for index, pool in enumerate(plan["pools"])}
    money = plan["currency"]
    tiles = [
        tile("time", f"{plan['days']:,.1f} days", f"goodput {plan['goodput']:.1%} with failures counted"),
        tile("price", f"{money}{short(plan['cost'])}", f"{short(plan['chip_hours'])} chip-hours"),
        tile("speed", f"{short(plan['tokens_per_second'])} tokens/s", f"{plan['chips']:,} chips"),
        tile(
            "a step", seconds_text(plan["step_seconds"]), f"{plan['global_batch']:,} sequences of {plan['seq_len']:,}"
        ),
        tile("energy", f"{plan['energy_kwh'] / 1000:,.0f} MWh", "all chips at their rated power"),
    ]
    if len(plan["pools"]) > 1 and plan["mixed_efficiency"] is not None:
        tiles.append(tile("mixed efficiency", f"{plan['mixed_efficiency']:.0%}", "of all pools' own speeds added up"))
    title = f"{plan['model']} on {plan['fleet']}"
    biggest = max(plan["teams"], key=lambda team: team["share"])
    body = [
        element(
            "header",
            element("p", "motley plan", class_="brand"),
            element("h1", title),
            element(
                "p", f"{in_count(plan['tokens'])} tokens, objective: {plan.get('objective', 'time')}", class_="muted"
            ),
        ),
        element("div", *tiles, class_="tiles"),
        element(
            "section",
            element("h2", "Against what else one could do"),
            figure("Speed, tokens per second", _comparison_svg(plan)),
            element("ul", *(element("li", line) for line in comparison_lines(plan))),
        ),
        element(
            "section",
            element("h2", "Who holds what"),
            figure(
                "Layers on chips",
                _layout_svg(plan, colours),
                "one row a team of pools; a box is a pipeline stage, its width the layers it holds",
            ),
        ),
        element(
            "section",
            element("h2", "One step"),
            figure("Where the time of each team goes", _step_svg(plan)),
            figure(
                f"The pipeline of {' → '.join(biggest['pools'])}",
                _gantt_svg(biggest, colours),
                f"{biggest['schedule']}; dark: forward, lighter: backward, palest: gradients of weights",
            ),
        ),
        element(
            "section", element("h2", "Memory of a chip"), figure("The fullest stage of each pool", _memory_svg(plan))
        ),
        element("section", element("h2", "Pools"), _pool_table(plan, colours)),
        element("section", element("h2", "Teams"), *(_team_facts(team) for team in plan["teams"])),
        list_section(
            "Assumptions",
            [
                *plan["notes"],
                f"efficiencies of the engine {plan['engine']}, prices of the fleet file",
                f"a checkpoint every {in_words(min(plan['checkpoint_interval_seconds'], 1e6))}",
            ],
        ),
    ]
    return whole_page(f"{title}: plan", body)


def _comparison_svg(plan: Mapping[str, Any]) -> str:
    compared = plan["comparison"]
    rows = [("this plan", plan["tokens_per_second"], "var(--first)")]
    if compared["even_split"]:
        rows.append(("even split", compared["even_split"]["tokens_per_second"], "var(--second)"))
    elif len(plan["pools"]) > 1:
        rows.append(("even split", 0.0, "var(--second)"))
    for name in (pool["pool"] for pool in plan["pools"]):
        alone = compared["alone"].get(name)
        if len(plan["pools"]) > 1:
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


def _layout_svg(plan: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    parts: list[Html] = []
    y = 6.0
    for team in plan["teams"]:
        island = f"island {team['island'] + 1} · " if plan["inner_steps"] else ""
        label = (
            f"{island}{' → '.join(team['pools'])}: {team['dp']} cop{'ies' if team['dp'] > 1 else 'y'}, "
            f"{team['share']:.1%} of the batch, {team['micro_batches']} micro-batches of {team['micro_batch']}"
        )
        parts.append(text(10, y + 14, label))
        y += 22
        weights = [
            1.5 * stage["embedding"] + 1.5 * stage["head"] + _layers(stage) + stage["mtp"] for stage in team["stages"]
        ]
        scale = (WIDTH - 20) / sum(weights)
        x = 10.0
        for stage, weight in zip(team["stages"], weights, strict=True):
            width = weight * scale
            tip = _stage_tip(stage)
            parts.append(rect(x, y, width, 40, colours[stage["pool"]], tip, 0.85))
            if width > 54 and stage["layers"]:
                parts.append(
                    text(x + width / 2, y + 17, f"{stage['layers'][0]}–{stage['layers'][1]}", "middle", "#fff", 12)
                )
                ends = "emb " * stage["embedding"] + "MTP " * bool(stage["mtp"]) + "head" * stage["head"]
                parts.append(text(x + width / 2, y + 32, ends or f"{stage['chips']} chips", "middle", "#fff", 11))
            x += width
        y += 56
    return svg(y, parts)


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


def _step_svg(plan: Mapping[str, Any]) -> str:
    parts: list[Html] = []
    scale = (WIDTH - LEFT - 20) / plan["step_seconds"]
    for number, team in enumerate(plan["teams"]):
        y = 8 + 28 * number
        parts.append(text(LEFT - 10, y + 15, " → ".join(team["pools"]), "end"))
        x = float(LEFT)
        for name, colour in PART_COLOURS.items():
            width = team["seconds"][name] * scale
            if width > 0.3:
                parts.append(rect(x, y, width, 20, colour, f"{name}: {seconds_text(team['seconds'][name])}"))
            x += width
    bottom = 14 + 28 * len(plan["teams"])
    return svg(bottom + 20, [*parts, *legend(PART_COLOURS, bottom)])


def _gantt_svg(team: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The team's schedule played through; of a stage's time a third each is F, B and W."""
    thirds = [(stage["seconds_per_micro_batch"] / 3,) * 3 for stage in team["stages"]]
    count = min(team["micro_batches"], max(GANTT_MICRO_BATCHES, 2 * team["pp"]))
    rows = timeline(thirds, count, team["schedule"])
    whole = max(work.end for row in rows for work in row)
    scale = (WIDTH - LEFT - 20) / whole
    opacity = {"F": 1.0, "B": 0.55, "W": 0.3}
    names = {"F": "forward", "B": "backward", "W": "gradients of weights"}
    parts: list[Html] = []
    for number, row in enumerate(rows[:GANTT_STAGES]):
        y = 6 + 22 * number
        parts.append(text(LEFT - 10, y + 13, f"{team['stages'][number]['pool']} {number}", "end", size=12))
        for work in row:
            tip = f"{names[work.kind]} of micro-batch {work.micro_batch}, stage {work.stage}"
            colour = colours[team["stages"][work.stage]["pool"]]
            x, width = LEFT + work.start * scale, (work.end - work.start) * scale
            parts.append(rect(x, y, width, 17, colour, tip, opacity[work.kind]))
    more = len(rows) - GANTT_STAGES
    bottom = 10 + 22 * min(len(rows), GANTT_STAGES)
    if more > 0:
        parts.append(text(LEFT, bottom + 12, f"and {more} more", colour="var(--muted)", size=12))
    return svg(bottom + (18 if more > 0 else 4), parts)


def _memory_svg(plan: Mapping[str, Any]) -> str:
    fullest: dict[str, Mapping[str, Any]] = {}
    for team in plan["teams"]:
        for stage in team["stages"]:
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
        parts.append(
            Html(
                f'<line x1="{limit:.1f}" y1="{y - 3}" x2="{limit:.1f}" y2="{y + 23}" '
                'stroke="var(--bad)" stroke-width="2"/>'
            )
        )
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
        "$ an hour",
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
            f"{pool['chips'] * pool['price_per_hour']:,.0f}",
            without,
        )
        dot = Html(f'<span style="color:{colours[pool["pool"]]}">\N{BLACK SQUARE}</span>')
        rows.append(element("tr", element("td", dot), *(element("td", cell) for cell in cells)))
    return element("table", *rows)


def _team_facts(team: Mapping[str, Any]) -> Html:
    facts = [
        ("copies x stages", f"{team['dp']} x {stage_text(team['stages'])}"),
        ("tensor parallel", ", ".join(f"{pool} {tp}" for pool, tp in team["tp"].items())),
        ("expert / context parallel", f"{team['ep']} / {team['cp']}"),
        ("schedule, recomputation", f"{team['schedule']}, {team['recompute']}"),
        ("ZeRO", f"{team['zero']}, optimizer states: {team['states']}"),
        (
            "batch",
            f"{team['sequences']:,} sequences in {team['micro_batches']} micro-batches of {team['micro_batch']} a copy",
        ),
    ]
    return element("div", element("h3", " → ".join(team["pools"])), facts_table(facts))
