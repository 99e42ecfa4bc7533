"""`motley export`: a model for other tools."""

import shutil
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from motley.data.conversation import ConversationEncoder
from motley.data.tokenizer import Tokenizer
from motley.files import TEMPORARY_MARK, whole_folder, write_json
from motley.model import load
from motley.model.checkpoint import check_replaceable, write_weights
from motley.model.find import find_model


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a Hugging Face folder: transformers, vLLM, SGLang and others read it as it is."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run or a checkpoint folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not hold anything yet, or an earlier export."""
    to: Literal["hf"] = "hf"


def export(config: ExportConfig) -> dict[str, Any]:
    """Write config.out whole or not at all."""
    source = find_model(config.model)
    check_replaceable(config.out)
    for unfinished in config.out.parent.glob(f"{escape(config.out.name)}{TEMPORARY_MARK}*"):
        shutil.rmtree(unfinished)  # of an export to the same place that was killed
    model, tokenizer = load(source), Tokenizer.load(source)
    with whole_folder(config.out) as folder:
        write_weights(model, folder)
        if tokenizer.has_conversation_tokens:
            ConversationEncoder(tokenizer).save(folder, model.config.max_position_embeddings)
        else:
            tokenizer.save(folder)
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        write_json(folder / "generation_config.json", ends)
    return {"model": str(source), "out": str(config.out), "bytes": sum(f.stat().st_size for f in config.out.iterdir())}


def summary(result: dict[str, Any]) -> str:
    return f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, Hugging Face form of {result['model']}"
