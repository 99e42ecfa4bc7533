"""What a worker's own --data and --model come to: those of worker 0 are used, and other ones must not pass unseen.

    torchrun   all compare with worker 0 before the first step          one that differs is named on all
    --live     a newcomer compares with what the crew at work has       it alone is sent away

Prepared data goes by its fingerprint and weights by their bytes, wherever they lie. Text and conversations are what the
prepared data was made from or not: names, sizes and times of change, as where the same command goes on.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motley.data.shards import DATA_FILE, differences
from motley.errors import InputError
from motley.files import read_json
from motley.model import ModelConfig
from motley.model.find import find_model

MISSING = "missing"
SAMPLE_BYTES = 1 << 20
"""Read at the beginning, in the middle and at the end of each file of weights: all of a large model would take long."""


def prepared_folder(given: Sequence[str]) -> Path | None:
    """The prepared folder that --data names, if it names one."""
    return Path(given[0]) if len(given) == 1 and (Path(given[0]) / DATA_FILE).is_file() else None


def fingerprint(data: Path) -> str:
    """Of prepared data, if it is there, as long as people compare it."""
    return str(read_json(data / DATA_FILE).get("fingerprint"))[:12] if (data / DATA_FILE).is_file() else MISSING


def own_data(given: Sequence[str], used: Path, inputs: Callable[[], Mapping[str, Any]]) -> str:
    """The fingerprint of the data that --data names, or in words how it differs from the data in use.

    Args:
        given: what --data names.
        used: the prepared data in use.
        inputs: from what this worker would prepare data.
    """
    if (folder := prepared_folder(given)) is not None:
        return fingerprint(folder)
    if fingerprint(used) == MISSING:
        return MISSING
    try:
        other = differences(used, inputs())
    except InputError as error:
        return f"{MISSING} ({error})"
    if not given:  # the standard library of each machine: another one is no other wish
        other = [name for name in other if name != "files"]
    return f"other than {used} was made from (different: {', '.join(other)})" if other else fingerprint(used)


def own_model(model: str) -> str:
    """A fingerprint of the weights in the folder, or of the network in the file, that --model names; else the name."""
    path = Path(model)
    try:
        if path.is_dir():
            return _of_weights(find_model(path))
        if path.is_file():
            return hashlib.sha256(str(ModelConfig.from_hf(read_json(path))).encode()).hexdigest()[:12]
    except InputError:
        return MISSING
    return model


def _of_weights(folder: Path) -> str:
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                stream.seek(start)
                found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()[:12]
