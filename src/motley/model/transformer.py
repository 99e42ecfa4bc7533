"""The whole network: embedding, blocks, final norm, head, MTP modules."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from motley.model.block import make_block
from motley.model.bounds import check_tokens
from motley.model.cache import Cache
from motley.model.config import ModelConfig
from motley.model.experts import Experts
from motley.model.layers import Linear, RMSNorm
from motley.model.moe import Gate, Routing
from motley.model.mtp import MTPModule, has_further
from motley.model.rotary import Rotary
from motley.model.where import Where


@dataclass(frozen=True)
class Hidden:
    """What the training loss is computed from.

    main: [batch, seq, hidden], normed, predicts the next token through the head.
    further: one tensor [batch, seq, hidden] for each MTP depth k: position i predicts token i + k + 1. The last k
        positions have no such token within the row and must not be counted.
    routings: of each MoE layer's router, MTP's last, which count only positions that have a token k further.
    """

    main: Tensor
    further: list[Tensor]
    routings: list[Routing]


class Trunk(nn.Module):
    """Embedding, blocks and final norm; in a module of its own so that names are the published ones (`model.…`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A DeepSeek V2/V3 language model.

    Parameters are created in the default dtype on the default device; `compute_dtype` (settable) is what activations
    and matrix products use, while router scores, norms' statistics and the loss stay in fp32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.num_nextn_predict_layers))
        self.rotary = Rotary(config)
        self.compute_dtype: torch.dtype | None = None  # None: the parameters' own
        self.recompute = False  # activation checkpointing: keep only each block's input, compute the rest again
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights from N(0, initializer_range²) (0.006 in the V3 report, 4.2); norms 1, biases 0.

        Drawn on the CPU one tensor after another in name order, so that a seed means the same model everywhere.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))
        for gate in self.gates():
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias.zero_()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.compute_dtype or next(self.parameters()).dtype

    def gates(self) -> list[Gate]:
        """The routers in the order of `Hidden.routings`."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def train_in_fp8(self, wanted: bool) -> None:
        """Whether linear maps and experts round the operands of their products in training (V3 report, 3.3.1).

        Embedding, head, routers, norms and attention between tokens compute in `dtype` or fp32, as ever; so does all of
        a model that is not in training mode.
        """
        for module in (*self.model.modules(), *self.mtp.modules()):
            if isinstance(module, Linear | Experts):
                module.fp8 = wanted

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` tokens, in the dtype of the activations."""
        states = [
            block.new_state(batch, capacity, self.dtype, self.device)  # pyright: ignore[reportCallIssue]
            for block in self.model.layers
        ]
        return Cache(states, batch, capacity, self.device)

    def forward(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] of the token after each of input_ids [batch, seq].

        Args:
            input_ids: int64 [batch, seq].
            documents: [batch, seq] or None; attention stays within equal numbers, -1 is padding.
            cache: tokens go after those it holds, and it is advanced.
            counts: [batch], with a cache: how many of the seq columns are real in each row (the rest pads its right).
        """
        return self.lm_head(self.final_hidden(input_ids, documents, cache, counts))

    def final_hidden(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """[batch, seq, hidden] after the final norm: what the head computes logits from. Arguments as in `forward`."""
        hidden, _ = self.run_layers(self.embed(input_ids), self.where(input_ids, documents, cache), cache)
        if cache is not None:
            cache.advance(input_ids.shape[1], counts)
        return hidden

    def hidden(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        mtp: bool = True,
        packed: Tensor | None = None,
    ) -> Hidden:
        """What a training step needs except for the logits.

        Args:
            input_ids: int64 [batch, seq].
            documents: as in `forward`.
            mtp: False leaves the MTP modules out.
            packed: as in `further`.
        """
        main, routings = self.run_layers(self.embed(input_ids), self.where(input_ids, documents))
        if not mtp:
            return Hidden(main, [], routings)
        further, more = self.further(main, input_ids, documents, packed)
        return Hidden(main, further, routings + more)

    def further(
        self, main: Tensor, input_ids: Tensor, documents: Tensor | None, packed: Tensor | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """(outputs of the MTP modules, statistics of their routers), given `main`.

        packed: [batch, seq] or None, the document of the row that each token belongs to, -1 is padding, where attention
            is not confined to it; None: `documents`. Routers of depth k count a position only if token i + k is in its
            document: what else stands beside it predicts nothing.
        """
        further: list[Tensor] = []
        routings: list[Routing] = []
        where = self.where(input_ids, documents)
        state = main
        for depth, module in enumerate(self.mtp, start=1):
            # Token i + depth beside position i; what rolls around the end of the row only reaches the last positions.
            shifted = torch.roll(input_ids, -depth, dims=1)
            where = replace(where, routed=has_further(input_ids, documents if packed is None else packed, depth))
            state, routing = self.run(module, self.embed(shifted), state, where)
            further.append(state)
            routings += [] if routing is None else [routing]
        return further, routings

    def embed(self, input_ids: Tensor) -> Tensor:
        """[batch, seq] → [batch, seq, hidden] in the dtype of the activations.

        On a CPU, raises InputError for a token outside of the vocabulary; a GPU, which would have to be waited for,
        refuses it by itself.
        """
        if input_ids.device.type == "cpu":
            check_tokens(input_ids, self.config.vocab_size, "token")
        return self.model.embed_tokens(input_ids).to(self.dtype)

    def where(self, input_ids: Tensor, documents: Tensor | None, cache: Cache | None = None) -> Where:
        """Positions and documents of the tokens of one call."""
        seq = input_ids.shape[1]
        positions = torch.arange(seq, device=input_ids.device)[None] if cache is None else cache.positions(seq)
        cos, sin = self.rotary(positions, self.dtype)
        routed = None if documents is None else documents >= 0
        return Where(positions, cos, sin, documents, routed, 0 if cache is None else cache.longest + seq)

    def run(self, module: nn.Module, *inputs: Any) -> tuple[Tensor, Routing | None]:
        """A block or an MTP module, keeping its activations or only its input."""
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)  # pyright: ignore
        return module(*inputs)

    def run_layers(self, x: Tensor, where: Where, cache: Cache | None = None) -> tuple[Tensor, list[Routing]]:
        """(x [batch, seq, hidden] after all layers and the final norm, statistics of the routers).

        A model that holds only some layers has modules in the other places that return their input.
        """
        states = [()] * len(self.model.layers) if cache is None else [(state,) for state in cache.layers]
        routings: list[Routing] = []
        for block, state in zip(self.model.layers, states, strict=True):
            x, routing = self.run(block, x, where, *state)
            routings += [] if routing is None else [routing]
        return self.model.norm(x), routings
