"""Load a model and its tokenizer from a run or checkpoint folder."""

from pathlib import Path

from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.fleet.device import choose_device
from motley.infer.engine import Engine
from motley.model import load
from motley.model.find import find_model


def open_engine(path: Path, device: str = "auto") -> Engine:
    """The model of a run or checkpoint folder, on `device`, with its tokenizer.

    Raises InputError if there is no model, or if its tokenizer has more tokens than the model.
    """
    folder = find_model(path)
    tokenizer = Tokenizer.load(folder)
    model = load(folder, device=choose_device(device))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, but the model knows "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return Engine(model, tokenizer)
