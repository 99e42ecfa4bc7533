"""Checkpoints: the model in Hugging Face form and the training state beside it, complete or absent.

    checkpoints/step-00000100/   config.json, model.safetensors, tokenizer files     the model, for any tool
                                 training.safetensors, training.json                 what resuming exactly needs

Training state is safetensors and JSON, so nothing here ever unpickles a file. A checkpoint knows nothing of the ranks
that wrote it: any number of them, in any layout, goes on from it.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from motley.data.conversation import ConversationEncoder
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json, remove_unfinished, temporary_name, whole_folder, write_json
from motley.model import ModelConfig, Transformer
from motley.model.checkpoint import load, write_tensors, write_weights
from motley.progress import note
from motley.train.expert_balance import ExpertBalance
from motley.train.loss_spike import LossSpikeGuard
from motley.train.metrics import records_of
from motley.train.optimizer import OptimizerName, State, momentum_names
from motley.train.run_state import Position, RunState
from motley.train.strategy import Strategy, TrainingState

TRAINING_TENSORS, TRAINING_FACTS = "training.safetensors", "training.json"
TIED = "lm_head.weight"  # where it is the embedding, it is no parameter of its own


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-????????") if (path / TRAINING_FACTS).is_file())


def save_checkpoint(
    run: Path, strategy: Strategy, shared: Mapping[str, Any], own: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the checkpoint of step shared["step"]. Every rank calls this.

    Args:
        run: its folder.
        strategy: that carries out the steps.
        shared: numbers that resuming needs, the same on all ranks.
        own: those that each island of ranks has for itself.
        tokenizer: of the model.

    Raises InputError, on every rank, when one that writes could not.
    """
    saved = strategy.state()
    strategy.save_own(run, shared["step"], own)

    def write() -> None:
        assert saved is not None
        with whole_folder(step_folder(run, shared["step"])) as folder:
            _write_model(folder, strategy, saved, tokenizer)
            for name, tensors in {TRAINING_TENSORS: saved.optimizer, **saved.others}.items():
                write_tensors(tensors, folder / name)
            write_json(folder / TRAINING_FACTS, {**shared, **saved.facts, **own})

    strategy.led(write)


def save_model(folder: Path, strategy: Strategy, tokenizer: Tokenizer) -> None:
    """Write the finished model. Every rank calls this."""
    saved = strategy.state()

    def write() -> None:
        assert saved is not None
        with whole_folder(folder) as temporary:
            _write_model(temporary, strategy, saved, tokenizer)

    strategy.led(write)


def _write_model(folder: Path, strategy: Strategy, saved: TrainingState, tokenizer: Tokenizer) -> None:
    with torch.device("meta"):
        model = Transformer(strategy.shape)
    weights = dict(saved.weights)
    if strategy.shape.tie_word_embeddings:
        weights[TIED] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if strategy.shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    write_weights(model, folder)
    save_tokenizer(tokenizer, folder, strategy.shape.max_position_embeddings)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Tokenizer files for us and for other tools; with a chat template if the vocabulary knows conversations."""
    if tokenizer.has_conversation_tokens:
        ConversationEncoder(tokenizer).save(folder, context_length)
    else:
        tokenizer.save(folder)


@dataclass
class SavedCheckpoint:
    """A checkpoint as it was read, and the facts beside it."""

    state: TrainingState
    facts: dict[str, Any]


def read_checkpoint(folder: Path, shape: ModelConfig, optimizer: OptimizerName) -> SavedCheckpoint:
    """Read a checkpoint of a model of this shape. Raises InputError when it belongs to another model or optimizer."""
    facts = read_json(folder / TRAINING_FACTS)
    model = load(folder, dtype=None)
    if model.config != shape:
        raise InputError(f"{folder} holds another model than this run's settings ask for; choose another --out")
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    others = {
        file.name: load_file(file)
        for file in folder.glob("*.safetensors")
        if file.name != TRAINING_TENSORS and not file.name.startswith("model")
    }
    return SavedCheckpoint(TrainingState(weights, _optimizer_state(folder, shape, optimizer), others), facts)


def _optimizer_state(folder: Path, shape: ModelConfig, optimizer: OptimizerName) -> State:
    """Raises InputError where it is broken or another optimizer's."""
    try:
        states = load_file(folder / TRAINING_TENSORS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{folder / TRAINING_TENSORS} cannot be read ({error}); remove {folder} to go on before it"
        ) from None
    with torch.device("meta"):
        wanted = momentum_names(Transformer(shape), optimizer)
    lacking = [name for name in wanted if f"{name}:momentum" not in states]
    if lacking or (states and optimizer == "adamw" and any(name.endswith(":momentum") for name in states)):
        what = f"no state for {lacking[0]}" if lacking else "it holds momentum"
        raise InputError(f"{folder} was written by another optimizer ({what}); choose another --out")
    return states


def resume(strategy: Strategy) -> RunState:
    """Put every rank back as it was in the run's newest checkpoint, if there is one; where the run stands.

    Raises InputError, on every rank, when the checkpoint does not belong to this model or optimizer.
    """
    config, run = strategy.config, strategy.config.out
    saved: SavedCheckpoint | None = None

    def read() -> dict[str, Any] | None:
        nonlocal saved
        if found := checkpoints(run)[-1:]:
            saved = read_checkpoint(found[0], strategy.shape, config.optimizer)
        return None if saved is None else saved.facts

    if (facts := strategy.led(read)) is None:
        return RunState()
    before = facts["islands"]["count"] if "islands" in facts else 1
    if before != strategy.count and strategy.leads:
        note(f"{before} island{'s' * (before > 1)} wrote the checkpoint, {strategy.count} go on from the shared model")
    own = strategy.load(None if saved is None else saved.state, facts, run)
    strategy.scaler.restore(own["scales"])
    at = Position(**facts["position"])
    recent = records_of(run, at.step) if config.elastic else []
    balance = ExpertBalance(**own.get("balance", {}))  # checkpoints from before there was one
    return RunState(at, LossSpikeGuard(**own["guard"]), recent=recent, balance=balance)


def prune(run: Path, strategy: Strategy, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best. Every rank calls this."""
    if strategy.leads:
        remove_unfinished(run / "checkpoints")
        best = None if best_step is None else step_folder(run, best_step)
        remove_folders(folder for folder in checkpoints(run)[:-keep_last] if folder != best)
    strategy.prune_own(run, lambda: [folder.name for folder in checkpoints(run)])


def remove_folders(folders: Iterable[Path]) -> None:
    """Delete folders so that a kill in the middle leaves nothing that looks whole."""
    for folder in folders:
        going = temporary_name(folder)
        os.replace(folder, going)
        shutil.rmtree(going)
