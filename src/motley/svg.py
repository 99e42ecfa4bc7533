"""Pieces of SVG that the pages are drawn with: cards, boxes, words, legends, axes, a histogram, a line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motley.page import Html, element, in_count

WIDTH = 1000
LEFT = 170
WORD_WIDTH = 0.58  # of the font's size: a letter of the widest fonts of `page.css`, on average


@dataclass(frozen=True)
class Axes:
    """A frame with ticks: values to pixels, x rightwards, y upwards.

    Attributes:
        x, y: lowest and highest value.
        left, right, top, bottom: the frame's edges in pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 64
    right: float = WIDTH - 24
    top: float = 30
    bottom: float = 190

    def across(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)

    def up(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)

    def frame(self, x_title: str, y_title: str = "", y_format: str = ",.6g") -> list[Html]:
        """Grid lines with their values and the titles of both axes; without `y_title` only x."""
        parts: list[Html] = []
        for value in ticks(*self.x, about=10):
            parts.append(line(self.across(value), self.top, self.across(value), self.bottom))
            parts.append(text(self.across(value), self.bottom + 16, f"{value:,.6g}", "middle", "var(--muted)", 12))
        for value in ticks(*self.y, about=4) if y_title else ():
            parts.append(line(self.left, self.up(value), self.right, self.up(value)))
            parts.append(text(self.left - 8, self.up(value) + 4, f"{value:{y_format}}", "end", "var(--muted)", 12))
        parts.append(text((self.left + self.right) / 2, self.bottom + 36, x_title, "middle", "var(--muted)", 12))
        if y_title:
            parts.append(text(4, self.top - 14, y_title, colour="var(--muted)", size=12))
        return parts


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from `low` to `high`, about so many."""
    if not high > low:
        return [low]
    step = round_step((high - low) / about)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def round_step(least: float) -> float:
    """The next number from `least` on that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def tiles(cards: Sequence[Html]) -> Html:
    """Cards in rows of equal length: of three and two on narrower windows, of four where they are four."""
    narrowest = 280 if len(cards) % 3 == 0 else 248
    columns = f"grid-template-columns:repeat(auto-fit,minmax(min({narrowest}px,100%),1fr))"
    return element("div", *cards, class_="tiles", style=columns)


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


def rect(
    x: float, y: float, width: float, height: float, fill: str, tip: str = "", opacity: float = 1.0, edge: bool = True
) -> Html:
    """A box; `tip` shows when the pointer rests on it, `edge` sets it apart from its neighbours."""
    title = element("title", tip) if tip else Html("")
    stroke = ' rx="2" stroke="var(--card)" stroke-width="0.8"' if edge else ""
    return Html(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.6):.1f}" height="{height:.1f}" fill="{fill}" '
        f'fill-opacity="{opacity:g}"{stroke}>{title}</rect>'
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


def legend(names: Mapping[str, str], y: float, x: float = LEFT) -> list[Html]:
    """Coloured squares with what they mean, from left to right."""
    parts: list[Html] = []
    for name, colour in names.items():
        parts += [rect(x, y, 12, 12, colour), text(x + 17, y + 11, name, colour="var(--muted)", size=12)]
        x += 40 + 7.2 * len(name)
    return parts


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "var(--rule)", width: float = 1) -> Html:
    return Html(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'
    )


def fits(words: str, width: float, size: int) -> bool:
    """Whether `words` are surely narrower than `width`."""
    return WORD_WIDTH * size * len(words) <= width


def path(points: Sequence[tuple[float, float]], colour: str, width: float = 2, fill: str = "none") -> Html:
    """A line through pixels."""
    steps = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
    return Html(f'<path d="{steps}" fill="{fill}" fill-opacity="0.25" stroke="{colour}" stroke-width="{width:g}"/>')


def histogram(values: Sequence[float], across: str, up: str) -> str:
    """How often which value came; bars meet at round values."""
    low, high = min(values), max(values)
    step = round_step(max((high - low) / min(24, 4 + len(values) ** 0.5), abs(high) * 1e-4, 1e-9))
    first = math.floor(low / step)
    counts = [0] * (math.floor(high / step) - first + 1)
    for value in values:
        counts[min(max(math.floor(value / step) - first, 0), len(counts) - 1)] += 1
    axes = Axes((first * step, (first + len(counts)) * step), (0, max(counts)))
    parts = axes.frame(across, up, ".0f")
    for number, count in enumerate(counts):
        start, end = axes.across((first + number) * step), axes.across((first + number + 1) * step)
        if count:
            tip = f"{count} of {len(values)}: {(first + number) * step:,.6g} to {(first + number + 1) * step:,.6g}"
            parts.append(rect(start, axes.up(count), end - start, axes.bottom - axes.up(count), "var(--first)", tip))
    return svg(axes.bottom + 44, parts)


def line_plot(
    points: Sequence[tuple[float, float]], across: str, up: str, up_format: str = ",.6g", mark: str = ""
) -> str:
    """A line through points that are sorted by x; `mark` is written at the highest."""
    best = max(points, key=lambda point: point[1])
    axes = Axes((points[0][0], points[-1][0]), (min(y for _, y in points), best[1]))
    drawn = path([(axes.across(x), axes.up(y)) for x, y in points], "var(--first)")
    x, y = axes.across(best[0]), axes.up(best[1])
    marked = [line(x, y, x, axes.bottom, "var(--second)", 1.5), text(x + 8, axes.bottom - 10, mark, size=12)]
    return svg(axes.bottom + 44, [*axes.frame(across, up, up_format), drawn, *(marked if mark else [])])
