"""`motley sft`: a model learns from conversations; only what the assistant says counts."""

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
from motley.parallel.build import as_planned, plan_of
from motley.parallel.carry_out import carry_out, with_crew
from motley.parallel.communicator import Crew
from motley.parallel.elastic.agent import Memory
from motley.parallel.own_inputs import own_data, own_model, prepared_folder
from motley.progress import note
from motley.train.config import FinetuneConfig
from motley.train.input_checks import check_data, check_length
from motley.train.run_folder import Run, as_begun, kept_speed, open_run


def packed_conversations(config: FinetuneConfig, tokenizer: Tokenizer) -> Path:
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


def _inputs(config: FinetuneConfig) -> dict[str, str]:
    return {"files": fingerprint_files(config.data)}


def own(config: FinetuneConfig, data: Path) -> dict[str, str]:
    """What this worker's own --data and --model come to, beside the prepared `data` in use."""

    def inputs() -> dict[str, Any]:
        return inputs_of_conversations(_inputs(config), Tokenizer.load(find_model(config.model)), config.seq_len)

    return {"--data": own_data(config.data, data, inputs), "--model": own_model(str(config.model))}


def finetune(config: FinetuneConfig, machine: Machine | None = None) -> dict[str, Any] | None:
    """Fine-tune config.model; goes on where the same command stopped.

    Returns what the run amounts to; None on workers that do not lead.
    """
    return with_crew(config, own, lambda crew, memory: _finetune(config, crew, machine, memory))


def _finetune(config: FinetuneConfig, crew: Crew, machine: Machine | None, memory: Memory) -> dict[str, Any] | None:
    source = find_model(config.model)
    tokenizer = Tokenizer.load(source)
    shape = ModelConfig.from_hf(read_json(source / "config.json"))
    config = as_begun(config, crew.led(lambda: kept_speed(config.out)))
    config = as_planned(config, crew.led(lambda: plan_of(config)), crew.leads, shape)

    def prepare_run() -> tuple[Path, Run]:
        check_length(shape, config.seq_len)
        data = memory.data or packed_conversations(config, tokenizer)
        check_data(data, CONVERSATIONS, source)
        return data, open_run(config.out, "sft", config, {"data": read_json(data / DATA_FILE).get("fingerprint")})

    data, run = crew.led(prepare_run)
    if run.finished is not None:
        return run.finished

    def weights(device: torch.device) -> Transformer:
        return load(source, device=device).float()

    return carry_out(config, shape, crew, memory, run, data, machine, weights, tokenizer, "fine-tuning")
