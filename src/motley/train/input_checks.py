"""Do model and data belong together? Asked before anything is trained or measured: token ids fit any model that is
large enough, and the loss of a mistake looks like a number.
"""

from pathlib import Path

from motley.data.shards import Prepared
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.model import ModelConfig


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
