"""Pieces of SVG that the pages are drawn with: boxes, words, legends, a histogram, a line."""

from collections.abc import Mapping, Sequence

from motley.page import Html, element, in_count

WIDTH = 1000
LEFT = 170


def tile(label: str, value: str, note: str) -> Html:
    return element(
        "div",
        element("div", label, class_="label"),
        element("div", value, class_="value"),
        element("div", note, class_="note"),
        class_="tile",
    )


def short(number: float) -> str:
    return in_count(number).replace("\N{NO-BREAK SPACE}", " ")


def svg(height: float, parts: Sequence[str]) -> str:
    hatch = (
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line x1="0" y1="0" x2="0" y2="6" stroke="var(--muted)" stroke-width="1.4"/></pattern></defs>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{hatch}{"".join(parts)}</svg>'


def rect(x: float, y: float, width: float, height: float, fill: str, tip: str = "", opacity: float = 1.0) -> Html:
    title = element("title", tip) if tip else Html("")
    return Html(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.6):.1f}" height="{height:.1f}" rx="2" fill="{fill}" '
        f'fill-opacity="{opacity:g}" stroke="var(--card)" stroke-width="0.8">{title}</rect>'
    )


def text(
    x: float, y: float, words: str, anchor: str = "start", colour: str = "var(--ink)", size: int = 13, weight: int = 400
) -> Html:
    return element(
        "text",
        words,
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        style=f"font-size:{size}px;font-weight:{weight};fill:{colour};text-anchor:{anchor}",
    )


def legend(names: Mapping[str, str], y: float) -> list[Html]:
    parts: list[Html] = []
    x = float(LEFT)
    for name, colour in names.items():
        parts += [rect(x, y, 12, 12, colour), text(x + 17, y + 11, name, colour="var(--muted)", size=12)]
        x += 40 + 7.2 * len(name)
    return parts


def histogram(values: Sequence[float], bins: int = 30) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / span * bins), bins - 1)] += 1
    width = (WIDTH - 60) / bins
    parts: list[Html] = []
    for number, count in enumerate(counts):
        height = 150 * count / max(counts)
        if count:
            parts.append(rect(30 + number * width, 165 - height, width - 2, height, "var(--first)", f"{count} replays"))
    for share in (0.0, 0.5, 1.0):
        parts.append(text(30 + share * (WIDTH - 60), 185, f"{low + share * span:,.1f}", "middle", "var(--muted)", 12))
    return svg(192, parts)


def line_plot(points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    if not points:
        return svg(30, [text(10, 20, "nothing ever fails")])
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span_x, span_y = (max(xs) - min(xs)) or 1.0, (high - low) or 1.0
    path = " ".join(
        f"{'L' if number else 'M'}{50 + (WIDTH - 80) * (x - min(xs)) / span_x:.1f} {160 - 140 * (y - low) / span_y:.1f}"
        for number, (x, y) in enumerate(points)
    )
    line = Html(f'<path d="{path}" fill="none" stroke="var(--first)" stroke-width="2"/>')
    labels = [
        text(50, 182, f"{min(xs):,.3g} {across}", colour="var(--muted)", size=12),
        text(WIDTH - 30, 182, f"{max(xs):,.3g} {across}", "end", "var(--muted)", 12),
        text(44, 26, f"{high:.3g}", "end", "var(--muted)", 12),
        text(44, 162, f"{low:.3g}", "end", "var(--muted)", 12),
        text(54, 14, up, colour="var(--muted)", size=12),
    ]
    return svg(190, [line, *labels])
