"""Which experts a token takes, and with what weight (DeepSeek-V3 report, section 2.1.2). Everything in float32.

The correction bias steers selection alone; the weights are those of the unbiased scores. DeepSeek-V2's router
(arXiv 2405.04434, section 2.1.2) has softmax for sigmoid, no bias, and a group's score is that of its best expert.

Shapes: B batch, S length, N = B·S tokens, D hidden, E routed experts, K experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fathom.model.balance import sequence_balance_loss
from fathom.model.config import ModelConfig
from fathom.ops import gpu
from fathom.ops.linear.fp32 import fp32_linear
from fathom.ops.moe import route, select_experts, select_experts_reference


class RouterOutput(NamedTuple):
    """What one layer's router computed in one forward pass."""

    topk_ids_BSK: Tensor
    """Experts each token takes, int64."""
    weights_BSK: Tensor
    """Their weights; gradients flow to the gate through these and the balance loss."""
    tokens_per_expert_E: Tensor
    """Tokens that take each expert, int64."""
    balance_loss: Tensor | None
    """Sequence-wise balance loss before α, mean over sequences (scalar); None where it was not computed."""
    rerouted_BS: Tensor | None = None
    """Where a routing is replayed: whether the live scores would have chosen other experts for the token, bool."""


class Router(nn.Module):
    """The gate: `weight` (E, D) is learned, `e_score_correction_bias` (E) moves by the balancing rule only."""

    e_score_correction_bias: Tensor
    """Absent in DeepSeek-V2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if not config.is_v2:
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the module but stays float32: in bf16 the balancing steps would be rounded away."""
        if self.config.is_v2:
            return super()._apply(fn, recurse)
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(
        self,
        x_BSD: Tensor,
        topk_ids_BSK: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        balance_loss: bool = True,
    ) -> RouterOutput:
        """Route every token.

        `topk_ids_BSK` replays a routing: its experts are taken as they are, their weights come from the live scores.
        `balance_loss`: compute the loss of the sequences, which are the rows, or the segments of `cu_seqlens`
        (`segments.py`). It is a function of the live scores, whatever is replayed.
        """
        logits_NE = fp32_linear(x_BSD.flatten(0, 1), self.weight)
        loss = rerouted_BS = None
        if topk_ids_BSK is None and not balance_loss and self._fuses(logits_NE):
            ids_NK, weights_NK = self._fused(logits_NE)
        else:
            scores_NE = logits_NE.softmax(-1) if self.config.is_v2 else logits_NE.sigmoid()
            if topk_ids_BSK is None:
                ids_NK = self.select(scores_NE.detach())
            else:
                ids_NK = topk_ids_BSK.flatten(0, 1).to(x_BSD.device, torch.int64)
                live_NK = self.select(scores_NE.detach())
                rerouted_BS = (ids_NK.sort().values != live_NK.sort().values).any(-1).unflatten(0, x_BSD.shape[:2])
            weights_NK = self._weights(scores_NE, ids_NK)
            if balance_loss:
                scores_BSE = scores_NE.unflatten(0, x_BSD.shape[:2])
                loss = sequence_balance_loss(scores_BSE, ids_NK.shape[1], cu_seqlens)
        ids_BSK, weights_BSK = (t.unflatten(0, x_BSD.shape[:2]) for t in (ids_NK, weights_NK))
        return RouterOutput(ids_BSK, weights_BSK, _tokens_per_expert(ids_NK, self.weight.shape[0]), loss, rerouted_BS)

    def select(self, scores_NE: Tensor) -> Tensor:
        """Ids (N, K) of the experts whose (biased) scores are best."""
        config = self.config
        if config.is_v2:
            groups = config.n_group, config.topk_group
            return select_experts_reference(scores_NE, config.num_experts_per_tok, *groups, best=1)
        biased_NE = scores_NE + self.e_score_correction_bias
        return select_experts(biased_NE, config.num_experts_per_tok, config.n_group, config.topk_group)

    def _weights(self, scores_NE: Tensor, ids_NK: Tensor) -> Tensor:
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.config.routed_scaling_factor

    def _fuses(self, logits_NE: Tensor) -> bool:
        """Whether one kernel does it all: on a GPU, without gradients."""
        return not self.config.is_v2 and gpu.usable(logits_NE, self.e_score_correction_bias)

    def _fused(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        rule = config.num_experts_per_tok, (config.n_group, config.topk_group), config.norm_topk_prob
        return route(logits_NE, self.e_score_correction_bias, *rule, config.routed_scaling_factor)


def _tokens_per_expert(ids_NK: Tensor, experts: int) -> Tensor:
    # Not bincount: on a GPU the host would wait for its result's size.
    ids_P = ids_NK.flatten()
    return ids_P.new_zeros(experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))
