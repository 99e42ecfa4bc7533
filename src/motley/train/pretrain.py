"""`motley pretrain`: a model from text, a new one or one that goes on."""

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motley.data.pack import DATA_FILE, DataConfig, prepare
from motley.data.shards import TEXT
from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.device import choose_device, compute_dtype
from motley.fleet.probe import Machine
from motley.model import SIZES, ModelConfig, Transformer, load
from motley.model.find import find_model
from motley.progress import note
from motley.train.checks import check_data, check_length
from motley.train.config import PretrainConfig
from motley.train.loop import train
from motley.train.memory import check_memory
from motley.train.run import claimed, open_run


def new_model_config(name: str, tokenizer: Tokenizer) -> ModelConfig:
    """The config of a named size or of a config.json, with the vocabulary and control tokens of `tokenizer`."""
    if name in SIZES:
        config = SIZES[name]
    elif Path(name).is_file():
        config = ModelConfig.from_hf(read_json(Path(name)))
    else:
        raise InputError(
            f"--model {name} is neither a size ({', '.join(SIZES)}) nor a config.json, a run or a checkpoint folder"
        )
    return dataclasses.replace(
        config, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )  # fmt: skip


def prepared_data(config: PretrainConfig, source: Path | None) -> Path:
    """The prepared folder that config.data names, or one made in the run folder from the text it names.

    Text becomes tokens of the model at `source`, if there is one.
    """
    if len(config.data) == 1 and (Path(config.data[0]) / DATA_FILE).is_file():
        return Path(config.data[0])
    prepared = prepare(DataConfig(data=config.data, tokenizer=source, seed=config.seed), config.out / "data")
    note(prepared.summary())
    return prepared.folder


def pretrain(config: PretrainConfig, machine: Machine | None = None) -> dict[str, Any]:
    """Train a model from random weights, or from those of a folder; goes on where the same command stopped.

    Returns what the run amounts to.
    """
    with claimed(config.out):
        return _pretrain(config, machine)


def _pretrain(config: PretrainConfig, machine: Machine | None) -> dict[str, Any]:
    source = find_model(Path(config.model)) if config.model not in SIZES and Path(config.model).is_dir() else None
    data = prepared_data(config, source)
    check_data(data, TEXT, source)
    tokenizer = Tokenizer.load(data)
    if source is None:
        shape = new_model_config(config.model, tokenizer)
    else:
        shape = ModelConfig.from_hf(read_json(source / "config.json"))
    check_length(shape, config.seq_len)
    run = open_run(config.out, "pretrain", config, {"data": read_json(data / DATA_FILE).get("fingerprint")})
    if run.finished is not None:
        return run.finished
    device = choose_device(config.device)
    check_memory(shape, config.optimizer, device)
    if source is None:
        model = Transformer(shape)
        model.initialize(config.seed)
        model.to(device)
    else:
        model = load(source, device=device).float()
    model.compute_dtype = compute_dtype(config.precision, lambda: run.machine(device, machine))
    model.recompute = config.recompute
    rows = TokenStream(data, "train", config.seq_len, config.seed)
    held_out = TokenStream(data, "valid", config.seq_len, shuffle=False)
    return run.finish(asdict(train(model, rows, held_out, tokenizer, config, "pretraining")))
