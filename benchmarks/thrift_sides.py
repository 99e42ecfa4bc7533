"""What races in thrift.py: two networks, and one way to say how either is trained.

Recipe   everything that is chosen: network, optimizer, rates, schedule, batch, weights of losses, number format
  │
Ours (motley's Transformer)  or  Ordinary (transformers' Llama)       step(batch, learning rate), held_out(rows)
  │
thrift_runs.trained(...)   the clock, and the loop
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import motley.model.layers
import motley.model.softmax_attention
from motley.data.stream import Batch, TokenStream
from motley.model import ModelConfig, Transformer, native
from motley.model.experts import Experts, moe_reference
from motley.model.layers import RMSNorm, rms_norm_reference
from motley.train.expert_balance import FASTEST
from motley.train.loss import blended_cross_entropy
from motley.train.lr_schedule import Schedule, Stages, factor, sequence_length
from motley.train.ngram_targets import NgramTargets
from motley.train.optimizer import Optimizer, OptimizerName
from motley.train.step import LossWeights, accumulate
from motley.train.validation import SummedLoss, summed_nats

SEQ_LEN = 512
FINE = 100_000  # steps in which a schedule is drawn


@dataclass(frozen=True)
class Llama:
    """Shape of the ordinary network: a decoder with rotary embeddings, RMSNorm and SwiGLU, heads of equal number."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        shape: of the network, which also says whose it is.
        learning_rate: peak.
        embedding_rate: of the learning rate, beside Muon.
        ngram_weight: of counts of the text in what is learned.
        batches: (share of the time, rows a step from then on), the first at 0.
        lengths: (tokens of a sequence, until which share of the time); then SEQ_LEN. Only our network.
        warmup_share, decay_share, final_share: of the schedule; shares of the time, and of the peak.
        mtp_weight: of the multi-token-prediction loss.
        precision: of the products.
        compiled: through torch.compile; only the ordinary network.
        attention: transformers' implementation; only the ordinary network.
        plain: our network through its plain references instead of its fast paths.
    """

    shape: ModelConfig | Llama
    learning_rate: float
    batches: tuple[tuple[float, int], ...] = ((0.0, 8),)
    lengths: Stages = ()
    embedding_rate: float = 10.0
    optimizer: OptimizerName = "muon"
    schedule: Schedule = "wsd"
    warmup_share: float = 0.05
    decay_share: float = 0.4
    final_share: float = 0.05
    weight_decay: float = 0.1
    mtp_weight: float = 0.3
    precision: Literal["bf16", "fp32"] = "bf16"
    compiled: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    plain: bool = False
    ngram_weight: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def rate(self, gone: float) -> float:
        """Learning rate when a share `gone` of the time is over."""
        step = min(round(gone * FINE), FINE - 1)
        warmup = round(self.warmup_share * FINE)
        return self.learning_rate * factor(step, FINE, self.schedule, warmup, self.decay_share, self.final_share)

    def length(self, gone: float) -> int:
        """Tokens of the sequences into which the rows of the next step are cut."""
        return sequence_length(self.lengths, SEQ_LEN, gone)

    def rows(self, gone: float) -> int:
        """Rows of the next step."""
        return [rows for share, rows in self.batches if share <= gone][-1]


class Learner(Protocol):
    """A network with its optimizer."""

    optimizer: Optimizer

    @property
    def model(self) -> torch.nn.Module: ...

    def gradient(self, batch: Batch) -> float:
        """Leaves the gradient of a batch; returns its loss in nats per token."""
        ...

    def step(self, batch: Batch, learning_rate: float) -> float:
        """One step; returns the batch's loss in nats per token."""
        ...

    @property
    def held_out(self) -> SummedLoss: ...

    def parameters(self) -> int: ...


class Ours:
    """motley's network and step, as `motley pretrain` takes it in one process."""

    def __init__(
        self, recipe: Recipe, shape: ModelConfig, device: torch.device, seed: int, hints: NgramTargets | None
    ) -> None:
        self.recipe = recipe
        self.model = Transformer(shape)
        self.model.initialize(seed)
        self.model.to(device)
        self.model.compute_dtype = recipe.dtype
        self.weights = LossWeights(mtp=recipe.mtp_weight, ngrams=hints)
        self.optimizer = Optimizer(
            self.model.named_parameters(), recipe.optimizer, recipe.weight_decay, recipe.dtype, recipe.embedding_rate
        )
        self.held_out = partial(summed_nats, self.model, confined=False)
        self.bias_speed = FASTEST  # of the routers; follows the length of the run, which a clock tells as it goes

    def gradient(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        losses = accumulate(self.model, batch, len(batch.input_ids), self.weights, confined=False)
        self.expert_counts = losses.expert_counts
        return losses.main

    def step(self, batch: Batch, learning_rate: float) -> float:
        loss = self.gradient(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(learning_rate)
        for gate, counts in zip(self.model.gates(), self.expert_counts, strict=False):
            gate.rebalance(counts, self.bias_speed)
        return loss

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Ordinary:
    """transformers' `LlamaForCausalLM` in autocast, its loss as transformers' users write it.

    Only as a lever of ours, the network that is not ours, it learns from n-grams, through our loss.
    """

    def __init__(
        self, recipe: Recipe, shape: Llama, device: torch.device, seed: int, hints: NgramTargets | None
    ) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=4096, use_cache=False,
        )  # fmt: skip
        with device:
            self.model = LlamaForCausalLM(config)
        self.model.set_attn_implementation(recipe.attention)
        self.model.train()
        self.device, self.recipe = device, recipe
        # With "adamw" this is PyTorch's own, fused: betas 0.9 and 0.95, decay on whatever has two dimensions.
        self.optimizer = Optimizer(
            self.model.named_parameters(), recipe.optimizer, recipe.weight_decay, recipe.dtype, recipe.embedding_rate
        )
        self.hints = hints
        learned: Callable[..., torch.Tensor] = self._loss if hints is None else self._states
        self.forward = torch.compile(learned, dynamic=False) if recipe.compiled else learned

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model(ids).last_hidden_state

    def _loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _products(self) -> AbstractContextManager[Any]:
        fast = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if fast else nullcontext()

    def gradient(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        ids, targets = batch.input_ids.to(self.device), batch.targets.to(self.device)
        with self._products():
            if self.hints is None:
                loss = seen = self.forward(ids, targets)
            else:
                states = self.forward(ids).flatten(0, 1).to(self.recipe.dtype)
                expected = self.hints.counts.expected(ids)
                head = self.model.lm_head.weight
                both = blended_cross_entropy(states, head, targets.flatten(), expected, self.hints.share)
                loss, seen = (total / int((targets >= 0).sum()) for total in both)
        loss.backward()
        return seen.item()

    def step(self, batch: Batch, learning_rate: float) -> float:
        loss = self.gradient(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(learning_rate)
        return loss

    @torch.no_grad()
    def held_out(self, stream: TokenStream, rows: int) -> float:
        self.model.eval()
        nats = 0.0
        for first in range(0, rows, 8):
            batch = stream.rows(first, min(8, rows - first))
            targets = batch.targets.to(self.device)
            with self._products():
                nats += self._loss(batch.input_ids.to(self.device), targets).item() * int((targets >= 0).sum())
        self.model.train()
        return nats

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


@contextmanager
def plain_paths() -> Iterator[None]:
    """Our network through the references that stand beside its fast paths: no kernels of our own, experts one by one,
    PyTorch's attention, norms as small operations."""

    def experts(self: Experts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe_reference(x, chosen, weights, self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype))

    def norm(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x, self.weight, self.eps)

    attention = motley.model.softmax_attention
    fast = Experts.forward, RMSNorm.forward, attention.LONGEST_BLOCKED
    Experts.forward, RMSNorm.forward, attention.LONGEST_BLOCKED = experts, norm, 0
    try:
        with native.switched_off():
            yield
    finally:
        Experts.forward, RMSNorm.forward, attention.LONGEST_BLOCKED = fast
