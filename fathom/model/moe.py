"""DeepSeekMoE: shared experts every token takes, and K of E routed ones (arXiv 2401.06066; V3 report, 2.1.2).

out = shared(x) + Σ over the chosen experts of weight · expert(x). Experts are stacked, (E, 2F, D) and (E, D, F), so
that one grouped product serves them all.

Shapes: B batch, S length, N = B·S tokens, D hidden, E experts, K experts per token, F expert width, G = 2F.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.model.balance import sequence_balance_loss
from fathom.model.config import ModelConfig
from fathom.model.layers import SwiGLU
from fathom.model.router import Router
from fathom.ops.moe.experts import dispatch, routed_experts


class RouterFacts(NamedTuple):
    """What one MoE layer's router did with one batch."""

    topk_ids_BSK: Tensor
    """Experts each token took."""
    weights_BSK: Tensor
    """With what weights."""
    tokens_per_expert_E: Tensor
    """Tokens each expert received, int64."""
    balance_loss: Tensor | None
    """Sequence-wise balance loss before α, mean over the batch's sequences; None where nobody trains."""


class Experts(nn.Module):
    """The routed experts' stacked weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' weighted sum (N, D), and the load (E)."""
        # Each named once: a packed weight is widened anew whenever it is asked for.
        gate_up_EGD, down_EDF = self.gate_up_proj, self.down_proj
        order = dispatch(topk_ids_NK, gate_up_EGD.shape[0], x_ND.dtype)
        return routed_experts(x_ND, order, weights_NK, gate_up_EGD, down_EDF), order.tokens_per_expert_E


class MoE(nn.Module):
    """A layer's mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BSD: Tensor, trains: bool = True) -> tuple[Tensor, RouterFacts]:
        x_ND = x_BSD.flatten(0, 1)
        routing = self.gate(x_ND, trains)
        routed_ND, tokens_per_expert_E = self.experts(x_ND, routing.topk_ids_NK, routing.weights_NK)
        out_BSD = self.shared_experts(x_BSD) + routed_ND.view_as(x_BSD)
        shape, choices = x_BSD.shape[:2], routing.topk_ids_NK.shape[1]
        balance = None
        if trains and routing.scores_NE is not None:
            balance = sequence_balance_loss(routing.scores_NE.unflatten(0, shape), choices)
        ids_BSK, weights_BSK = routing.topk_ids_NK.unflatten(0, shape), routing.weights_NK.unflatten(0, shape)
        return out_BSD, RouterFacts(ids_BSK, weights_BSK, tokens_per_expert_E, balance)
