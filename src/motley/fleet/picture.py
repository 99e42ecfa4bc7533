"""A fleet as one page: sites, pools and chips drawn to scale, links between them, measured curves."""

from collections.abc import Sequence
from math import log10

from motley.fleet.chips import TERA
from motley.fleet.inventory import Fleet, Pool
from motley.fleet.units import rate_text, size_text
from motley.page import Html, element, facts_table, figure, whole_page
from motley.svg import WIDTH, text

PALETTE = ("#2f6fd6", "#d9720b", "#12866f", "#8a4fc9", "#b3372b", "#5b7083", "#a88400", "#c2447e")
MOST_SQUARES = 96
SQUARE = 15
CURVE_WIDTH, CURVE_HEIGHT = 460, 200


def pool_colour(index: int) -> str:
    """The same pool has the same colour in every picture."""
    return PALETTE[index % len(PALETTE)]


def fleet_page(fleet: Fleet) -> str:
    """HTML of the whole page."""
    rows = [_row(fleet, pool, index) for index, pool in enumerate(fleet.pools)]
    names = (
        "",
        "pool",
        "chip",
        "chips",
        "trains in",
        "TFLOP/s each",
        "memory",
        "link inside",
        "network per node",
        "$/h",
    )
    heads = [element("th", name) for name in names]
    table = element("table", element("tr", *heads), *rows)
    curves = [
        figure(
            f"{pool.name}: measured products", _curve(pool), "GFLOP/s against the size of the product, both logarithmic"
        )
        for pool in fleet.pools
        if pool.measured.matmul
    ]
    total = sum(pool.chips * pool.flops(pool.best_precision) for pool in fleet.pools)
    price = sum(pool.chips * pool.price for pool in fleet.pools)
    facts = [
        ("chips", f"{fleet.chips:,} of {len({pool.sheet.name for pool in fleet.pools})} kinds"),
        ("peak of all data sheets together", f"{total / TERA:,.0f} TFLOP/s"),
        ("price of an hour", f"{fleet.currency}{price:,.2f}"),
    ]
    body = [
        element("header", element("p", "motley fleet", class_="brand"), element("h1", fleet.name)),
        facts_table(facts),
        element("section", element("h2", "What stands where"), figure("Sites, pools, links", fleet_svg(fleet))),
        element("section", element("h2", "Pools"), table),
        *([element("section", element("h2", "Curves"), element("div", *curves, class_="charts"))] if curves else []),
    ]
    return whole_page(f"{fleet.name}: fleet", body)


def fleet_svg(fleet: Fleet) -> str:
    """Sites as boxes, each chip a square (a block of many where there are more), slow links as lines between sites."""
    parts: list[Html] = []
    top, centres = 10, {}
    fastest = max(pool.flops(pool.best_precision) for pool in fleet.pools)
    for site in fleet.site_names:
        pools = [(index, pool) for index, pool in enumerate(fleet.pools) if fleet.site_of(pool) == site]
        height = 34
        inner: list[Html] = []
        for index, pool in pools:
            drawn, used = _squares(pool, index, fastest, top + height)
            inner += drawn
            height += used
        box = f'<rect x="5" y="{top}" width="{WIDTH - 10}" height="{height}" rx="10" fill="none" stroke="var(--rule)"/>'
        parts += [Html(box), text(20, top + 22, site, colour="var(--ink)", weight=700), *inner]
        centres[site] = top + height
        top += height + 46
    for link in fleet.links:
        ends = sorted(centres[site] for site in link.sites if site in centres)
        if len(ends) == 2:
            label = f"{' ↔ '.join(link.sites)}: {rate_text(link.bandwidth)}, {1e3 * link.latency:g} ms"
            order = fleet.links.index(link)
            x = WIDTH - 60 - 26 * order
            dashes = 'stroke="var(--bad)" stroke-width="2" stroke-dasharray="5 4"'
            line = f'<path d="M{x} {ends[0]} V{ends[1] - 20}" {dashes}/>'
            parts += [
                Html(line),
                text(20 + 320 * (order % 3), ends[0] + 18 + 14 * (order // 3), label, colour="var(--bad)"),
            ]
    return f'<svg viewBox="0 0 {WIDTH} {top - 30}" role="img">{"".join(parts)}</svg>'


def _squares(pool: Pool, index: int, fastest: float, top: float) -> tuple[list[Html], int]:
    each = max(1, -(-pool.chips // MOST_SQUARES))
    count = -(-pool.chips // each)
    scale = max(0.35, (pool.flops(pool.best_precision) / fastest) ** 0.5)
    side = SQUARE * scale
    label = f"{pool.name}: {pool.chips:,} x {pool.sheet.name}" + (f" (a square is {each:,} chips)" if each > 1 else "")
    parts = [text(20, top + 12, label, colour="var(--ink)")]
    columns = 48
    for number in range(count):
        x, y = 20 + (SQUARE + 4) * (number % columns), top + 20 + (SQUARE + 4) * (number // columns)
        offset = (SQUARE - side) / 2
        parts.append(
            Html(
                f'<rect x="{x + offset:.1f}" y="{y + offset:.1f}" width="{side:.1f}" height="{side:.1f}" rx="2" '
                f'fill="{pool_colour(index)}"/>'
            )
        )
    return parts, 30 + (SQUARE + 4) * -(-count // columns)


def _curve(pool: Pool) -> str:
    """Measured GFLOP/s against FLOPs of the product, a line for each number format."""
    lines = {
        name: sorted((2.0 * g * r * i * c, rate) for g, r, i, c, rate in points)
        for name, points in pool.measured.matmul.items()
    }
    flops = [flop for points in lines.values() for flop, _ in points]
    rates = [rate for points in lines.values() for _, rate in points]
    low_x, high_x = log10(min(flops)), log10(max(flops)) + 1e-9
    low_y, high_y = log10(min(rates)), log10(max(rates)) + 1e-9

    def at(flop: float, rate: float) -> tuple[float, float]:
        x = 40 + (CURVE_WIDTH - 60) * (log10(flop) - low_x) / (high_x - low_x)
        return x, CURVE_HEIGHT - 24 - (CURVE_HEIGHT - 50) * (log10(rate) - low_y) / (high_y - low_y)

    parts: list[str] = []
    for index, (name, points) in enumerate(lines.items()):
        colour = pool_colour(index)
        for flop, rate in points:
            x, y = at(flop, rate)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.75"/>')
        best = max(rate for _, rate in points)
        parts.append(text(44 + 150 * index, 14, f"{name}: up to {best:,.0f} GFLOP/s", colour=colour, weight=600))
    parts.append(text(40, CURVE_HEIGHT - 6, f"{min(flops):.1e} FLOP", colour="var(--muted)"))
    parts.append(text(CURVE_WIDTH - 120, CURVE_HEIGHT - 6, f"{max(flops):.1e} FLOP", colour="var(--muted)"))
    return f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _row(fleet: Fleet, pool: Pool, index: int) -> Html:
    chip = pool.sheet
    cells: Sequence[str] = (
        pool.name,
        chip.name,
        f"{pool.chips:,}",
        pool.best_precision,
        f"{pool.flops(pool.best_precision) / TERA:,.4g}",
        size_text(pool.measured.memory or chip.memory_bytes),
        rate_text(pool.link_inside or chip.link_bandwidth),
        rate_text(pool.link_outside or chip.node_network),
        f"{pool.price:,.2f}",
    )
    dot = Html(f'<span style="color:{pool_colour(index)}">\N{BLACK SQUARE}</span>')
    return element("tr", element("td", dot), *(element("td", cell) for cell in cells))
