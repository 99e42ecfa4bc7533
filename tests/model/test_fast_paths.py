"""Where there is a fast path there is a plain one beside it: both give the same values and gradients."""

import dataclasses

import pytest
import torch

from motley.model import SIZES, Transformer
from motley.model.attention import LatentAttention
from motley.model.experts import PAD, Experts, moe_reference
from motley.model.layers import RMSNorm, rms_norm_reference
from motley.model.softmax_attention import attend


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Largest difference, relative to the largest value (values here are about 1; where all are 0, of a tenth)."""
    scale = float(expected.detach().abs().max().clamp(min=0.1))
    return float((found.detach().double() - expected.detach().double()).abs().max()) <= tolerance * scale


def naive_attention(q, k, v, scale: float, documents):  # type: ignore[no-untyped-def]
    """In float64, query by query."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    rows = []
    for query in range(q.shape[2]):
        seen = torch.arange(query + 1)
        scores = torch.einsum("bhd,bhkd->bhk", q[:, :, query], k[:, :, seen]) * scale
        if documents is not None:
            same = documents[:, seen] == documents[:, query, None]
            scores = scores.masked_fill(~same[:, None], -torch.inf)
        rows.append(torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), v[:, :, seen]))
    out = torch.stack(rows, dim=2)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq", [1, 17, 200, 300])
def test_attention_equals_a_naive_one_forward_and_backward(dtype: torch.dtype, packed: bool, seq: int) -> None:
    generator = torch.Generator().manual_seed(seq)
    shapes = [(2, 3, seq, 24), (2, 3, seq, 24), (2, 3, seq, 16)]
    fast = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    plain = [tensor.detach().double().requires_grad_() for tensor in fast]
    documents = torch.randint(0, 4, (2, seq), generator=generator).sort(dim=1).values if packed else None
    upstream = torch.randn(2, 3, seq, 16, generator=generator)
    found = attend(*fast, 0.2, documents, None)
    expected = naive_attention(*plain, 0.2, documents)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    assert close(found, expected, tolerance)
    found.backward(upstream.to(dtype))
    expected.backward(upstream.to(dtype).double())
    for one, other in zip(fast, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert close(one.grad, other.grad, 2 * tolerance)


@pytest.mark.parametrize("tokens", [1, 5, PAD * 9])  # with and without padding of the experts' rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_experts_equal_one_after_another(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = Experts(4, 16, 8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    # expert 3 gets nothing; a token's two experts differ
    first = torch.randint(0, 3, (tokens, 1), generator=generator)
    chosen = torch.cat([first, (first + 1) % 3], dim=1)
    weights = torch.rand(tokens, 2, generator=generator).requires_grad_()
    upstream = torch.randn(tokens, 16, generator=generator)

    y = experts(x, chosen, weights)
    y.backward(upstream.to(dtype))
    found = [y, x.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
    inputs = [t.detach().double().requires_grad_() for t in (x, weights, experts.gate_up_proj, experts.down_proj)]
    expected = moe_reference(inputs[0], chosen, inputs[1], inputs[2], inputs[3])
    expected.backward(upstream.to(dtype).double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, [expected, *(i.grad for i in inputs)], strict=True):
        assert one is not None
        assert other is not None
        assert close(one, other, tolerance)
    assert experts.gate_up_proj.grad is not None
    assert not experts.gate_up_proj.grad[3].any(), "an expert without tokens has no gradient"


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_copied_beside_few_tokens_equal_one_after_another(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    module = Experts(8, 16, 24)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x = torch.randn(tokens, 16, generator=generator)
    chosen = torch.rand(tokens, 8, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    with torch.no_grad():
        found = module._gathered(x, chosen, weights)
    assert close(found, moe_reference(x, chosen, weights, module.gate_up_proj, module.down_proj), 1e-5)


@torch.no_grad()
def test_a_token_is_decoded_without_asking_the_device_for_anything() -> None:
    """A meta tensor has no values: whoever asks for one fails. In fp32, which GPUs have no grouped products of."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(SIZES["nano"], num_nextn_predict_layers=0)).eval()
    cache = model.new_cache(2, 10)
    for _ in range(3):
        logits = model(torch.empty(2, 1, dtype=torch.long, device="meta"), cache=cache)
    assert logits.shape == (2, 1, 4096)
    assert cache.longest == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_the_papers_words(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(32, 1e-6)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.2, generator=generator)
    x = (scale * torch.randn(3, 5, 32, generator=generator)).to(dtype).requires_grad_()
    plain, weight = x.detach().float().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    upstream = torch.randn(3, 5, 32, generator=generator).to(dtype)
    norm(x).backward(upstream)
    rms_norm_reference(plain, weight, 1e-6).backward(upstream.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert norm(x).dtype == dtype
    assert close(norm(x), rms_norm_reference(plain, weight, 1e-6), tolerance)
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert close(x.grad, plain.grad, tolerance)  # type: ignore[arg-type]
    assert close(norm.weight.grad, weight.grad, tolerance)  # type: ignore[arg-type]


SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=60, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    num_nextn_predict_layers=0, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(params=[None, 20], ids=["plain queries", "compressed queries"])
def model(request: pytest.FixtureRequest) -> Transformer:
    model = Transformer(dataclasses.replace(SHAPE, q_lora_rank=request.param))
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def random_ids(rows: int, seq: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(60, (rows, seq), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [8] + [1] * 12, [3, 9, 8], [19, 1]])
def test_the_latent_cache_gives_the_logits_of_the_plain_forward(model: Transformer, chunks: list[int]) -> None:
    ids = random_ids(3, 20)
    cache = model.new_cache(3, 20)
    found = torch.cat([model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)], dim=1)
    assert close(found, model(ids), 1e-5)
    assert cache.lengths.tolist() == [20, 20, 20]


@torch.no_grad()
def test_absorbed_decoding_equals_expanded_decoding(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 12)
    outcomes = []
    for absorb_up_to in (0, 100):
        monkeypatch.setattr("motley.model.attention.ABSORB_UP_TO", absorb_up_to)
        cache = model.new_cache(2, 12)
        outcomes.append(torch.cat([model(chunk, cache=cache) for chunk in ids.split([6, 1, 5], dim=1)], dim=1))
    assert isinstance(model.model.layers[0].self_attn, LatentAttention)
    assert not torch.equal(*outcomes), "both were computed the same way"
    assert close(outcomes[0], outcomes[1], 1e-5)


@torch.no_grad()
def test_rows_of_unequal_length_do_not_disturb_each_other(model: Transformer) -> None:
    lengths = [3, 9, 6]
    ids = random_ids(3, 14)
    cache = model.new_cache(3, 14)
    counts = torch.tensor(lengths)
    first = model(ids[:, :9], cache=cache, counts=counts)
    further = torch.stack([ids[row, length : length + 2] for row, length in enumerate(lengths)])
    second = torch.cat([model(further[:, :1], cache=cache), model(further[:, 1:], cache=cache)], dim=1)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, : length + 2])[0]
        assert close(first[row, :length], alone[:length], 1e-5)
        assert close(second[row], alone[length:], 1e-5)


@torch.no_grad()
def test_rows_can_leave_the_cache(model: Transformer) -> None:
    ids = random_ids(4, 10)
    cache = model.new_cache(4, 12)
    model(ids[:, :8], cache=cache, counts=torch.tensor([8, 5, 8, 7]))
    cache.select(torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [7, 5]
    after = model(random_ids(2, 1, seed=9), cache=cache)
    for place, (row, length) in enumerate([(3, 7), (1, 5)]):
        whole = torch.cat([ids[row, :length], random_ids(2, 1, seed=9)[place]])
        assert close(after[place, 0], model(whole[None])[0, -1], 1e-5)


@torch.no_grad()
def test_a_full_cache_says_so(model: Transformer) -> None:
    cache = model.new_cache(1, 4)
    model(random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens a row"):
        model(random_ids(1, 1), cache=cache)


def test_the_cache_of_v3_is_as_small_as_published() -> None:
    with torch.device("meta"):
        model = Transformer(SIZES["v3"]).to(torch.bfloat16)
    assert model.new_cache(1, 1).bytes_per_token == 70_272
