"""However it is computed, the same tokens come out: cached, batched, streamed, and as transformers generates them."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from motley.data.tokenizer import Tokenizer, train_tokenizer
from motley.errors import InputError
from motley.infer.engine import PREFILL_AT_ONCE, Engine
from motley.infer.load import open_engine
from motley.infer.sampler import Sampler, SamplingParams
from motley.model import SIZES, Transformer, save
from motley.progress import Progress

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog " * 3], vocab_size=290)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    config = dataclasses.replace(
        SIZES["nano"], vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, n_routed_experts=4, num_nextn_predict_layers=0, max_position_embeddings=1200,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)
        model.lm_head.weight[tokenizer.eos_id] *= 3  # so that some rows end by themselves
    return Engine(model, tokenizer)


def random_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 290, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(engine: Engine, prompt: list[int], most: int) -> tuple[list[int], str]:
    """The whole sequence computed anew for each token."""
    ids = list(prompt)
    for _ in range(min(most, engine.context_length - len(prompt))):
        token = int(engine.model(torch.tensor([ids]))[0, -1].argmax())
        if token == engine.tokenizer.eos_id:
            return ids[len(prompt) :], "stop"
        ids.append(token)
    return ids[len(prompt) :], "length"


def test_a_batch_of_unequal_prompts_says_what_each_says_alone_without_a_cache(engine: Engine) -> None:
    prompts = random_prompts(24)
    completions = engine.generate(prompts, GREEDY)
    expected = [greedy_without_cache(engine, prompt, 20) for prompt in prompts]
    assert [(one.ids, one.finish_reason) for one in completions] == expected
    assert {reason for _, reason in expected} == {"stop", "length"}, "the test sees both ways to end"


def test_the_size_of_the_batch_does_not_matter(engine: Engine) -> None:
    prompts = random_prompts(9, seed=1)
    assert engine.generate(prompts, GREEDY, batch_rows=4) == engine.generate(prompts, GREEDY)


def test_a_stream_says_what_a_batch_says_and_the_end_token_last(engine: Engine) -> None:
    for prompt in random_prompts(8, seed=2):
        (completion,) = engine.generate([prompt], GREEDY)
        streamed = list(engine.stream(prompt, GREEDY))
        if completion.finish_reason == "stop":
            assert streamed == [*completion.ids, engine.tokenizer.eos_id]
        else:
            assert streamed == completion.ids


def test_transformers_generates_the_same(engine: Engine, tmp_path: Path) -> None:
    save(engine.model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt in random_prompts(6, seed=3):
        (completion,) = engine.generate([prompt], GREEDY)
        ids = torch.tensor([prompt])
        said = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
            eos_token_id=engine.tokenizer.eos_id, pad_token_id=engine.tokenizer.eos_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert completion.ids == [token for token in said if token != engine.tokenizer.eos_id]


def test_a_long_prompt_is_read_in_parts(engine: Engine) -> None:
    (prompt,) = random_prompts(1, seed=4, longest=2)
    prompt = (prompt * 5 + [7, 8, 9]) * 100
    prompt = prompt[: PREFILL_AT_ONCE + 70]
    expected, _ = greedy_without_cache(engine, prompt, 5)
    streamed = list(engine.stream(prompt, dataclasses.replace(GREEDY, max_tokens=5)))
    assert [token for token in streamed if token != engine.tokenizer.eos_id] == expected
    among_short_ones = engine.generate([[5, 6], prompt, prompt[:PREFILL_AT_ONCE]], GREEDY)
    alone = [engine.generate([one], GREEDY)[0] for one in ([5, 6], prompt, prompt[:PREFILL_AT_ONCE])]
    assert among_short_ones == alone
    assert among_short_ones[1].ids[:5] == expected


def test_the_end_of_the_context_ends_the_answer(engine: Engine) -> None:
    prompt = (random_prompts(1, seed=5)[0] * 200)[: engine.context_length - 2]
    for prompts in ([prompt], [prompt, [5, 6]]):
        longest = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=30))[0]
        assert len(longest.ids) <= 2
        assert longest.finish_reason == "stop" or len(longest.ids) == 2
    assert len(list(engine.stream(prompt, GREEDY))) <= 2


def test_a_seed_repeats_a_sampled_answer(engine: Engine) -> None:
    prompt = random_prompts(1, seed=6)[0]
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20, seed=11)
    assert list(engine.stream(prompt, params)) == list(engine.stream(prompt, params))


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_stream_ends_within_one_token_and_not_before(engine: Engine, after: int) -> None:
    """`after`: tokens received when the reader cancels; 0 is before the first one is asked for."""
    answers = ((prompt, list(engine.stream(prompt, GREEDY))) for prompt in random_prompts(20, seed=7))
    prompt, whole = next((prompt, answer) for prompt, answer in answers if len(answer) == 20)
    cancelled, received = threading.Event(), []
    if after == 0:
        cancelled.set()
    for token in engine.stream(prompt, GREEDY, cancelled):
        received.append(token)
        if len(received) == after:
            cancelled.set()
    assert received == whole[: max(1, after)]


def test_a_stream_cancelled_while_its_prompt_is_read_says_nothing(engine: Engine) -> None:
    cancelled, read = threading.Event(), []

    def cancel(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0].shape[1])
        cancelled.set()

    hook = engine.model.model.embed_tokens.register_forward_pre_hook(cancel)
    try:
        assert list(engine.stream([5] * (2 * PREFILL_AT_ONCE + 1), GREEDY, cancelled)) == []
    finally:
        hook.remove()
    assert read == [PREFILL_AT_ONCE], "the parts that follow are not read"


@contextmanager
def positions_at_the_head(engine: Engine) -> Iterator[list[int]]:
    """Collects how many positions the head computes logits of, call by call."""
    positions: list[int] = []
    hook = engine.model.lm_head.register_forward_pre_hook(
        lambda _, inputs: positions.append(inputs[0].shape[:-1].numel())
    )
    try:
        yield positions
    finally:
        hook.remove()


def test_the_head_computes_logits_only_where_a_token_is_drawn(engine: Engine) -> None:
    prompts = [*random_prompts(6, seed=9), [7] * (PREFILL_AT_ONCE + 40)]
    with positions_at_the_head(engine) as positions:
        completions = engine.generate(prompts, GREEDY)
    drawn = [len(one.ids) + (one.finish_reason == "stop") for one in completions]
    assert positions == [sum(count > step for count in drawn) for step in range(max(drawn))]
    assert positions[0] == len(prompts)


def test_a_stream_computes_one_position_of_logits_a_token(engine: Engine) -> None:
    with positions_at_the_head(engine) as positions:
        streamed = list(engine.stream([7] * (PREFILL_AT_ONCE + 40), GREEDY))
    assert positions == [1] * len(streamed)


def test_progress_counts_every_prompt(engine: Engine) -> None:
    with Progress("answering", 13, "problems") as bar:
        engine.generate(random_prompts(13, seed=8), GREEDY, batch_rows=5, progress=bar)
        assert bar.done == 13


@pytest.mark.parametrize(
    ("prompt", "named"),
    [([], "the prompt is empty"), ([1] * 1200, "reads at most 1199"), ([10**6], "outside the"), ([-1], "outside")],
)
def test_a_prompt_that_cannot_be_read_is_refused(engine: Engine, prompt: list[int], named: str) -> None:
    with pytest.raises(InputError, match=named):
        engine.generate([prompt], GREEDY)
    with pytest.raises(InputError, match=named):
        list(engine.stream(prompt, GREEDY))


def test_a_tokenizer_of_another_model_is_refused(engine: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(engine.model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    assert open_engine(tmp_path / "model", "cpu").context_length == 1200
    train_tokenizer(["many other words in here, more than before " * 9], vocab_size=320).save(tmp_path / "model")
    with pytest.raises(InputError, match="do not belong together"):
        open_engine(tmp_path / "model", "cpu")


class Questions(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read back, and shapes that depend on values."""

    ASKED = ("item", "_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if (
            name.startswith(self.ASKED)
            or by_mask
            or ("repeat_interleave" in name and (kwargs or {}).get("output_size") is None)
        ):
            self.seen[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rows", [1, 5])
def test_decoding_asks_the_device_as_often_with_many_layers_as_with_few(
    engine: Engine, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per token and not per layer: each question stops the host until the device has caught up."""
    monkeypatch.setattr("motley.model.transformer.check_tokens", lambda *_: None)  # asked on a CPU only
    seen = []
    for layers in (2, 6):
        model = Transformer(dataclasses.replace(engine.model.config, num_hidden_layers=layers))
        model.initialize(0)
        cache = model.eval().new_cache(rows, 40)
        sampler, questions = Sampler(SamplingParams(temperature=0)), Questions()
        with torch.no_grad():  # inference mode hides some of what a tensor is asked
            logits = model(torch.full((rows, 7), 5), cache=cache)[:, -1]
            with questions:
                for _ in range(4):
                    tokens = sampler.draw(logits)
                    tokens.tolist()
                    logits = model(tokens[:, None], cache=cache)[:, 0]
        seen.append(questions.seen)
    assert seen[0] == seen[1]
    assert sum(seen[0].values()) <= 4 * 2, "whether the logits are finite; in a GPU's case the tokens themselves"


def test_a_prompt_of_unequal_rows_asks_once_for_the_longest(engine: Engine) -> None:
    ids, counts = torch.full((3, 9), 5), torch.tensor([4, 9, 2])
    for layers in (2, 5):
        model = Transformer(dataclasses.replace(engine.model.config, num_hidden_layers=layers)).eval()
        model.initialize(0)
        cache = model.new_cache(3, 20)
        with torch.no_grad(), Questions() as questions:
            model(ids, cache=cache, counts=counts)
        assert cache.longest == 9
        assert sum(questions.seen.values()) <= 3, questions.seen
