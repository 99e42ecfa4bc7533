"""`motley pretrain`: a model from text, a new one or one that goes on."""

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from motley.data.pack import DATA_FILE, DataConfig, inputs_of, prepare
from motley.data.shards import TEXT
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.probe import Machine
from motley.model import SIZES, ModelConfig, Transformer, load
from motley.model.find import find_model
from motley.plan.network.registry import trainable
from motley.progress import note
from motley.train.checkpoint import resume
from motley.train.config import PretrainConfig
from motley.train.input_checks import check_data, check_length, own_data, own_model, prepared_folder
from motley.train.job import Job, Stage, single_process
from motley.train.lr_schedule import check_stages
from motley.train.run_folder import as_begun, claimed, kept_speed, open_run
from motley.train.trainer import train


def new_model_config(name: str, tokenizer: Tokenizer) -> ModelConfig:
    """The config of a named network or of a config.json, with the vocabulary and control tokens of `tokenizer`."""
    if name in SIZES:
        config = SIZES[name]
    elif Path(name).is_file():
        config = ModelConfig.from_hf(read_json(Path(name)))
    elif (known := trainable(name)) is not None:
        config = known
    else:
        raise InputError(
            f"--model {name} is neither a size ({', '.join(SIZES)}), nor a published DeepSeek such as v2-lite, nor a "
            "config.json, a run or a checkpoint folder"
        )
    return dataclasses.replace(
        config, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )  # fmt: skip


def prepared_data(config: PretrainConfig, source: Path | None) -> Path:
    """The prepared folder that config.data names, or one made in the run folder from the text it names.

    Text becomes tokens of the model at `source`, if there is one.
    """
    if (folder := prepared_folder(config.data)) is not None:
        return folder
    prepared = prepare(_data_config(config, source), config.out / "data")
    note(prepared.summary())
    return prepared.folder


def _data_config(config: PretrainConfig, source: Path | None) -> DataConfig:
    return DataConfig(data=config.data, tokenizer=source, seed=config.seed)


def _source(config: PretrainConfig) -> Path | None:
    """The folder of the weights to start from, if --model names any."""
    return find_model(Path(config.model)) if config.model not in SIZES and Path(config.model).is_dir() else None


def own_inputs(config: PretrainConfig, data: Path) -> dict[str, str]:
    """What this rank's own --data and --model come to, beside the prepared `data` in use."""
    found = own_data(config.data, data, lambda: inputs_of(_data_config(config, _source(config))))
    return {"--data": found, "--model": config.model if config.model in SIZES else own_model(config.model)}


def prepare_job(config: PretrainConfig, data: Path | None = None) -> Job:
    """Open the run folder, prepare the data unless it is prepared in `data`, see that all belongs together."""
    source = _source(config)
    check_stages(config.seq_len_warmup, config.seq_len)
    data = data or prepared_data(config, source)
    check_data(data, TEXT, source)
    if source is None:
        shape = new_model_config(config.model, Tokenizer.load(data))
    else:
        shape = ModelConfig.from_hf(read_json(source / "config.json"), str(source / "config.json"))
    check_length(shape, config.seq_len)
    run = open_run(config.out, "pretrain", config, {"data": read_json(data / DATA_FILE).get("fingerprint")})
    return Job(config, shape, data, run, data, "pretraining")


def new_weights(job: Job[PretrainConfig], device: torch.device) -> Transformer:
    """The model to begin with: random weights, or those of the folder that --model names."""
    if (source := _source(job.config)) is not None:
        return load(source, device=device).float()
    model = Transformer(job.shape)
    model.initialize(job.config.seed)
    return model.to(device)


STAGE = Stage(prepare_job, new_weights, own_inputs)


def pretrain(config: PretrainConfig, machine: Machine | None = None) -> dict[str, Any]:
    """Train a model from random weights, or from those of a folder; goes on where the same command stopped.

    machine: what was measured before, if anything.

    Returns what the run amounts to.
    """
    with claimed(config.out):
        job = prepare_job(as_begun(config, kept_speed(config.out)))
        if job.run.finished is not None:
            return job.run.finished
        strategy = single_process(job, new_weights, machine)
        return job.run.finish(asdict(train(strategy, resume(strategy), job.inputs())))
