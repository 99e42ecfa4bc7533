"""Targets from counts are Kneser and Ney's distribution, and what is learned from them is the cross-entropy with it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from motley.data.pack import DataConfig, prepare
from motley.data.stream import Batch, TokenStream
from motley.data.tokenizer import Tokenizer
from motley.errors import InputError
from motley.model import ModelConfig, Transformer, native
from motley.train.config import PretrainConfig
from motley.train.loss import CHUNK, blended_cross_entropy
from motley.train.ngram_targets import DISCOUNT, Expected, NgramCounts, NgramTargets, counts_of
from motley.train.optimizer import Optimizer
from motley.train.pretrain import new_model_config, pretrain
from motley.train.step import LossWeights, accumulate

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny.json"
VOCAB = 48


def some_text(tokens: int = 4000, seed: int = 0) -> np.ndarray:
    """Tokens of which each depends on the two before, most on the last; a few never occur."""
    draw = np.random.default_rng(seed)
    text = [0, 1]
    while len(text) < tokens:
        text.append(int((text[-1] * 7 + text[-2] % 3 + draw.geometric(0.4)) % (VOCAB - 4)))
    return np.array(text, dtype=np.uint16)


def kneser_ney(text: list[int], a: int | None, b: int) -> list[float]:
    """p(c | a, b) for each c, by the book: Chen and Goodman 1999, section 2.7, interpolated."""
    triples = list(zip(text, text[1:], text[2:], strict=False))
    kinds = set(triples)
    pairs = {(y, z) for _, y, z in kinds}

    def unigram(c: int) -> float:
        return sum(z == c for _, z in pairs) / len(pairs)

    def bigram(c: int) -> float:
        follows = [(x, z) for x, y, z in kinds if y == b]
        if not follows:
            return unigram(c)
        distinct = len({z for _, z in follows})
        own = max(sum(z == c for _, z in follows) - DISCOUNT, 0)
        return (own + DISCOUNT * distinct * unigram(c)) / len(follows)

    def trigram(c: int) -> float:
        follows = [z for x, y, z in triples if (x, y) == (a, b)]
        if not follows:
            return bigram(c)
        own = max(follows.count(c) - DISCOUNT, 0)
        return (own + DISCOUNT * len(set(follows)) * bigram(c)) / len(follows)

    return [trigram(c) for c in range(VOCAB)]


def test_what_is_expected_is_interpolated_kneser_ney() -> None:
    text = some_text(600)
    ngrams = NgramCounts.of(text, VOCAB)
    rows = torch.tensor([[3, *text[40:45].tolist()], [47, 47, 0, 46, 5, 5]])  # 46 and 47 never occur
    found = ngrams.expected(rows).dense().view(2, 6, VOCAB)
    for row in range(2):
        for place in range(6):
            before = int(rows[row, place - 1]) if place else None
            wanted = kneser_ney(text.tolist(), before, int(rows[row, place]))
            assert found[row, place].tolist() == pytest.approx(wanted, abs=1e-6)
            assert float(found[row, place].sum()) == pytest.approx(1, abs=1e-5)


def test_counts_expect_unseen_text_better_the_more_of_it_they_look_back_at() -> None:
    text, unseen = some_text(20_000), torch.from_numpy(some_text(2000, seed=1).astype(np.int64))
    ngrams = NgramCounts.of(text, VOCAB)

    def nats(distribution: Tensor) -> float:
        return -float(distribution[1:].gather(1, unseen[2:, None]).log().mean())

    two = ngrams.expected(unseen[None, :-1]).dense()
    one = ngrams.expected(unseen[:-1, None]).dense()  # rows of one token have nothing before it
    none = ngrams.vocabulary.repeat(len(unseen) - 1, 1)
    assert nats(two) < nats(one) - 0.1 < nats(none) - 1


def expected_for(positions: int, vocab: int, generator: torch.Generator) -> Expected:
    text = torch.randint(vocab, (5000,), generator=generator) % torch.randint(
        1, vocab + 1, (5000,), generator=generator
    )
    return NgramCounts.of(text.numpy(), vocab).expected(text[None, 100 : 100 + positions])


def check_against_fp64(dtype: torch.dtype, positions: int, weight: float) -> None:
    """The blended cross-entropy and its gradients from `dtype` beside the same in fp64."""
    generator = torch.Generator().manual_seed(positions)
    expected = expected_for(positions, VOCAB, generator)
    hidden = torch.randn(positions, 32, generator=generator).to(dtype)
    head = 0.3 * torch.randn(VOCAB, 32, generator=generator)
    targets = torch.randint(VOCAB, (positions,), generator=generator)
    targets[3::7] = -100
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    learned, seen = blended_cross_entropy(*inputs, targets, expected, weight, 2.0**-6)
    counted = targets >= 0
    logs = (exact[0] @ exact[1].t()).log_softmax(dim=1)[counted]
    hard = -logs.gather(1, targets[counted][:, None]).sum()
    wanted = (1 - weight) * hard - weight * (expected.dense()[counted].double() * logs).sum()
    (learned * 0.5).backward()
    (wanted * 0.5).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert not seen.requires_grad
    assert seen.item() == pytest.approx(hard.item(), rel=tolerance)
    assert learned.item() == pytest.approx(wanted.item(), rel=tolerance)
    for one, other in zip(inputs, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad.double() - other.grad).norm() / other.grad.norm()) < tolerance


@pytest.mark.parametrize("weight", [0.0, 0.3, 1])
@pytest.mark.parametrize("positions", [1, 9, CHUNK + 3])
@pytest.mark.parametrize("plain", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_learned_is_the_blended_cross_entropy_in_fp64(
    plain: torch.dtype, positions: int, weight: float
) -> None:
    with native.switched_off():
        check_against_fp64(plain, positions, weight)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1])
@pytest.mark.parametrize("positions", [1, 9, CHUNK + 3])
def test_the_kernel_learns_the_blended_cross_entropy_in_fp64(
    dtype: torch.dtype, positions: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motley.train.loss.GROUP_LOGITS", 64 * VOCAB)  # several groups
    check_against_fp64(dtype, positions, weight)


def test_a_new_model_learns_a_small_language_sooner() -> None:
    """Held-out loss after a few steps on little text, of which counts have seen more."""
    text, held_out = torch.from_numpy(some_text(40_000).astype(np.int64)), some_text(1000, seed=3)
    ngrams = NgramCounts.of(text.numpy(), VOCAB)
    shape = ModelConfig.from_hf(json.loads(TINY.read_text()) | {"vocab_size": VOCAB, "num_nextn_predict_layers": 0})

    def loss_after(steps: int, weight: float) -> float:
        model = Transformer(shape)
        model.initialize(0)
        optimizer = Optimizer(model.named_parameters(), "muon", 0.0, torch.float32)
        weights = LossWeights(0.0, 0.0, NgramTargets(ngrams, weight) if weight else None)
        for step in range(steps):
            rows = text[step * 65 : step * 65 + 65].view(1, 65)
            optimizer.zero_grad()
            accumulate(model, batch_of(rows), 1, weights, confined=False)
            optimizer.step(0.01)
        with torch.no_grad():
            rows = torch.from_numpy(held_out[:975].astype(np.int64)).view(15, 65)
            logits = model(rows[:, :-1])
            return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    found, without = loss_after(20, 0.85), loss_after(20, 0.0)
    assert found < without - 0.1, (found, without)


def batch_of(rows: Tensor) -> Batch:
    ids = rows[:, :-1].contiguous()
    return Batch(ids, rows[:, 1:].contiguous(), torch.zeros_like(ids))


def test_too_little_text_to_count_is_said(tmp_path: Path) -> None:
    class Short:
        folder = tmp_path

        def text(self, limit: int) -> np.ndarray:
            return np.array([1, 2], dtype=np.uint16)

    with pytest.raises(InputError, match="holds 2 tokens, too few to count; leave --ngram-weight out"):
        counts_of(Short(), VOCAB, torch.device("cpu"))  # type: ignore[arg-type]


def test_pretraining_learns_from_the_counts_of_its_training_text(tmp_path: Path) -> None:
    """The gradient of its first step is the one of the plain reference with counts of the same text."""
    text = tmp_path / "text.jsonl"
    words = random.Random(0).choices(["one", "two", "three", "four", "five"], k=4000)
    lines = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = prepare(DataConfig(data=(str(text),), vocab_size=300), tmp_path / "data").folder
    norms = {}
    for weight in (0.0, 0.6):
        config = PretrainConfig(
            out=tmp_path / str(weight), data=(str(data),), model=str(TINY), steps=1, batch_rows=4, micro_batch=2,
            seq_len=32, ngram_weight=weight, precision="fp32", device="cpu",
        )  # fmt: skip
        pretrain(config)
        records = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        found = next(record for record in records if record["kind"] == "train")
        rows = TokenStream(data, "train", 32, config.seed)
        model = Transformer(new_model_config(str(TINY), Tokenizer.load(data)))
        model.initialize(config.seed)
        hints = NgramTargets(counts_of(rows, model.config.vocab_size, torch.device("cpu")), weight) if weight else None
        losses = accumulate(model, rows.rows(0, 4), 2, LossWeights(0.3, 1e-4, hints), confined=False)
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        norms[weight] = float(torch.cat(grads).norm())
        assert found["grad_norm"] == pytest.approx(norms[weight], rel=1e-4)
        assert found["loss"] == pytest.approx(losses.main, rel=1e-5)  # of the tokens that came, either way
    assert abs(norms[0.6] - norms[0.0]) > 0.01 * norms[0.0]
