"""Which experts a token takes, and with what weight (DeepSeek-V3 report, section 2.1.2). Everything in float32.

The correction bias steers selection alone; the weights are those of the unbiased scores. DeepSeek-V2's router
(arXiv 2405.04434, section 2.1.2) has softmax for sigmoid, no bias, and a group's score is that of its best expert.

Shapes: N tokens, D hidden, E routed experts, K experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fathom.model.config import ModelConfig
from fathom.ops import gpu
from fathom.ops.linear.fp32 import fp32_linear
from fathom.ops.moe.routing import route, select_experts, select_experts_reference


class Routing(NamedTuple):
    """One layer's choice."""

    topk_ids_NK: Tensor
    """Experts each token takes, int64."""
    weights_NK: Tensor
    """Their weights; gradients flow to the gate through these alone."""
    scores_NE: Tensor | None
    """affinity of every token to every expert, for the balance loss; may be None where nobody trains."""


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

    def forward(self, x_ND: Tensor, trains: bool = True) -> Routing:
        logits_NE = fp32_linear(x_ND, self.weight)
        if not trains and not self.config.is_v2 and gpu.usable(logits_NE, self.e_score_correction_bias):
            config = self.config
            rule = config.num_experts_per_tok, (config.n_group, config.topk_group), config.norm_topk_prob
            return Routing(*route(logits_NE, self.e_score_correction_bias, *rule, config.routed_scaling_factor), None)
        scores_NE = logits_NE.softmax(-1) if self.config.is_v2 else logits_NE.sigmoid()
        topk_ids_NK = self.select(scores_NE.detach())
        weights_NK = scores_NE.gather(1, topk_ids_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(topk_ids_NK, weights_NK * self.config.routed_scaling_factor, scores_NE)

    def select(self, scores_NE: Tensor) -> Tensor:
        """Ids (N, K) of the experts whose (biased) scores are best."""
        config = self.config
        if config.is_v2:
            groups = config.n_group, config.topk_group
            return select_experts_reference(scores_NE, config.num_experts_per_tok, *groups, best=1)
        biased_NE = scores_NE + self.e_score_correction_bias
        return select_experts(biased_NE, config.num_experts_per_tok, config.n_group, config.topk_group)
