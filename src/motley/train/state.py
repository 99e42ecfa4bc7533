"""Checkpoints: the model in Hugging Face form and the training state beside it, complete or absent.

    checkpoints/step-00000100/   config.json, model.safetensors, tokenizer files     the model, for any tool
                                 training.safetensors, training.json                 what going on exactly needs

Training state is safetensors and JSON, so that nothing here ever unpickles a file.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from motley.data.conversation import ConversationEncoder
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json, remove_unfinished, temporary_name, whole_folder, write_json
from motley.model import Transformer
from motley.model.checkpoint import load, write_tensors, write_weights
from motley.train.gather import TIED
from motley.train.worker import Worker

TRAINING_TENSORS, TRAINING_FACTS = "training.safetensors", "training.json"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-????????") if (path / TRAINING_FACTS).is_file())


def save_checkpoint(run: Path, worker: Worker, facts: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write the checkpoint of step facts["step"]; `facts` is every number the loop needs to go on.

    Every worker calls this. Raises InputError on all of them when worker 0 could not write.
    """

    def besides(folder: Path, states: dict[str, Tensor]) -> None:
        write_tensors(states, folder / TRAINING_TENSORS)
        write_json(folder / TRAINING_FACTS, facts)

    _save(step_folder(run, facts["step"]), worker, tokenizer, besides)


def save_model(folder: Path, worker: Worker, tokenizer: Tokenizer) -> None:
    """Write the finished model; as `save_checkpoint`."""
    _save(folder, worker, tokenizer, lambda folder, states: None)


def _save(
    folder: Path, worker: Worker, tokenizer: Tokenizer, besides: Callable[[Path, dict[str, Tensor]], None]
) -> None:
    state = worker.whole_state()

    def write() -> None:
        assert state is not None
        weights, states = state
        with whole_folder(folder) as temporary:
            write_weights(_whole_model(worker, weights), temporary)
            save_tokenizer(tokenizer, temporary, worker.config.max_position_embeddings)
            besides(temporary, states)

    worker.crew.led(write)


def _whole_model(worker: Worker, weights: dict[str, Tensor]) -> Transformer:
    if worker.crew.alone:
        return worker.model
    with torch.device("meta"):
        model = Transformer(worker.config)
    if worker.config.tie_word_embeddings:
        weights = {**weights, TIED: weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights, assign=True)
    if worker.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Tokenizer files for us and for other tools; with a chat template if the vocabulary knows conversations."""
    if tokenizer.has_conversation_tokens:
        ConversationEncoder(tokenizer).save(folder, context_length)
    else:
        tokenizer.save(folder)


def restore(run: Path, worker: Worker) -> dict[str, Any] | None:
    """Put every worker back as it was in the run's newest checkpoint, whatever layout wrote it.

    Returns the loop's facts, or None where there is no checkpoint. Raises InputError, on every worker, when the
    checkpoint does not belong to this model or optimizer.
    """
    found = checkpoints(run)[-1:] if worker.crew.leads else []
    facts, failure, state = None, None, None
    for folder in found:
        try:
            facts = read_json(folder / TRAINING_FACTS)
            saved = load(folder, dtype=None)
            if saved.config != worker.config:
                raise InputError(f"{folder} holds another model than this run's settings ask for; choose another --out")
            state = ({name: tensor.float() for name, tensor in saved.state_dict().items()}, _states(folder, worker))
        except InputError as error:
            failure = str(error)
    if (failure := worker.crew.share(failure)) is not None:
        raise InputError(failure)
    facts = worker.crew.share(facts)
    if facts is not None:
        worker.take_state(state)
    return facts


def _states(folder: Path, worker: Worker) -> dict[str, Tensor]:
    """The optimizer state of a checkpoint. Raises InputError where it is broken or another optimizer's."""
    try:
        states = load_file(folder / TRAINING_TENSORS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{folder / TRAINING_TENSORS} cannot be read ({error}); remove {folder} to go on before it"
        ) from None
    lacking = [name for name in worker.momentum_names() if f"{name}:momentum" not in states]
    if lacking or (states and worker.settings.optimizer == "adamw" and any(n.endswith(":momentum") for n in states)):
        what = f"no state for {lacking[0]}" if lacking else "it holds momentum"
        raise InputError(f"{folder} was written by another optimizer ({what}); choose another --out")
    return states


def prune(run: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best."""
    remove_unfinished(run / "checkpoints")
    best = None if best_step is None else step_folder(run, best_step)
    for folder in checkpoints(run)[:-keep_last]:
        if folder != best:
            going = temporary_name(folder)  # a kill in the middle must leave nothing that looks whole
            os.replace(folder, going)
            shutil.rmtree(going)
