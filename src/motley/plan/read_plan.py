"""Read a plan file, also one that an earlier version wrote under other names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motley.errors import InputError
from motley.files import read_json
from motley.progress import note

PLAN_VERSION = 2
RENAMED = {"teams": "groups", "engine": "framework"}
"""Key of a plan file of version 1 → its name now."""


def read_plan(file: Path) -> dict[str, Any]:
    """The plan in `file`, under the names of today. Says in one line which keys of an earlier version were renamed.

    Raises InputError for what is no plan.
    """
    values = read_json(file)
    if isinstance(values, dict) and (old := [key for key in RENAMED if key in values and RENAMED[key] not in values]):
        said = ", ".join(f"{key!r} is {RENAMED[key]!r} now" for key in old)
        note(f"{file} was written by an earlier version of motley: {said}")
        values = with_present_names(values)
    if not isinstance(values, dict) or not all(isinstance(values.get(key), list) for key in ("pools", "groups")):
        raise InputError(f"{file} is no plan as `motley plan --out` writes it")
    return values


def with_present_names(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with keys of an earlier version renamed."""
    return {RENAMED.get(key, key): value for key, value in plan.items()}
