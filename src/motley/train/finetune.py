"""`motley sft`: a model learns from conversations; only what the assistant says counts."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motley.data.pack import DATA_FILE, pack_conversations
from motley.data.shards import CONVERSATIONS
from motley.data.sources import fingerprint_files, read_conversations
from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.files import read_json
from motley.fleet.probe import Machine
from motley.model import ModelConfig, load
from motley.model.find import find_model
from motley.progress import note
from motley.train.checks import check_data, check_length
from motley.train.config import FinetuneConfig
from motley.train.crew import Crew
from motley.train.elastic import Memory, live
from motley.train.loop import train
from motley.train.run import Run, claimed, open_run
from motley.train.start import employ, meet


def packed_conversations(config: FinetuneConfig, tokenizer: Tokenizer) -> Path:
    """The packed folder that config.data names, or one made in the run folder from its conversations."""
    if len(config.data) == 1 and (Path(config.data[0]) / DATA_FILE).is_file():
        return Path(config.data[0])
    if not config.data:
        raise InputError("--data is missing: name jsonl or parquet files with conversations (`messages`)")
    inputs = {"files": fingerprint_files(config.data)}
    conversations = read_conversations(config.data)
    packed = pack_conversations(conversations, tokenizer, config.out / "data", config.seq_len, inputs=inputs)
    note(packed.summary())
    return packed.folder


def finetune(config: FinetuneConfig, machine: Machine | None = None) -> dict[str, Any] | None:
    """Fine-tune config.model; goes on where the same command stopped.

    Returns what the run amounts to; None on workers that do not lead.
    """
    if config.live:
        return live(config, lambda crew, memory: _finetune(config, crew, machine, memory))
    crew = meet(config)
    try:
        with ExitStack() as held:
            crew.led(lambda: held.enter_context(claimed(config.out)))
            return _finetune(config, crew, machine, Memory())
    finally:
        crew.leave()


def _finetune(config: FinetuneConfig, crew: Crew, machine: Machine | None, memory: Memory) -> dict[str, Any] | None:
    source = find_model(config.model)
    tokenizer = Tokenizer.load(source)
    shape = ModelConfig.from_hf(read_json(source / "config.json"))

    def prepare_run() -> tuple[Path, Run]:
        check_length(shape, config.seq_len)
        data = packed_conversations(config, tokenizer)
        check_data(data, CONVERSATIONS, source)
        return data, open_run(config.out, "sft", config, {"data": read_json(data / DATA_FILE).get("fingerprint")})

    data, run = crew.led(prepare_run)
    if run.finished is not None:
        return run.finished
    weights = None if memory.serves(crew) else lambda device: load(source, device=device).float()
    island = employ(config, shape, crew, run, data, machine, weights)
    rows = TokenStream(data, "train", config.seq_len, config.seed)
    held_out = TokenStream(data, "valid", config.seq_len, shuffle=False)
    at = train(island, memory.course(island, data), rows, held_out, tokenizer, "fine-tuning")
    result = crew.led(lambda: run.finish(asdict(at)))
    return result if crew.leads else None
