"""Do model, data and machine belong together? Asked before anything is trained: token ids fit any model that is large
enough, and the loss of a mistake looks like a number.

`own_data` and `own_model` say what --data and --model come to, so that ranks can compare theirs with rank 0's. Prepared
data goes by its fingerprint and weights by their bytes, wherever they lie. Text and conversations are what the prepared
data was made from or not: names, sizes and times of change, as where the same command goes on.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from motley.data.shards import DATA_FILE, Prepared, differences
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.probe import device_memory, host_memory, in_gigabytes
from motley.model import ModelConfig
from motley.model.find import find_model
from motley.plan.network.flops import network_parts
from motley.train.optimizer import MOMENTS, Moments, OptimizerName

FP32_BYTES = 4
STATES = {"muon": 1, "adamw": 2}  # tensors of a parameter's size (Muon leaves AdamW's two to the few others)
MISSING = "missing"
SAMPLE_BYTES = 1 << 20
"""Read at the beginning, in the middle and at the end of each file of weights: all of a large model would take long."""


def check_data(folder: Path, kind: str, model: Path | None) -> None:
    """Raises InputError unless `folder` holds data of this kind, in tokens of `model`'s tokenizer.

    Args:
        folder: the prepared data.
        kind: "text" or "conversations".
        model: the model's folder; None for a model that is new and takes the tokenizer of its data.
    """
    prepared = Prepared.load(folder)
    if prepared.kind != kind:
        raise InputError(f"{folder} holds {prepared.kind}, and here --data must hold {kind}; choose another folder")
    if model is not None and prepared.tokenizer.definition != Tokenizer.load(model).definition:
        raise InputError(
            f"{folder} was made with another tokenizer than that of {model}; make it anew with the model's own "
            f"(`motley data --tokenizer {model}` for text)"
        )


def check_length(config: ModelConfig, seq_len: int) -> None:
    """Raises InputError when a row has more tokens than the model has positions."""
    if config.max_position_embeddings < seq_len:
        raise InputError(f"--seq-len {seq_len} is longer than the model's {config.max_position_embeddings} positions")


def state_bytes(config: ModelConfig, optimizer: OptimizerName, moments: Moments = "fp32") -> int:
    """The least that training holds: weights, gradients and optimizer state; activations come on top."""
    each = 2 * FP32_BYTES + STATES[optimizer] * MOMENTS[moments].itemsize
    return sum(part.parameters for part in network_parts(config, 0)) * each


def check_memory(
    config: ModelConfig, optimizer: OptimizerName, device: torch.device, moments: Moments = "fp32"
) -> None:
    """Raises InputError when `device` cannot hold the training state of such a model."""
    held = device_memory(device)[1] or host_memory()[0]
    needed = state_bytes(config, optimizer, moments)
    if needed > held:
        raise InputError(
            f"training this model takes at least {in_gigabytes(needed)} for weights, gradients and optimizer state, "
            f"and {device} has {in_gigabytes(held)}; choose a smaller --model"
        )


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
        inputs: from what this rank would prepare data.
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
