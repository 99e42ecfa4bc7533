"""Models on disk: Hugging Face folders with Hugging Face's tensor names, memory-mapped, one tensor at a time.

    on disk                                               in memory
    model.layers.3.mlp.experts.{e}.gate_proj.weight  ┐
    model.layers.3.mlp.experts.{e}.up_proj.weight    ┴──▶ model.layers.3.mlp.experts.gate_up_proj [experts, 2 i, h]
    model.layers.3.mlp.experts.{e}.down_proj.weight  ───▶ model.layers.3.mlp.experts.down_proj    [experts, h, i]
    model.layers.{L + k}.…  (MTP)                    ───▶ mtp.{k}.…

Nothing from a checkpoint is ever executed or unpickled.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from motley.errors import InputError
from motley.files import read_json, whole_folder, write_json
from motley.model.config import ModelConfig
from motley.model.find import is_model
from motley.model.quantize import SCALE_SUFFIX, dequantize_in_bands
from motley.model.rotary import Rotary
from motley.model.safetensors_header import Entry, read_header
from motley.model.transformer import Transformer

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
REPLACEABLE = {  # what may lie beside the weights and is written anew with them
    CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "about.json",
}  # fmt: skip
SHARD_BYTES = 5 << 30
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = "F8_E4M3"
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # of FP8 weights; U8 holds the exponents that F8_E8M0 does


# ------------------------------------------------------------------------------------------ names


@dataclass(frozen=True)
class StoredTensor:
    """The tensor in memory that one on disk is stored from: a parameter, or a slice of a stacked one."""

    name: str
    expert: int | None = None
    first_row: int | None = None
    end_row: int | None = None

    def within(self, parameter: Tensor) -> Tensor:
        """The part of `parameter` that is this tensor, as a view."""
        return parameter if self.expert is None else parameter[self.expert, self.first_row : self.end_row]


def stored_tensors(model: Transformer) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint form of `model`, by its name on disk."""
    found: dict[str, StoredTensor] = {}
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    }
    for name, tensor in tensors.items():
        disk = _disk_name(name, model.config.num_hidden_layers)
        if name.endswith("experts.gate_up_proj"):
            inner = tensor.shape[1] // 2
            for expert in range(tensor.shape[0]):
                stem = f"{disk.removesuffix('gate_up_proj')}{expert}"
                found[f"{stem}.gate_proj.weight"] = StoredTensor(name, expert, 0, inner)
                found[f"{stem}.up_proj.weight"] = StoredTensor(name, expert, inner)
        elif name.endswith("experts.down_proj"):
            for expert in range(tensor.shape[0]):
                found[f"{disk.removesuffix('down_proj')}{expert}.down_proj.weight"] = StoredTensor(name, expert)
        else:
            found[disk] = StoredTensor(name)
    return found


def _disk_name(name: str, layers: int) -> str:
    if not (match := re.fullmatch(r"mtp\.(\d+)\.(.*)", name)):
        return name
    depth, rest = match.groups()
    rest = rest.removeprefix("block.")
    rest = "shared_head.norm.weight" if rest == "norm.weight" else rest
    return f"model.layers.{layers + int(depth)}.{rest}"


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Names under which published files repeat the embedding and the head for MTP, and what they repeat."""
    copies = {} if not config.tie_word_embeddings else {"lm_head.weight": "model.embed_tokens.weight"}
    for depth in range(config.num_nextn_predict_layers):
        stem = f"model.layers.{config.num_hidden_layers + depth}"
        copies |= {
            f"{stem}.embed_tokens.weight": "model.embed_tokens.weight",
            f"{stem}.shared_head.head.weight": "lm_head.weight",
        }
    return copies


# ------------------------------------------------------------------------------------------ reading


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = False,
) -> Transformer:
    """Read a Hugging Face folder; returns the model in eval mode.

    Tensors are read one after another from memory-mapped shards straight into the parameters, so that there is never a
    second copy of the model.

    Args:
        path: folder with config.json and safetensors.
        dtype: of the parameters; None keeps the checkpoint's own (bf16 where it is FP8).
        device: where they go; None is the CPU.
        check_finite: also look for NaN and infinity in every tensor.

    Raises InputError naming file and tensor for anything that is not a whole checkpoint of a known architecture.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a checkpoint is a folder with config.json and safetensors")
    values = read_json(folder / CONFIG)
    config = ModelConfig.from_hf(values, folder / CONFIG)
    block = _fp8_block(folder, values)
    files = _tensor_files(folder)
    config = _without_missing_mtp(folder, config, files)
    with torch.device("meta"):
        model = Transformer(config)
    stored = stored_tensors(model)
    copies = shared_copies(config)
    headers = {file: read_header(file) for file in sorted(set(files.values()))}
    entries = {name: headers[file].get(name) for name, file in files.items()}
    _check_names(folder, files, entries, stored, copies)
    target = dtype or _own_dtype(entries)
    device = torch.device(device or "cpu")
    _materialize(model, target, device)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    done: set[str] = set()
    for file in headers:
        with safe_open(file, framework="pt") as shard:
            for name in (name for name in stored if files.get(name) == file):
                part = stored[name].within(tensors[stored[name].name])
                part.data.copy_(_read(folder, files, entries, shard, name, part.shape, block, target, check_finite))
                done.add(name)
    missing = [name for name in stored if name not in done]
    if missing:
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )
    return model.eval()


def _without_missing_mtp(folder: Path, config: ModelConfig, files: dict[str, Path]) -> ModelConfig:
    """Some tools keep `num_nextn_predict_layers` in config.json but drop the MTP weights; then there are no modules."""
    first = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(first) for name in files):
        warnings.warn(f"{folder} has no MTP weights though its config.json counts them; loaded without", stacklevel=3)
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def _fp8_block(folder: Path, values: dict[str, Any]) -> tuple[int, int]:
    """Block size of FP8 weights. Raises InputError for another way of quantising."""
    quantization = values.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise InputError(f"{folder / CONFIG}: quantization_config is {quantization!r}; it must be an object or null")
    method, form = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    if quantization and (method, form) != ("fp8", "e4m3"):
        raise InputError(
            f"{folder / CONFIG}: quantization {method!r} is not supported, nor is a form other than e4m3; "
            "DeepSeek's block-scaled fp8 (e4m3), bf16, fp16 and fp32 are"
        )
    block = quantization.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputError(f"{folder / CONFIG}: weight_block_size is {block!r}; it must be two sizes such as [128, 128]")
    return block[0], block[1]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / INDEX
    if index.is_file():
        mapping = read_json(index).get("weight_map") if isinstance(read_json(index), dict) else None
        if not isinstance(mapping, dict) or not mapping:
            raise InputError(f"{index} has no weight_map")
        for name, file in mapping.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(
                    f"{index}: tensor {name} is said to be in {file!r}, which is not a safetensors file of this folder"
                )
        for file in sorted(set(mapping.values())):
            if not (folder / file).is_file():
                raise InputError(f"{folder / file} is missing; {INDEX} names it")
        return {name: folder / file for name, file in mapping.items()}
    if (folder / SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), folder / SINGLE)
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
    if pickles:
        raise InputError(
            f"{folder / pickles[0]} is a pickle, which can run code and is never opened here; "
            "convert it to safetensors where you trust it"
        )
    raise InputError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")


def _check_names(
    folder: Path,
    files: dict[str, Path],
    entries: dict[str, Entry | None],
    stored: dict[str, StoredTensor],
    copies: dict[str, str],
) -> None:
    for name, entry in entries.items():
        if entry is None:
            raise InputError(f"{files[name]}: tensor {name} is missing, though {INDEX} says it is there")
    for name in stored:
        if name not in entries and name not in copies:
            raise InputError(f"{folder}: tensor {name} is missing")
    known = stored.keys() | copies.keys()
    for name in entries:
        base = name.removesuffix(SCALE_SUFFIX)
        if name not in known and not (base != name and base in known) and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(
                f"{files[name]}: tensor {name} is not part of this architecture; is config.json the right one?"
            )


def _own_dtype(entries: dict[str, Entry | None]) -> torch.dtype:
    """That of the embedding, which every architecture has and FP8 checkpoints keep in bf16."""
    entry = entries["model.embed_tokens.weight"]
    assert entry is not None
    return FLOATS.get(entry.dtype, torch.bfloat16)


def _materialize(model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
    """Give the meta model memory; what no checkpoint holds (rotary frequencies) is computed."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name,
                torch.empty(buffer.shape, dtype=torch.float32, device=device),
                name not in module._non_persistent_buffers_set,
            )
    model.rotary = Rotary(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _read(
    folder: Path, files: dict[str, Path], entries: dict[str, Entry | None], shard: Any, name: str, shape: torch.Size,
    block: tuple[int, int], dtype: torch.dtype, check_finite: bool,
) -> Tensor:  # fmt: skip
    """One tensor in real values, checked."""
    entry, file = entries[name], files[name]
    assert entry is not None
    if entry.shape != tuple(shape):
        raise InputError(f"{file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
    if entry.dtype == FP8:
        value = _read_fp8(files, entries, shard, name, block, dtype)
    elif entry.dtype in FLOATS:
        value = shard.get_tensor(name)
    else:
        raise InputError(f"{file}: tensor {name} has dtype {entry.dtype}; read are {', '.join([*FLOATS, FP8])}")
    if check_finite and not bool(torch.isfinite(value).all()):
        raise InputError(f"{file}: tensor {name} holds NaN or infinity")
    return value


def _read_fp8(
    files: dict[str, Path], entries: dict[str, Entry | None], shard: Any, name: str,
    block: tuple[int, int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One FP8 matrix times its scales, which may lie in another file."""
    entry, file, scale_name = entries[name], files[name], name + SCALE_SUFFIX
    assert entry is not None
    if len(entry.shape) != 2:
        raise InputError(f"{file}: tensor {name} is FP8 of shape {list(entry.shape)}; only matrices have block scales")
    scale_entry = entries.get(scale_name)
    if scale_entry is None:
        raise InputError(f"{file}: tensor {name} is FP8 but its scales {scale_name} are missing")
    scale_file, blocks = files[scale_name], [-(-size // of) for size, of in zip(entry.shape, block, strict=True)]
    if list(scale_entry.shape) != blocks:
        raise InputError(f"{scale_file}: tensor {scale_name} has shape {list(scale_entry.shape)}, expected {blocks}")
    if scale_entry.dtype not in SCALES:
        raise InputError(
            f"{scale_file}: tensor {scale_name} has dtype {scale_entry.dtype}; scales are {', '.join(SCALES)}"
        )
    if scale_file == file:
        scale = shard.get_tensor(scale_name)
    else:
        with safe_open(scale_file, framework="pt") as other:
            scale = other.get_tensor(scale_name)
    return dequantize_in_bands(shard.get_tensor(name), scale, block, dtype)


# ------------------------------------------------------------------------------------------ writing


def save(model: Transformer, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model` as a Hugging Face folder, whole or not at all; an earlier checkpoint there is replaced."""
    folder = Path(path)
    check_replaceable(folder)
    with whole_folder(folder) as temporary:
        write_weights(model, temporary, shard_bytes)


def check_replaceable(folder: Path) -> None:
    """Raises InputError unless `folder` is absent, empty or a checkpoint with nothing else in it that could be lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    for path in sorted(folder.iterdir()):
        if path.name not in REPLACEABLE and path.suffix != ".safetensors":
            raise InputError(f"{folder} holds {path.name}, which is no part of a checkpoint; choose another folder")
    if any(folder.iterdir()) and not is_model(folder):
        raise InputError(f"{folder} holds something that is no checkpoint; choose another folder")


def write_weights(model: Transformer, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and the weights into `folder`, shard by shard."""
    name_of_dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(folder / CONFIG, {**model.config.to_hf(), "dtype": name_of_dtype, "torch_dtype": name_of_dtype})
    shards = list(_shards(model, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(names, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for names in shards for tensor in names.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file. Raises InputError when it cannot be written, a full disk say."""
    try:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file, {"format": "pt"}
        )
    except (SafetensorError, OSError) as error:
        raise InputError(f"could not write {file}: {error}; free some space or choose another place") from error


def _shards(model: Transformer, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors under their names on disk, in shards of at most `shard_bytes` (or one larger tensor)."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    named = {name: stored.within(tensors[stored.name]) for name, stored in stored_tensors(model).items()}
    # Published files repeat embedding and head beside each MTP module; other tools look for them there.
    for name, of in shared_copies(model.config).items():
        if name not in named and not name.startswith("lm_head"):
            named[name] = tensors[of if of in tensors else "model.embed_tokens.weight"].clone()
    shard: dict[str, Tensor] = {}
    size = 0
    for name in sorted(named):
        tensor = named[name]
        more = tensor.numel() * tensor.element_size()
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += more
    yield shard
