"""Multi-token prediction is the report's (section 2.2), held against transformers' own MTP layer."""

import dataclasses

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from motley.model import SIZES, Transformer, load, save
from motley.model.checkpoint import stored_tensors

DEPTH = 2
SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=DEPTH,
)  # fmt: skip


def random_model(seed: int = 0) -> Transformer:
    model = Transformer(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
    return model


def their_layers(model: Transformer) -> list[MtpLayer]:
    """transformers' MTP layers with the weights of our modules, handed over under their names on disk."""
    values = {name: value for name, value in SHAPE.to_hf().items() if name not in ("architectures", "model_type")}
    config = DeepseekV3Config(**values)
    config._attn_implementation = "eager"
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    layers = []
    for depth in range(DEPTH):
        layer = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, SHAPE.num_hidden_layers + depth)
        stem = f"model.layers.{SHAPE.num_hidden_layers + depth}."
        names = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
        state = {}
        for name, place in stored_tensors(model).items():
            if name.startswith(stem):
                rest = name.removeprefix(stem)
                rest = "post_norm.weight" if rest == "shared_head.norm.weight" else rest
                rest = rest if rest in names or rest == "post_norm.weight" else f"mtp_block.{rest}"
                state[rest] = place.within(tensors[place.name]).detach()
        missing = load_with_stacked_experts(layer, state)
        assert missing == [], missing
        layers.append(layer)
    return layers


def load_with_stacked_experts(layer: MtpLayer, state: dict[str, torch.Tensor]) -> list[str]:
    """Fill the layer; transformers too stacks experts in memory. Returns the names that got nothing."""
    wanted = dict(layer.named_parameters()) | dict(layer.named_buffers())
    left = []
    with torch.no_grad():
        for name, tensor in wanted.items():
            stem = name.rsplit(".", 1)[0]
            if name.endswith("experts.gate_up_proj"):
                parts = [
                    torch.cat([state[f"{stem}.{e}.gate_proj.weight"], state[f"{stem}.{e}.up_proj.weight"]])
                    for e in range(4)
                ]
                tensor.copy_(torch.stack(parts))
            elif name.endswith("experts.down_proj"):
                tensor.copy_(torch.stack([state[f"{stem}.{e}.down_proj.weight"] for e in range(4)]))
            elif name in state:
                tensor.copy_(state[name])
            else:
                left.append(name)
    return left


def test_every_depth_equals_transformers_forward_and_backward() -> None:
    model = random_model()
    layers = their_layers(model)
    seq = 9
    ids = torch.randint(50, (2, seq), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(seq)[None]
    rotary = DeepseekV3RotaryEmbedding(layers[0].config)
    mask = torch.full((seq, seq), -torch.inf).triu(1)[None, None]

    hidden = model.hidden(ids)
    state = hidden.main.detach().requires_grad_()
    expected = []
    previous = state
    for depth, layer in enumerate(layers, start=1):
        embeds = model.model.embed_tokens(torch.roll(ids, -depth, dims=1)).detach()
        cos_sin = rotary(embeds, positions)
        previous = layer(embeds, previous, cos_sin, mask, positions, None)
        expected.append(previous)
    for depth, (found, wanted) in enumerate(zip(hidden.further, expected, strict=True), start=1):
        real = slice(0, seq - depth)  # what rolled around the end of the row is not counted
        scale = wanted[:, real].detach().abs().max()
        assert float((found - wanted)[:, real].detach().abs().max() / scale) < 1e-5

    upstream = torch.randn(2, seq - DEPTH, 32, generator=torch.Generator().manual_seed(2))
    (hidden.further[1][:, : seq - DEPTH] * upstream).sum().backward()
    (expected[1][:, : seq - DEPTH] * upstream).sum().backward()
    for depth, layer in enumerate(layers):
        for ours, theirs in (("enorm", layer.enorm), ("hnorm", layer.hnorm), ("eh_proj", layer.eh_proj)):
            own = model.mtp[depth].get_parameter(f"{ours}.weight").grad
            assert own is not None
            assert theirs.weight.grad is not None
            assert float((own - theirs.weight.grad).abs().max() / theirs.weight.grad.abs().max()) < 1e-5


def test_a_depth_sees_one_token_further_and_no_more() -> None:
    model = random_model()
    ids = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 50
    with torch.no_grad():
        before, after = model.hidden(ids), model.hidden(other)
    assert torch.allclose(before.main[0, :5], after.main[0, :5], atol=1e-6)
    for depth in (1, 2):
        one, two = before.further[depth - 1], after.further[depth - 1]
        assert torch.allclose(one[0, : 5 - depth], two[0, : 5 - depth], atol=1e-6)
        assert not torch.allclose(one[0, 5 - depth], two[0, 5 - depth], atol=1e-4)


def test_mtp_shares_embedding_and_head_and_costs_the_main_model_nothing() -> None:
    model = random_model()
    names = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert names
    assert not any("embed" in name or "head" in name for name in names)
    ids = torch.randint(50, (1, 8), generator=torch.Generator().manual_seed(4))
    without = model.hidden(ids, mtp=False)
    assert without.further == []
    assert torch.equal(without.main, model.hidden(ids).main)


def test_mtp_weights_go_to_disk_and_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = random_model()
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config.num_nextn_predict_layers == DEPTH
    for (name, one), (_, other) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_model_has_as_many_modules_as_asked_for(depth: int) -> None:
    with torch.device("meta"):
        assert len(Transformer(dataclasses.replace(SHAPE, num_nextn_predict_layers=depth)).mtp) == depth
