"""Checkpoints: the model in Hugging Face form and the training state beside it, complete or absent.

    checkpoints/step-00000100/   config.json, model.safetensors, tokenizer files     the model, for any tool
                                 training.safetensors, training.json                 what going on exactly needs

    islands/1/step-00000100/     training.safetensors, training.json             what island 1 alone needs besides

Training state is safetensors and JSON, so that nothing here ever unpickles a file. Of several islands each leader
writes its own part where it is: a checkpoint sends nothing over a slow link. The model is the one that all share.
"""

import os
import shutil
from collections.abc import Callable, Iterable
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
from motley.parallel.diloco.diloco import Island
from motley.parallel.full_state import TIED, State
from motley.parallel.rank import Worker
from motley.progress import note

TRAINING_TENSORS, TRAINING_FACTS = "training.safetensors", "training.json"
OUTER_TENSORS = "outer.safetensors"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-????????") if (path / TRAINING_FACTS).is_file())


def own_folder(run: Path, island: Island) -> Path:
    """Where an island keeps what it alone needs."""
    return run / "islands" / str(island.number)


def save_checkpoint(
    run: Path, island: Island, facts: dict[str, Any], own_facts: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the checkpoint of step facts["step"].

    Every worker calls this. Raises InputError on all of them when one that writes could not.

    Args:
        run: its folder.
        island: this worker's.
        facts: every number the loop needs to go on.
        own_facts: those that each island has for itself.
        tokenizer: of the model.
    """
    state = island.whole_state()
    if island.count > 1:
        _save_own(own_folder(run, island) / step_folder(run, facts["step"]).name, island, state, own_facts)

    def besides(folder: Path, states: dict[str, Tensor]) -> None:
        write_tensors(states, folder / TRAINING_TENSORS)
        if island.count > 1:
            write_tensors(island.momentum(), folder / OUTER_TENSORS)
        write_json(folder / TRAINING_FACTS, facts | island.facts() | own_facts)

    _save(step_folder(run, facts["step"]), island, state, tokenizer, besides)


def save_model(folder: Path, island: Island, tokenizer: Tokenizer) -> None:
    """Write the finished model; as `save_checkpoint`."""
    _save(folder, island, island.whole_state(), tokenizer, lambda folder, states: None)


def _save_own(folder: Path, island: Island, state: tuple[State, State] | None, own_facts: dict[str, Any]) -> None:
    """Every island's leader writes what only its island has; a failure of one is raised on all workers."""
    failure, own = None, island.own_state(state)
    if own is not None:
        tensors, numbers = own
        try:
            with whole_folder(folder) as temporary:
                write_tensors(tensors, temporary / TRAINING_TENSORS)
                write_json(temporary / TRAINING_FACTS, {**own_facts, **numbers})
        except InputError as error:
            failure = str(error)
    for reason in island.world.all_values(failure):
        if reason is not None:
            raise InputError(reason)


def _save(
    folder: Path,
    island: Island,
    state: tuple[State, State] | None,
    tokenizer: Tokenizer,
    besides: Callable[[Path, dict[str, Tensor]], None],
) -> None:
    def write() -> None:
        assert state is not None
        weights, states = state
        with whole_folder(folder) as temporary:
            write_weights(_whole_model(island.worker, weights), temporary)
            save_tokenizer(tokenizer, temporary, island.config.max_position_embeddings)
            besides(temporary, states)

    island.world.led(write)


def _whole_model(worker: Worker, weights: dict[str, Tensor]) -> Transformer:
    if worker.crew.alone and worker.crew.whole is None:
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


def restore(run: Path, island: Island) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Put every worker back as it was in the run's newest checkpoint, whatever layout or number of islands wrote it.

    Returns (the loop's facts, those of this island), or None where there is no checkpoint. Raises InputError, on every
    worker, when the checkpoint does not belong to this model or optimizer.
    """
    found = checkpoints(run)[-1:] if island.world.leads else []
    facts, failure, state, momentum = None, None, None, None
    for folder in found:
        try:
            facts = read_json(folder / TRAINING_FACTS)
            saved = load(folder, dtype=None)
            if saved.config != island.config:
                raise InputError(f"{folder} holds another model than this run's settings ask for; choose another --out")
            states = _states(folder, island.worker)
            state = {name: tensor.float() for name, tensor in saved.state_dict().items()}, states
            if (folder / OUTER_TENSORS).is_file():
                momentum = load_file(folder / OUTER_TENSORS)
        except InputError as error:
            failure = str(error)
    if (failure := island.world.share(failure)) is not None:
        raise InputError(failure)
    facts = island.world.share(facts)
    if facts is None:
        return None
    own = _own(own_folder(run, island) / step_folder(run, facts["step"]).name, island, facts)
    island.take_state(state, momentum, own)
    island.go_on(facts)
    return facts, island.worker.crew.share(facts if own is None else own[1])


def _own(folder: Path, island: Island, facts: dict[str, Any]) -> tuple[State, dict[str, Any]] | None:
    """What the leader of an island saved for it alone; None where it saved nothing, which is said aloud."""
    before = facts["islands"]["count"] if "islands" in facts else 1
    if before != island.count and island.world.leads:
        note(f"{before} island{'s' * (before > 1)} wrote the checkpoint, {island.count} go on from the shared model")
    if island.count == 1 or not island.worker.crew.leads:
        return None
    # One island writes nothing of its own: what lies there then, a save that was killed left of islands before it.
    if before > 1 and island.number < before and (folder / TRAINING_FACTS).is_file():
        return load_file(folder / TRAINING_TENSORS), read_json(folder / TRAINING_FACTS)
    note(
        f"island {island.number} finds nothing of its own in {folder}: it begins from the shared model, with "
        f"{'the optimizer state of the checkpoint' if island.number == 0 else 'a new optimizer'}"
    )
    return None


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


def prune(run: Path, island: Island, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best. Every worker calls this."""
    if island.world.leads:
        remove_unfinished(run / "checkpoints")
        best = None if best_step is None else step_folder(run, best_step)
        _remove(folder for folder in checkpoints(run)[:-keep_last] if folder != best)
    if island.count > 1:
        kept = set(island.world.share([folder.name for folder in checkpoints(run)] if island.world.leads else []))
        if island.worker.crew.leads:
            remove_unfinished(own_folder(run, island))
            _remove(folder for folder in own_folder(run, island).glob("step-????????") if folder.name not in kept)


def _remove(folders: Iterable[Path]) -> None:
    """A kill in the middle leaves nothing that looks whole."""
    for folder in folders:
        going = temporary_name(folder)
        os.replace(folder, going)
        shutil.rmtree(going)
