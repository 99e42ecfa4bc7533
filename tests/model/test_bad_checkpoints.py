"""A checkpoint that is not whole is refused in one sentence that names the file, and the tensor where there is one."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import SHAPE, fp8_checkpoint, random_model, same_weights

from motley.errors import InputError
from motley.model import load, save

NORM = "model.layers.1.input_layernorm.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save(random_model(), folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    save(random_model(), folder, shard_bytes=30_000)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "shards")


def refused(folder: Path, *named: str, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for name in named:
        assert name in sentence, sentence
    return sentence


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def rewrite_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def test_a_good_one_is_loaded(folder: Path, shards: Path) -> None:
    assert same_weights(load(folder), random_model())
    assert same_weights(load(shards), random_model())


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(folder: Path, left: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:left])
    assert "truncated" in refused(folder, WEIGHTS)


def test_a_truncated_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(shards, shard.name, "truncated", "tensor ")


def test_trailing_bytes_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, WEIGHTS, "4 trailing bytes")


def test_a_git_lfs_pointer_says_what_to_do(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / WEIGHTS).write_text(pointer)
    refused(folder, WEIGHTS, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_git_lfs_pointer_in_place_of_a_table_says_what_to_do(shards: Path, file: str) -> None:
    (shards / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(shards, file, "git-lfs pointer", "git lfs pull")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.pop(NORM))
    refused(folder, NORM, "missing")


def test_a_missing_expert_is_named(folder: Path) -> None:
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors.pop(name))
    refused(folder, name, "missing")


def test_a_tensor_of_another_architecture_is_named(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(3)}))
    refused(folder, WEIGHTS, "model.layers.0.self_attn.k_proj.weight", "not part of this architecture")


def test_a_wrong_shape_is_named_with_both(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    refused(folder, WEIGHTS, NORM, "[31]", "[32]")


def test_a_transposed_matrix_is_a_wrong_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(folder, WEIGHTS, name, "[48, 32]", "[32, 48]")


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int64)}))
    refused(folder, WEIGHTS, NORM, "I64")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin", 7, None]
)
def test_an_index_may_only_name_files_of_its_folder(shards: Path, file: Any) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][NORM] = file
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, INDEX, NORM)


def test_an_index_that_names_a_missing_file_is_refused(shards: Path) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(shards, gone.name, "missing")


def test_an_index_that_names_a_file_without_the_tensor_is_refused(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, other, NORM, "missing")


def test_a_stray_copy_in_another_shard_is_not_believed(shards: Path) -> None:
    """Only the file that the index names for a tensor is read for it, whichever shard comes first or last."""
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    for shard in sorted(shards.glob("model-*.safetensors")):
        if shard.name != index[NORM]:
            rewrite(shard, lambda tensors: tensors.update({NORM: torch.full((32,), 7.0)}))
    assert same_weights(load(shards), random_model())


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_a_broken_index_is_named(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content, encoding="latin-1")
    refused(shards, INDEX)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header[NORM].update(data_offsets=[0, 128]), "begins at byte"),
        (lambda header: header[NORM].update(shape=[33]), "but 128 bytes of data"),
        (lambda header: header[NORM].update(shape=[-32]), "bytes of data"),
        (lambda header: header[NORM].update(dtype="F33"), "unknown dtype"),
        (lambda header: header[NORM].pop("shape"), "described wrongly"),
        (lambda header: header[NORM].update(data_offsets=[1]), "described wrongly"),
        (lambda header: header[NORM].update(shape="no"), ""),
        (lambda header: header.update({NORM: 5}), "described wrongly"),
    ],
)
def test_a_header_that_lies_is_caught(folder: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    rewrite_header(folder / WEIGHTS, change)
    assert said in refused(folder, WEIGHTS)


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_header_that_is_no_table_is_named(folder: Path, raw: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(folder, WEIGHTS, "header")


def test_a_header_that_claims_more_than_the_file_is_refused_without_reading_it(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(folder, WEIGHTS)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "pytorch_model.bin", "pickle")


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, "holds no weights")


def test_no_folder_and_no_config_are_said(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "is not a folder")
    refused(folder / WEIGHTS, "is not a folder")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "does not exist")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_a_broken_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model_type": "llama"}, "'llama' is not known"), ({"hidden_size": None}, "hidden_size missing"),
     ({"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq' is not supported"),
     ({"quantization_config": {"bits": 4}}, "quantization None is not supported"),
     ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be an object"),
     ({"quantization_config": [1]}, "quantization_config is [1]; it must be an object"),
     *(({"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}, f"weight_block_size is {size!r}")
       for size in (None, 128, [0, 128], [128], ["a", "b"])),
     ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"), ({"hidden_size": 32.0}, "hidden_size is 32.0")],
)  # fmt: skip
def test_an_unknown_architecture_is_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    rewrite_json(folder / "config.json")
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
    refused(folder, "config.json", said)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_on_request(folder: Path, value: float) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors[NORM].fill_(value))
    assert load(folder).config == SHAPE
    refused(folder, WEIGHTS, NORM, "NaN or infinity", check_finite=True)


def test_fp8_without_its_scales_is_named(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "model", ue8m0=False)
    name = "model.layers.0.self_attn.o_proj.weight"
    rewrite(tmp_path / "model" / WEIGHTS, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    refused(tmp_path / "model", WEIGHTS, name, "scales")


def test_fp8_scales_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "model", ue8m0=False)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    rewrite(tmp_path / "model" / WEIGHTS, lambda tensors: tensors.update({name: torch.ones(3, 3)}))
    refused(tmp_path / "model", WEIGHTS, name, "[3, 3]")


@pytest.mark.parametrize(("dtype", "written"), [(torch.int32, "I32"), (torch.float64, "F64"), (torch.int8, "I8")])
def test_fp8_scales_that_are_no_scales_are_named(dtype: torch.dtype, written: str, tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "model", ue8m0=False)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    rewrite(tmp_path / "model" / WEIGHTS, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(tmp_path / "model", WEIGHTS, name, written)


def test_an_fp8_tensor_that_is_no_matrix_is_named(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "model", ue8m0=False)
    rewrite(tmp_path / "model" / WEIGHTS, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))
    refused(tmp_path / "model", WEIGHTS, NORM, "only matrices")


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_header_is_refused_or_harmless(good: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = shutil.copytree(good, tmp_path / "model")
    content = bytearray((folder / WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(0, 8 + length) if chance.random() < 0.8 else chance.randrange(8)
        content[at] = chance.randrange(256)
    (folder / WEIGHTS).write_bytes(bytes(content))
    with suppress(InputError):  # the only way in which it may fail
        assert load(folder).config == SHAPE
