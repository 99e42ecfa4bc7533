"""`motley sft`: a model learns from conversations; only what the assistant says counts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from motley.data.pack import DATA_FILE, inputs_of_conversations, pack_conversations
from motley.data.shards import CONVERSATIONS
from motley.data.sources import fingerprint_files, read_conversations
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.probe import Machine
from motley.model import ModelConfig, Transformer, load
from motley.model.find import find_model
from motley.progress import note
from motley.train.checkpoint import resume
from motley.train.config import SftConfig
from motley.train.input_checks import check_data, check_length, own_data, own_model, prepared_folder
from motley.train.job import Job, Stage, single_process
from motley.train.run_folder import as_begun, claimed, kept_speed, open_run
from motley.train.trainer import train


def packed_conversations(config: SftConfig, tokenizer: Tokenizer) -> Path:
    """The packed folder that config.data names, or one made in the run folder from its conversations."""
    if (folder := prepared_folder(config.data)) is not None:
        return folder
    if not config.data:
        raise InputError("--data is missing: name jsonl or parquet files with conversations (`messages`)")
    inputs = _inputs(config)
    conversations = read_conversations(config.data)
    packed = pack_conversations(conversations, tokenizer, config.out / "data", config.seq_len, inputs=inputs)
    note(packed.summary())
    return packed.folder


def _inputs(config: SftConfig) -> dict[str, str]:
    return {"files": fingerprint_files(config.data)}


def own_inputs(config: SftConfig, data: Path) -> dict[str, str]:
    """What this rank's own --data and --model come to, beside the prepared `data` in use."""

    def inputs() -> dict[str, Any]:
        return inputs_of_conversations(_inputs(config), Tokenizer.load(find_model(config.model)), config.seq_len)

    return {"--data": own_data(config.data, data, inputs), "--model": own_model(str(config.model))}


def prepare_job(config: SftConfig, data: Path | None = None) -> Job:
    """Open the run folder, pack the conversations unless they are packed in `data`, see that all belongs together."""
    source = find_model(config.model)
    shape = trained_shape(config)
    check_length(shape, config.seq_len)
    data = data or packed_conversations(config, Tokenizer.load(source))
    check_data(data, CONVERSATIONS, source)
    run = open_run(config.out, "sft", config, {"data": read_json(data / DATA_FILE).get("fingerprint")})
    return Job(config, shape, data, run, source, "fine-tuning")


def trained_shape(config: SftConfig) -> ModelConfig:
    """The network of the weights that fine-tuning starts from."""
    return ModelConfig.from_hf(read_json(find_model(config.model) / "config.json"))


def source_weights(job: Job[SftConfig], device: torch.device) -> Transformer:
    """The model to begin with."""
    return load(find_model(job.config.model), device=device).float()


STAGE = Stage(prepare_job, source_weights, own_inputs, trained_shape)


def sft(config: SftConfig, machine: Machine | None = None) -> dict[str, Any]:
    """Fine-tune config.model; goes on where the same command stopped.

    machine: what was measured before, if anything.

    Returns what the run amounts to.
    """
    with claimed(config.out):
        job = prepare_job(as_begun(config, kept_speed(config.out)))
        if job.run.finished is not None:
            return job.run.finished
        strategy = single_process(job, source_weights, machine)
        return job.run.finish(asdict(train(strategy, resume(strategy), job.inputs())))
