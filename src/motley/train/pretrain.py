"""`motley pretrain`: a model from text, a new one or one that goes on."""

import dataclasses
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
from motley.parallel.build import as_planned, plan_of
from motley.parallel.carry_out import carry_out, with_crew
from motley.parallel.communicator import Crew
from motley.parallel.elastic.agent import Memory
from motley.parallel.own_inputs import own_data, own_model, prepared_folder
from motley.plan.network.registry import trainable
from motley.progress import note
from motley.train.config import PretrainConfig
from motley.train.input_checks import check_data, check_length
from motley.train.lr_schedule import check_stages
from motley.train.run_folder import Run, as_begun, kept_speed, open_run


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


def own(config: PretrainConfig, data: Path) -> dict[str, str]:
    """What this worker's own --data and --model come to, beside the prepared `data` in use."""
    found = own_data(config.data, data, lambda: inputs_of(_data_config(config, _source(config))))
    return {"--data": found, "--model": config.model if config.model in SIZES else own_model(config.model)}


def pretrain(config: PretrainConfig, machine: Machine | None = None) -> dict[str, Any] | None:
    """Train a model from random weights, or from those of a folder; goes on where the same command stopped.

    Returns what the run amounts to; None on workers that do not lead.
    """
    return with_crew(config, own, lambda crew, memory: _pretrain(config, crew, machine, memory))


def _pretrain(config: PretrainConfig, crew: Crew, machine: Machine | None, memory: Memory) -> dict[str, Any] | None:
    config = as_begun(config, crew.led(lambda: kept_speed(config.out)))
    config = as_planned(config, crew.led(lambda: plan_of(config)), crew.leads)
    source = _source(config)

    def prepare_run() -> tuple[Path, ModelConfig, Run]:
        check_stages(config.seq_len_warmup, config.seq_len)
        data = memory.data or prepared_data(config, source)
        check_data(data, TEXT, source)
        if source is None:
            shape = new_model_config(config.model, Tokenizer.load(data))
        else:
            shape = ModelConfig.from_hf(read_json(source / "config.json"), str(source / "config.json"))
        check_length(shape, config.seq_len)
        inputs = {"data": read_json(data / DATA_FILE).get("fingerprint")}
        return data, shape, open_run(config.out, "pretrain", config, inputs)

    data, shape, run = crew.led(prepare_run)
    tokenizer = Tokenizer.load(data)
    if run.finished is not None:
        return run.finished

    def weights(device: torch.device) -> Transformer:
        if source is not None:
            return load(source, device=device).float()
        model = Transformer(shape)
        model.initialize(config.seed)
        return model.to(device)

    return carry_out(config, shape, crew, memory, run, data, machine, weights, tokenizer, "pretraining")
