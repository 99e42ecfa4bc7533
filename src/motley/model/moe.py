"""DeepSeekMoE: shared experts, routed experts, and balance without an auxiliary loss (V3 report, 2.1.2).

Routing of one token u with expert centroids e_i:

    s_i = sigmoid(u · e_i)                        scores (V2: softmax)
    choose by s_i + b_i                           the bias b only chooses; groups first, then experts
    g_i = s_i / sum of chosen s * scaling         the unbiased scores weigh
    y = shared(u) + sum of g_i expert_i(u)

After each step b_i moves by gamma towards balance: down where the load was above the mean, up where below.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motley.model.config import ModelConfig
from motley.model.experts import Experts
from motley.model.layers import MLP


@dataclass(frozen=True)
class Routing:
    """Statistics of the router of one layer over the tokens of one call.

    counts: int64 [experts], tokens sent to each expert (padding not counted): what the bias follows.
    balance: scalar, sum over the sequences of their balance loss (V3 report, eq. 17-20) weighted by the number of
        tokens; divide by the global number of tokens.
    tokens: scalar, how many tokens were routed.
    """

    counts: Tensor
    balance: Tensor
    tokens: Tensor


class Gate(nn.Module):
    """Chooses experts and their weights for each token. Computes in fp32 whatever comes in."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts
        assert experts is not None
        self.config, self.experts = config, experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def scores(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] → scores [tokens, experts] in fp32."""
        logits = F.linear(x.float(), self.weight.float())
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)

    def choose(self, scores: Tensor) -> Tensor:
        """Indices [tokens, num_experts_per_tok] of the experts each token goes to."""
        config, choice = self.config, scores.detach()
        if config.topk_method == "noaux_tc":
            choice = choice + self.e_score_correction_bias
        if config.topk_method != "greedy" and config.n_group > 1:
            grouped = choice.unflatten(-1, (config.n_group, -1))
            best = 2 if config.topk_method == "noaux_tc" else 1
            group_scores = grouped.topk(best, dim=-1).values.sum(-1)
            kept = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def favoured(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Indices [tokens, num_experts_per_tok] of the experts that the balance loss counts for each token.

        V3 (eq. 18): the highest of all scores, whatever bias and groups made of them. V2 (its eq. 24): those chosen.
        """
        if self.config.topk_method != "noaux_tc":
            return chosen
        return scores.detach().topk(chosen.shape[-1], dim=-1, sorted=False).indices

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] → chosen [tokens, k], their weights [tokens, k] (fp32), all scores [tokens, experts]."""
        scores = self.scores(x)
        chosen = self.choose(scores)
        weights = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.config.topk_method == "noaux_tc" or not self.config.norm_topk_prob:
            weights = weights * self.config.routed_scaling_factor  # V2's code scales only what it did not normalise
        return chosen, weights, scores

    @torch.no_grad()
    def rebalance(self, counts: Tensor, gamma: float) -> None:
        """Move the bias by gamma towards balance, given the step's global `counts` [experts]."""
        if self.config.topk_method == "noaux_tc":
            load = counts.long()  # exact: ranks update copies of the bias, and rounding must not make them differ
            below_mean = torch.sign(load.sum() - len(load) * load)
            self.e_score_correction_bias += gamma * below_mean.to(self.e_score_correction_bias)


class MoE(nn.Module):
    """Routed and shared experts in place of a dense MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [batch, seq, hidden] → the same shape; `real` bool [batch, seq] marks tokens that are not padding."""
        chosen, weights, scores = self.gate(x.flatten(0, 1))
        y = self.experts(x.flatten(0, 1), chosen, weights).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, self._routing(chosen, scores, x.shape[0], real)

    def _routing(self, chosen: Tensor, scores: Tensor, batch: int, real: Tensor | None) -> Routing:
        """Loads and the sequence-wise balance loss: per sequence, sum over experts of f_i P_i."""
        experts, k = scores.shape[-1], chosen.shape[-1]
        share = (scores / scores.sum(dim=-1, keepdim=True)).unflatten(0, (batch, -1))  # [batch, seq, experts]
        ones = chosen.new_ones(*share.shape[:2], 1)
        if real is not None:
            ones = ones * real[..., None]
            share = share * real[..., None]
        tokens = ones.sum(dim=(1, 2))

        def counted(indices: Tensor) -> Tensor:
            """How often each expert occurs in `indices` [tokens, k], padding excluded: int64 [batch, experts]."""
            indices = indices.unflatten(0, (batch, -1))
            once = ones.expand_as(indices).flatten(1)
            return ones.new_zeros(batch, experts).scatter_add_(1, indices.flatten(1), once)

        held = tokens.clamp(min=1)[:, None]
        frequency = counted(self.gate.favoured(scores, chosen)) * (experts / k) / held
        per_sequence = (frequency * (share.sum(dim=1) / held)).sum(dim=-1)
        return Routing(counted(chosen).sum(dim=0), (per_sequence * tokens).sum(), tokens.sum())
