"""`about.json` beside a model: a description by its author, and default settings for questions."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from motley.errors import InputError
from motley.files import read_json
from motley.infer.engine import Engine
from motley.plan.network.flops import active_parameters, parameters


class Defaults(BaseModel):
    """Settings that the user left open; the field `defaults` of the file."""

    thinking: bool = True
    remember: bool = True  # send earlier messages along
    temperature: float = 0.6
    max_tokens: int = 1024


def read_file(folder: Path) -> dict[str, Any]:
    """The content of the file, empty if there is none. Raises InputError if it is invalid."""
    file = folder / "about.json"
    values = read_json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object")
    try:
        Defaults.model_validate(values.get("defaults", {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file}: {'.'.join(['defaults', *map(str, first['loc'])])}: {first['msg']}") from None
    return values


def read_defaults(folder: Path) -> Defaults:
    return Defaults.model_validate(read_file(folder).get("defaults", {}))


def read_about(folder: Path, engine: Engine) -> dict[str, Any]:
    """What the page shows: the file, and facts about the model."""
    config = engine.model.config
    name = folder.parent.name if folder.name in ("model", "export") or folder.name.startswith("step-") else folder.name
    fallback = {"model": name or "model", "about": [], "prompts": [], "accuracy": None}
    return {**fallback, **read_file(folder), "parameters": parameters(config),
            "active_parameters": active_parameters(config), "context_length": engine.context_length}  # fmt: skip
