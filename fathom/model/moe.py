"""DeepSeekMoE: shared experts every token takes, and K of E routed ones (arXiv 2401.06066; V3 report, 2.1.2).

out = shared(x) + Σ over the chosen experts of weight · expert(x). Experts are stacked, (E, 2F, D) and (E, D, F), so
that one grouped matmul serves them all.

Shapes: B batch, S length, N = B·S tokens, D hidden, E experts, K experts per token, F expert width, G = 2F.
"""

import torch
from torch import Tensor, nn

from fathom.model.config import ModelConfig
from fathom.model.layers import SwiGLU
from fathom.model.router import Router, RouterOutput
from fathom.ops.moe.experts import dispatch, routed_experts


class Experts(nn.Module):
    """The routed experts' stacked weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The chosen experts' weighted sum (N, D)."""
        # Each attribute is read once: reading a quantised weight dequantises it.
        gate_up_EGD, down_EDF = self.gate_up_proj, self.down_proj
        order = dispatch(topk_ids_NK, gate_up_EGD.shape[0], x_ND.dtype)
        return routed_experts(x_ND, order, weights_NK, gate_up_EGD, down_EDF)


class MoE(nn.Module):
    """A layer's mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BSD: Tensor, balance_loss: bool = True) -> tuple[Tensor, RouterOutput]:
        """The layer's output (B, S, D) and its router's; `balance_loss` as in `Router.forward`."""
        routing = self.gate(x_BSD, balance_loss)
        chosen_NK = routing.topk_ids_BSK.flatten(0, 1), routing.weights_BSK.flatten(0, 1)
        routed_ND = self.experts(x_BSD.flatten(0, 1), *chosen_NK)
        return self.shared_experts(x_BSD) + routed_ND.view_as(x_BSD), routing
