"""Checkpoints: the model in Hugging Face form and the training state beside it, complete or absent.

    checkpoints/step-00000100/   config.json, model.safetensors, tokenizer files     the model, for any tool
                                 training.safetensors, training.json                 what going on exactly needs

Training state is safetensors and JSON, so that nothing here ever unpickles a file.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from motley.data.conversation import ConversationEncoder
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json, remove_unfinished, temporary_name, whole_folder, write_json
from motley.model import Transformer
from motley.model.checkpoint import load, write_tensors, write_weights
from motley.train.optimizer import Optimizer

TRAINING_TENSORS, TRAINING_FACTS = "training.safetensors", "training.json"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-????????") if (path / TRAINING_FACTS).is_file())


def save_checkpoint(
    run: Path, model: Transformer, optimizer: Optimizer, facts: dict[str, Any], tokenizer: Tokenizer
) -> Path:
    """Write the checkpoint of step facts["step"]; `facts` is every number the loop needs to go on."""
    folder = step_folder(run, facts["step"])
    with whole_folder(folder) as temporary:
        write_weights(model, temporary)
        save_tokenizer(tokenizer, temporary, model.config.max_position_embeddings)
        write_tensors(optimizer.state_tensors(), temporary / TRAINING_TENSORS)
        write_json(temporary / TRAINING_FACTS, facts)
    return folder


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Tokenizer files for us and for other tools; with a chat template if the vocabulary knows conversations."""
    if tokenizer.has_conversation_tokens:
        ConversationEncoder(tokenizer).save(folder, context_length)
    else:
        tokenizer.save(folder)


def restore(folder: Path, model: Transformer, optimizer: Optimizer) -> dict[str, Any]:
    """Put model and optimizer back as they were at `folder`; returns the loop's facts.

    Raises InputError when the checkpoint does not belong to this model or optimizer.
    """
    facts = read_json(folder / TRAINING_FACTS)
    saved = load(folder, dtype=None, device=model.device)
    if saved.config != model.config:
        raise InputError(f"{folder} holds another model than this run's settings ask for; choose another --out")
    model.load_state_dict(saved.state_dict())
    try:
        optimizer.load_state_tensors(load_file(folder / TRAINING_TENSORS))
    except KeyError as error:
        raise InputError(
            f"{folder} was written by another optimizer (no state for {error}); choose another --out"
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{folder / TRAINING_TENSORS} cannot be read ({error}); remove {folder} to go on before it"
        ) from None
    return facts


def prune(run: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best."""
    remove_unfinished(run / "checkpoints")
    best = None if best_step is None else step_folder(run, best_step)
    for folder in checkpoints(run)[:-keep_last]:
        if folder != best:
            going = temporary_name(folder)  # a kill in the middle must leave nothing that looks whole
            os.replace(folder, going)
            shutil.rmtree(going)
