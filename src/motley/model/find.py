"""Find the model in a folder: commands accept a run or a checkpoint."""

from pathlib import Path

from motley.errors import InputError
from motley.files import read_json

STAGES = ("export", "rl", "sft", "pretrain")  # what was trained last comes first


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a model's config.json (a run's own config.json has no model_type)."""
    config = folder / "config.json"
    return config.is_file() and isinstance(values := read_json(config), dict) and "model_type" in values


def find_model(path: Path) -> Path:
    """The model folder that `path` means: itself, its finished model, its newest checkpoint, or its last stage's.

    Raises InputError saying where was looked.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name a run (runs/NAME) or a folder with config.json and weights")
    for candidate in (path, *(path / stage for stage in STAGES)):
        if not candidate.is_dir():
            continue
        if is_model(candidate):
            return candidate
        if is_model(candidate / "model"):
            return candidate / "model"
        newest = sorted((candidate / "checkpoints").glob("step-????????"))
        if newest:
            return newest[-1]
    raise InputError(
        f"{path} holds no model: looked for config.json with model_type, model/, checkpoints/step-*, and in "
        f"{', '.join(STAGES)}"
    )
