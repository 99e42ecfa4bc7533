"""Tables and sentences as plain text for the terminal."""

import io

from rich.console import Console
from rich.table import Table


def as_text(*parts: Table | str, width: int) -> str:
    """Tables at most `width` letters wide; sentences as they are; empty ones left out."""
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        for part in parts:
            if part:
                console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    return captured.get().rstrip()
