"""Weights go in and out of Hugging Face folders unchanged, FP8 is read as it is meant, and nothing is half-written."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from motley.errors import InputError
from motley.model import SIZES, ModelConfig, Transformer, load, save
from motley.model.checkpoint import stored_tensors
from motley.model.find import find_model
from motley.model.moe import Gate
from motley.model.quantize import dequantize_in_bands
from motley.model.where import Where

SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=60, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
    num_experts_per_tok=2, num_nextn_predict_layers=0,
)  # fmt: skip
V2 = dataclasses.replace(
    SHAPE, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
    q_lora_rank=12, routed_scaling_factor=1.0,
)  # fmt: skip


def random_model(config: ModelConfig = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
        for gate in model.gates():
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model.to(dtype).eval()


def ids() -> torch.Tensor:
    return torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(9))


def same_weights(one: Transformer, other: Transformer) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("config", [SHAPE, V2], ids=["V3", "V2"])
@pytest.mark.parametrize("shard_bytes", [1 << 40, 20_000], ids=["one file", "shards"])
def test_what_we_save_transformers_loads_with_the_same_logits(
    config: ModelConfig, shard_bytes: int, tmp_path: Path
) -> None:
    model = random_model(config)
    save(model, tmp_path / "model", shard_bytes=shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    difference = (theirs(ids()).logits - model(ids())).abs().max() / model(ids()).abs().max()
    assert float(difference) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"])
def test_what_transformers_saves_we_load_with_the_same_logits(max_shard_size: str, tmp_path: Path) -> None:
    values = {name: value for name, value in SHAPE.to_hf().items() if name not in ("architectures", "model_type")}
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**values)).float().eval()
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    ours = load(tmp_path)
    difference = (theirs(ids()).logits - ours(ids())).abs().max() / ours(ids()).abs().max()
    assert float(difference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_every_bit(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(SHAPE, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    model = random_model(config, dtype=dtype)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.dtype == dtype
    assert same_weights(model, back)
    assert back.config == config
    assert load(tmp_path / "model", dtype=torch.float64).dtype == torch.float64


def test_the_dtype_is_the_embeddings_whatever_a_layer_is_made_of(tmp_path: Path) -> None:
    save(random_model(dtype=torch.bfloat16), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    wide = {name: tensor.float() for name, tensor in tensors.items() if ".self_attn." in name}
    save_file({**tensors, **wide}, file, {"format": "pt"})
    assert load(tmp_path / "model").dtype == torch.bfloat16


class Averaging(torch.nn.Module):
    """A layer without attention: each token sees the mean of those before it; its state is the sum so far."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = Gate(config)  # routers are found wherever a block keeps them

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Any:
        return SimpleNamespace(sum=torch.zeros(batch, 1, self.mix.in_features, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, where: Where, state: Any = None) -> tuple[torch.Tensor, None]:
        total = x.cumsum(1) if state is None else state.sum + x.cumsum(1)
        if state is not None:
            state.sum = total[:, -1:]
        return x + self.mix(total / (where.positions[..., None] + 1)), None


@torch.no_grad()
def test_another_kind_of_block_needs_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, head, MTP, cache and checkpoint work with a block that has neither MLA nor an MLP."""
    for module in ("motley.model.transformer", "motley.model.mtp"):
        monkeypatch.setattr(f"{module}.make_block", Averaging)
    model = random_model(dataclasses.replace(SHAPE, num_nextn_predict_layers=1))
    assert len(model.gates()) == 4
    cache = model.new_cache(2, 12)
    pieces = [model(ids()[:, :5], cache=cache), model(ids()[:, 5:], cache=cache)]
    assert torch.allclose(torch.cat(pieces, dim=1), model(ids()), atol=1e-5)
    assert model.hidden(ids()).further[0].shape == (2, 12, 32)
    save(model, tmp_path / "model")
    assert same_weights(load(tmp_path / "model"), model)


def test_shards_are_as_small_as_asked_and_the_index_is_right(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "model", shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / "model" / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(stored_tensors(model))
    assert same_weights(load(tmp_path / "model"), model)


def fp8_checkpoint(folder: Path, ue8m0: bool) -> tuple[Transformer, dict[str, torch.Tensor]]:
    """A folder in DeepSeek's FP8 form, and its linear weights as float64, block by block, by hand."""
    config = dataclasses.replace(SHAPE, hidden_size=160, intermediate_size=200, moe_intermediate_size=136)
    model = random_model(config).to(torch.bfloat16)
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    expected: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        weight = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
        blocks = (-(-rows // 128), -(-columns // 128))
        if ue8m0:
            scale = torch.randint(110, 130, blocks, generator=generator).to(torch.uint8).view(torch.float8_e8m0fnu)
        else:
            scale = torch.rand(blocks, generator=generator) * 1e-3
        value = torch.empty(rows, columns, dtype=torch.float64)
        for row in range(rows):
            for block in range(blocks[1]):
                columns_of = slice(block * 128, (block + 1) * 128)
                factor = scale[row // 128, block].double()
                value[row, columns_of] = weight[row, columns_of].double() * factor
        tensors[name], tensors[f"{name}_scale_inv"], expected[name] = weight, scale, value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(settings))
    return model, expected


@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32 scales", "ue8m0 scales"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_weights_are_read_as_a_float64_dequantisation_gives_them(
    ue8m0: bool, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    _, expected = fp8_checkpoint(tmp_path / "model", ue8m0)
    loaded = load(tmp_path / "model", dtype=dtype)
    assert loaded.dtype == (dtype or torch.bfloat16)
    tensors, where = dict(loaded.named_parameters()), stored_tensors(loaded)
    assert len(expected) > 20
    for name, value in expected.items():
        found = where[name].within(tensors[where[name].name])
        assert torch.equal(found, value.float().to(found.dtype)), name  # fp8 times a scale is exact to fp32's rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_fp8_scales_may_be_of_every_published_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "model", ue8m0=dtype == torch.uint8)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    scale = tensors[f"{name}_scale_inv"]
    scale = scale.view(dtype) if dtype == torch.uint8 else scale.to(dtype)
    save_file({**tensors, f"{name}_scale_inv": scale}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    factors = scale.view(torch.float8_e8m0fnu).float() if dtype == torch.uint8 else scale.float()
    found = load(tmp_path / "model", dtype=torch.float32).state_dict()[name]
    assert torch.equal(found[:128, :128], tensors[name][:128, :128].float() * factors[0, 0])


def test_dequantisation_follows_other_block_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, generator=generator)
    found = dequantize_in_bands(weight, scale, (2, 3), torch.float32)
    for row in range(5):
        for column in range(7):
            assert float(found[row, column]) == float(weight[row, column].float() * scale[row // 2, column // 3])


def test_loading_needs_no_second_copy_of_the_model(tmp_path: Path) -> None:
    config = dataclasses.replace(SHAPE, vocab_size=40_000, hidden_size=512, intermediate_size=4096)
    save(random_model(config), tmp_path / "model", shard_bytes=40 << 20)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    save(random_model(), tmp_path / "warm")
    code = f"""
import threading, time
from motley.model import load

def own():  # bytes of this process that are no mapped file
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

seen, done = [], threading.Event()

def watch():
    while not done.is_set():
        seen.append(own())
        time.sleep(0.0005)

load({str(tmp_path / "warm")!r})
before = own()
watcher = threading.Thread(target=watch)
watcher.start()
model = load({str(tmp_path / "model")!r})
done.set()
watcher.join()
print(max(seen) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    assert grown > 0.9 * size, "the measurement is not alive"
    assert grown < 1.5 * size  # the model, and one tensor on its way


def test_a_save_that_cannot_end_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "model")
    code = f"""
from motley.errors import InputError
from motley.model import load, save
model = load({str(tmp_path / "model")!r})
model.lm_head.weight.data.zero_()
try:
    save(model, {str(tmp_path / "model")!r})
except InputError as error:
    print(error)
"""
    limit = 20_000
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout
    assert same_weights(load(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("file", "content"),
    [("thesis.txt", "years of work"), ("checkpoints/step-1/x", "a run"), ("config.json", '{"stage": "pretrain"}')],
)
def test_a_folder_that_is_no_checkpoint_is_not_overwritten(file: str, content: str, tmp_path: Path) -> None:
    kept = tmp_path / "folder" / file
    kept.parent.mkdir(parents=True)
    kept.write_text(content)
    with pytest.raises(InputError, match=r"folder holds .* no (part of a )?checkpoint"):
        save(random_model(), tmp_path / "folder")
    save(random_model(), tmp_path / "other")
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(InputError, match=r"other holds notes.md, which is no part of a checkpoint"):
        save(random_model(), tmp_path / "other")
    with pytest.raises(InputError, match="is a file; name a folder"):
        save(random_model(), tmp_path / "other" / "notes.md")
    assert kept.read_text() == content
    assert (tmp_path / "other" / "notes.md").read_text() == "mine"


def test_saving_over_an_earlier_checkpoint_replaces_all_of_it(tmp_path: Path) -> None:
    save(random_model(), tmp_path / "model", shard_bytes=20_000)
    save(random_model(seed=1), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert same_weights(load(tmp_path / "model"), random_model(seed=1))


def test_a_model_is_found_in_a_run_a_journey_and_a_folder(tmp_path: Path) -> None:
    def model_at(*parts: str) -> Path:
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(SHAPE.to_hf()))
        return folder

    run_config: dict[str, Any] = {"stage": "pretrain", "steps": 5}
    first = model_at("run", "checkpoints", "step-00000005")
    last = model_at("run", "checkpoints", "step-00000010")
    (tmp_path / "run" / "config.json").write_text(json.dumps(run_config))
    assert find_model(first) == first
    assert find_model(tmp_path / "run") == last
    done = model_at("run", "model")
    assert find_model(tmp_path / "run") == done
    model_at("demo", "pretrain", "model")
    tuned = model_at("demo", "sft", "model")
    assert find_model(tmp_path / "demo") == tuned
    exported = model_at("demo", "export")
    assert find_model(tmp_path / "demo") == exported
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model: looked for"):
        find_model(tmp_path / "empty")
    with pytest.raises(InputError, match="is not a folder"):
        find_model(tmp_path / "nothing")
