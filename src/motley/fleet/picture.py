"""A fleet as one page: sites, pools and chips drawn to scale, links between them, measured curves."""

from collections.abc import Sequence
from math import ceil, floor, log10

from motley.fleet.chips import TERA
from motley.fleet.inventory import Fleet, Pool
from motley.fleet.probe import in_flops
from motley.fleet.units import rate_text, size_text
from motley.page import Html, element, figure, whole_page
from motley.svg import WIDTH, Axes, legend, line, path, round_step, svg, text, tile, tiles

PALETTE = ("#2f6fd6", "#d9720b", "#12866f", "#8a4fc9", "#b3372b", "#5b7083", "#a88400", "#c2447e")
MOST_SQUARES = 96  # of the largest pool
SQUARE, COLUMNS = 15, 46
LINK_GAP = 22  # between two links that pass each other


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
        f"{fleet.currency}/h",
    )
    heads = [element("th", name) for name in names]
    table = element("table", element("tr", *heads), *rows)
    curves = [
        figure(f"{pool.name}: measured products", _curve(pool), "a dot is a product of one size, both axes logarithmic")
        for pool in fleet.pools
        if pool.measured.matmul
    ]
    kinds = len({pool.sheet.name for pool in fleet.pools})
    total = sum(pool.chips * pool.flops(pool.best_precision) for pool in fleet.pools)
    memory = sum(pool.chips * (pool.memory_known or pool.sheet.memory_bytes) for pool in fleet.pools)
    price = sum(pool.chips * pool.price for pool in fleet.pools)
    cards = [
        tile(
            "chips",
            f"{fleet.chips:,}",
            f"{kinds} kind{'s' * (kinds > 1)} in {len(fleet.pools)} pool{'s' * (len(fleet.pools) > 1)}",
        ),
        tile("peak", in_flops(total / 1e9).replace(" ", "\N{NO-BREAK SPACE}"), "all chips together"),
        tile("memory", size_text(memory), "of all chips"),
        tile("price of an hour", f"{fleet.currency}{price:,.2f}", "all chips"),
    ]
    each = chips_a_square(fleet)
    scale = f"a square is {f'{each:,} chips' if each > 1 else 'a chip'}, its area the speed of one"
    body = [
        element("header", element("p", "motley fleet", class_="brand"), element("h1", fleet.name)),
        tiles(cards),
        element("section", element("h2", "What stands where"), figure("Sites, pools, links", fleet_svg(fleet), scale)),
        element("section", element("h2", "Pools"), table),
        *(
            [element("section", element("h2", "Curves"), element("div", *curves, style="display:grid;gap:16px"))]
            if curves
            else []
        ),
    ]
    return whole_page(f"{fleet.name}: fleet", body)


def chips_a_square(fleet: Fleet) -> int:
    """The same for all pools, so that their sizes can be compared."""
    return max(1, round(round_step(max(pool.chips for pool in fleet.pools) / MOST_SQUARES)))


def fleet_svg(fleet: Fleet) -> str:
    """Sites as boxes, chips as squares in them, slow links as numbered brackets on the right, explained below."""
    parts: list[Html] = []
    top = 6.0
    middles: dict[str, float] = {}
    fastest = max(pool.flops(pool.best_precision) for pool in fleet.pools)
    edge = WIDTH - 6 - LINK_GAP * (len(fleet.links) + bool(fleet.links))
    for site in fleet.site_names:
        height = 32.0
        inner: list[Html] = []
        for index, pool in enumerate(fleet.pools):
            if fleet.site_of(pool) == site:
                drawn, used = _squares(pool, index, fastest, chips_a_square(fleet), top + height)
                inner += drawn
                height += used
        box = f'width="{edge - 6:.0f}" height="{height + 4:.0f}" rx="10" fill="none" stroke="var(--rule)"'
        parts += [Html(f'<rect x="6" y="{top:.0f}" {box}/>'), text(20, top + 22, site, weight=700), *inner]
        middles[site] = top + height / 2
        top += height + 18
    for number, link in enumerate(link for link in fleet.links if set(link.sites) <= set(middles)):
        start, end = (middles[site] + LINK_GAP / 2 * (number - (len(fleet.links) - 1) / 2) for site in link.sites)
        x = edge + LINK_GAP * (number + 1)
        parts.append(path([(edge, start), (x, start), (x, end), (edge, end)], "var(--bad)", 1.6))
        parts.append(text(x + 4, (start + end) / 2 + 4, str(number + 1), colour="var(--bad)", weight=700))
        words = f"{number + 1}  {' ↔ '.join(link.sites)}: {rate_text(link.bandwidth)}, {1e3 * link.latency:g} ms"
        parts.append(text(20 + 320 * (number % 3), top + 12 + 18 * (number // 3), words, colour="var(--bad)"))
    return svg(top + 18 * ceil(len(fleet.links) / 3), parts)


def _squares(pool: Pool, index: int, fastest: float, each: int, top: float) -> tuple[list[Html], int]:
    """(drawing, its height)."""
    count = ceil(pool.chips / each)
    side = SQUARE * max(0.35, (pool.flops(pool.best_precision) / fastest) ** 0.5)
    parts = [text(20, top + 12, f"{pool.name}: {pool.chips:,} x {pool.sheet.name}")]
    for number in range(count):
        x = 20 + (SQUARE + 4) * (number % COLUMNS) + (SQUARE - side) / 2
        y = top + 20 + (SQUARE + 4) * (number // COLUMNS) + (SQUARE - side) / 2
        parts.append(
            Html(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="2" '
                f'fill="{pool_colour(index)}"/>'
            )
        )
    return parts, 30 + (SQUARE + 4) * ceil(count / COLUMNS)


def _curve(pool: Pool) -> str:
    """Measured GFLOP/s against FLOPs of the product, a colour for each number format."""
    dots = {
        name: [(log10(2.0 * g * r * i * c), log10(rate)) for g, r, i, c, rate in points]
        for name, points in pool.measured.matmul.items()
    }
    xs = [x for points in dots.values() for x, _ in points]
    ys = [y for points in dots.values() for _, y in points]
    axes = Axes(
        (floor(min(xs)), ceil(max(xs))), (floor(min(ys)), ceil(max(ys) + 1e-9)), left=84, right=WIDTH - 44, bottom=230
    )
    parts: list[Html] = []
    for power in range(int(axes.x[0]), int(axes.x[1]) + 1):
        parts.append(line(axes.across(power), axes.top, axes.across(power), axes.bottom))
        parts.append(text(axes.across(power), axes.bottom + 16, _flops_words(power), "middle", "var(--muted)", 12))
    for power in range(int(axes.y[0]), int(axes.y[1]) + 1):
        parts.append(line(axes.left, axes.up(power), axes.right, axes.up(power)))
        parts.append(text(axes.left - 8, axes.up(power) + 4, f"{10.0**power:,.6g}", "end", "var(--muted)", 12))
    parts.append(text(4, axes.top - 14, "GFLOP/s", colour="var(--muted)", size=12))
    parts.append(text(WIDTH / 2, axes.bottom + 36, "work of the product", "middle", "var(--muted)", 12))
    names = {}
    for index, (name, points) in enumerate(dots.items()):
        names[f"{name}: up to {in_flops(10 ** max(y for _, y in points))}"] = pool_colour(index)
        for x, y in points:
            at = f'cx="{axes.across(x):.1f}" cy="{axes.up(y):.1f}"'
            parts.append(Html(f'<circle {at} r="4.5" fill="{pool_colour(index)}" fill-opacity="0.8"/>'))
    return svg(axes.bottom + 68, [*parts, *legend(names, axes.bottom + 50, axes.left)])


def _flops_words(power: int) -> str:
    """`9` → `1 GFLOP`."""
    unit = min(max(power // 3, 0), 5)
    return f"{10 ** (power - 3 * unit):,} {('', 'K', 'M', 'G', 'T', 'P')[unit]}FLOP"


def _row(fleet: Fleet, pool: Pool, index: int) -> Html:
    chip = pool.sheet
    cells: Sequence[str] = (
        pool.name,
        chip.name,
        f"{pool.chips:,}",
        pool.best_precision,
        f"{pool.flops(pool.best_precision) / TERA:,.4g}",
        size_text(pool.memory_known or chip.memory_bytes),
        rate_text(pool.link_inside or chip.link_bandwidth),
        rate_text(pool.network_known or chip.node_network),
        f"{pool.price:,.2f}",
    )
    dot = Html(f'<span style="color:{pool_colour(index)}">\N{BLACK SQUARE}</span>')
    return element("tr", element("td", dot), *(element("td", cell) for cell in cells))
