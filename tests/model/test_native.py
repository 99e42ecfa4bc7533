"""Our own kernels give what the plain paths give, forward and backward, for whatever the router does."""

import ctypes
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from motley.model import SIZES, Transformer, native
from motley.model.attention import LatentAttention
from motley.model.experts import Experts, moe_reference
from motley.model.layers import MLP, RMSNorm, rms_norm_reference
from motley.model.native import build
from motley.model.rotary import Rotary
from motley.model.where import Where

ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-6}  # the plain paths are as far from the exact result

CONFIG = dataclasses.replace(
    SIZES["nano"], hidden_size=48, num_attention_heads=3, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=16,
)  # fmt: skip


def distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference relative to the expected's (where that is all but 0, to a small length)."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-3))


def passes(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """What the function gives, and the gradients of its inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    y.backward(upstream.to(y.dtype))
    return [y, *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq", [1, 2, 17, 64, 65, 200])
def test_attention_equals_the_plain_one_in_fp64(seq: int, packed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seq)
    layer, rotary = LatentAttention(CONFIG), Rotary(CONFIG)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    documents = torch.randint(0, 4, (2, seq), generator=generator).sort(dim=1).values if packed else None
    if documents is not None:
        documents = documents * 2**32 + 7  # numbers that differ in their upper halves only
    x, upstream = (torch.randn(2, seq, 48, generator=generator).to(dtype) for _ in range(2))
    names = [name for name, _ in layer.named_parameters()]
    positions = torch.arange(seq)[None]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        where = Where(positions, *rotary(positions, x.dtype), documents)
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, where))

    weights = list(layer.parameters())
    found = passes(run, [x, *weights], upstream)
    expected = passes(run, [tensor.double() for tensor in (x, *weights)], upstream)
    with native.switched_off():
        plain = passes(run, [x, *weights], upstream)
    assert not all(map(torch.equal, found, plain)), "the kernel did not run"
    for name, one, other in zip(["y", "x", *names], found, expected, strict=True):
        if other.norm() > 1e-6:  # a lone token's attention does not depend on its query
            assert distance(one, other) < 2 * ROUNDING[dtype], name


@pytest.mark.parametrize("routing", ["random, one expert empty", "all tokens to the same experts"])
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "inner", "k"),
    [(1, 4, 16, 16, 2), (5, 4, 32, 16, 2), (300, 6, 48, 80, 3), (700, 3, 64, 160, 1)],
)  # fmt: skip
def test_experts_equal_one_after_another(
    tokens: int, experts: int, hidden: int, inner: int, k: int, routing: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    layer = Experts(experts, hidden, inner)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if routing.startswith("random"):
        chosen = torch.stack([torch.randperm(experts - 1, generator=generator)[:k] for _ in range(tokens)])
    else:
        chosen = torch.arange(k).repeat(tokens, 1)
    weights = torch.rand(tokens, k, generator=generator)
    x, upstream = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))

    def run(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        stacked = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(layer, stacked, (x, chosen, weights))

    def reference(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_reference(x, chosen, weights, gate_up, down)

    stacked = [layer.gate_up_proj, layer.down_proj]
    found = passes(run, [x, weights, *stacked], upstream)
    expected = passes(reference, [t.double() for t in (x, weights, *stacked)], upstream)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 3 * ROUNDING[dtype]
    assert not found[3][experts - 1].any(), "an expert without tokens has no gradient"


@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(64, 16, 16), (70, 48, 80), (300, 64, 400)])
def test_a_dense_mlp_equals_the_plain_one(tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    layer = MLP(hidden, inner)
    names = [name for name, _ in layer.named_parameters()]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x, upstream = (torch.randn(1, tokens, hidden, generator=generator).to(dtype) for _ in range(2))

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    weights = list(layer.parameters())
    found, expected = passes(run, [x, *weights], upstream), passes(run, [t.double() for t in (x, *weights)], upstream)
    for name, one, other in zip(["y", "x", *names], found, expected, strict=True):
        assert distance(one, other) < ROUNDING[dtype], name


@pytest.mark.parametrize("apart", [0, 8])
@pytest.mark.parametrize("rows", [1, 63, 200])
def test_norm_equals_the_papers_words_also_where_rows_lie_apart(rows: int, apart: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    norm = RMSNorm(48, 1e-6)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.2, generator=generator)
    x, upstream = (torch.randn(rows, 48 + apart, generator=generator).to(dtype)[:, :48] for _ in range(2))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, 1e-6)

    found = passes(run, [x, norm.weight], upstream)
    expected = passes(reference, [x.double(), norm.weight.double()], upstream)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < ROUNDING[dtype]


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=60, moe_intermediate_size=32, num_hidden_layers=2))
    model.initialize(0)
    model.compute_dtype = dtype
    ids = torch.randint(60, (4, 90), generator=torch.Generator().manual_seed(1))
    model.hidden(ids).main.float().square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_the_same_bit_by_bit_on_any_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(_gradients_of_kernels(dtype))
        assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def _gradients_of_kernels(dtype: torch.dtype) -> list[Tensor]:
    """Of the layers that are kernels from end to end."""
    generator = torch.Generator().manual_seed(0)
    experts, norm = Experts(5, 48, 32), RMSNorm(48, 1e-6)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x = torch.randn(400, 48, generator=generator).to(dtype)
    chosen = torch.rand(400, 5, generator=generator).topk(2).indices
    x.requires_grad_()
    experts(norm(x), chosen, torch.rand(400, 2, generator=generator)).float().square().sum().backward()
    return [t.grad for t in (x, norm.weight, *experts.parameters()) if t.grad is not None]


def test_a_whole_models_gradient_is_the_plain_paths(dtype: torch.dtype) -> None:
    found = _gradients(dtype)
    with native.switched_off():
        expected = _gradients(dtype)
    assert any(not torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    together, apart = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert distance(together, apart) < 5 * ROUNDING[dtype]


def test_kernels_that_are_missing_are_missed_aloud(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.missing() is None
    formats = [dtype for dtype in native.DTYPES if native.chosen(dtype)]
    assert formats
    for dtype in formats:
        x = torch.zeros(2, 48, dtype=dtype)
        assert native.fits(x, 48)
        assert not native.fits(x, 40)
        assert native.DTYPES[dtype] in native.describe()
    assert not native.fits(torch.zeros(2, 48, dtype=torch.float64), 48)
    monkeypatch.setattr(native, "library", lambda: build.FOLDER / "kernels-of-other-sources.so")
    native.forget()
    assert not any(native.fits(torch.zeros(2, 48, dtype=dtype), 48) for dtype in formats)
    assert "not built" in (native.missing() or "")
    assert native.describe() == "own kernels: none"
    native.forget()


@pytest.mark.parametrize(
    ("runnable", "built", "lacking"),
    [
        (("avx2",), ("avx2",), None),
        (("avx2",), (), "(avx2)"),
        (("avx2", "avx512", "avx512bf16", "amx"), ("avx512", "amx"), None),
        (("avx2", "avx512", "avx512bf16", "amx"), ("avx2", "avx512", "avx512bf16"), "(amx)"),
        (("avx2", "avx512", "avx512bf16"), ("avx2", "avx512bf16"), "(avx512)"),
        (("avx2", "avx512", "avx512bf16"), (), "(avx512, avx512bf16)"),
        ((), (), None),
    ],
)
def test_the_best_kernels_of_each_number_format_are_missed_where_they_were_not_built(
    runnable: tuple[str, ...], built: tuple[str, ...], lacking: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "runnable", lambda: runnable)
    monkeypatch.setattr(native, "_built", lambda: built)
    assert (native.missing() is None) if lacking is None else (lacking in (native.missing() or ""))


@pytest.mark.parametrize("name", ["default", "avx2"])
def test_a_limit_set_for_pytorch_holds_for_the_kernels(kernels: None, name: str) -> None:
    code = "from motley.model import native; print(*native.runnable())"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": name}, capture_output=True, text=True
    ).stdout.split()
    assert said == [target for target in native.runnable() if target in {"default": (), "avx2": ("avx2",)}[name]]


def test_the_library_brings_no_threads_of_its_own(kernels: None) -> None:
    assert b"libgomp" not in build.library().read_bytes()
    assert ctypes.CDLL(str(build.library()))
