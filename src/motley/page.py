"""Pieces of a page: elements that escape what they hold, tables of facts, numbers as people write them.

A page is one file that loads nothing and runs nothing; reports, fleets and plans share its look (`page.css`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from motley.progress import in_words

STYLE_FILE = Path(__file__).with_name("page.css")
# The page loads nothing and runs nothing, even if something slipped in.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Text that is already HTML."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """`<tag class="…">children</tag>`: children that are not Html, and all attributes, are escaped.

    `class_` stands for the attribute `class`.
    """
    names = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{names}>{joined(children)}</{tag}>")


def joined(children: Iterable[str]) -> Html:
    """Children side by side; those that are not Html are escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def whole_page(title: str, body: Sequence[str]) -> str:
    """The file: head, look and content policy around the elements of `body`."""
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'),
        element("title", title),
        element("style", Html(STYLE_FILE.read_text(encoding="utf-8"))),
    ]
    content = element("head", *head) + element("body", element("main", *body))
    return f'<!doctype html>\n<html lang="en">{content}</html>\n'


def facts_table(pairs: Sequence[tuple[str, str | None]]) -> Html:
    """A table of two columns; pairs without a value are left out."""
    rows = [
        element("tr", element("td", name, class_="label"), element("td", value, class_="number"))
        for name, value in pairs
        if value
    ]
    return element("table", *rows) if rows else Html("")


def list_section(title: str, sentences: Sequence[str]) -> Html:
    """A section with a bulleted list; nothing if there is nothing to list."""
    if not sentences:
        return Html("")
    items = [element("li", sentence) for sentence in sentences]
    return element("section", element("h2", title), element("ul", *items))


def figure(title: str, svg: str, caption: str = "") -> Html:
    """A drawing (SVG text of `charts`) with its title and caption."""
    below = [element("figcaption", caption)] if caption else []
    return element("figure", element("div", title, class_="title"), Html(svg), *below)


def as_number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def as_text(value: Any) -> str:
    """A value of a JSON file for people."""
    number = as_number(value)
    if number is None:
        return str(value)
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4g}"


def in_whole(value: Any) -> str | None:
    """`4237760` → `4,237,760`; None if it is no number."""
    number = as_number(value)
    return None if number is None else f"{number:,.0f}"


def in_count(number: float) -> str:
    """`4194304` → `4.19 M`; B are billions, T trillions."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}\N{NO-BREAK SPACE}{letter}"
    return f"{number:,.0f}"


def in_percent(share: float) -> str:
    """`0.784` → `78 %`."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def in_time(seconds: float) -> str:
    """In words that stay on one line."""
    return in_words(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def in_date(iso: str) -> str:
    """`2026-10-23T18:00:00+00:00` → `23 October 2026, 18:00 UTC`; anything else as it is."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def interval_95(result: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of `result["accuracy"]`.

    Wilson's where the count is known (it never leaves 0 to 1), else 1.96 standard errors to each side.
    """
    share, count = float(result["accuracy"]), as_number(result.get("count"))
    if count:
        z2 = 1.96**2
        middle = (share + z2 / (2 * count)) / (1 + z2 / count)
        reach = 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
        return max(0.0, middle - reach), min(1.0, middle + reach)
    reach = 1.96 * (as_number(result.get("standard_error")) or 0.0)
    return max(0.0, share - reach), min(1.0, share + reach)
