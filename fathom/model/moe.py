"""DeepSeekMoE: shared experts every token takes, and K of E routed ones (arXiv 2401.06066; V3 report, 2.1.2).

out = shared(x) + Σ over the chosen experts of weight · expert(x). Experts are stacked, (E, 2F, D) and (E, D, F), so
that one grouped matmul serves them all.

Shapes: B batch, S length, N = B·S tokens, M tokens after the exchange, D hidden, E experts, K experts per token,
F expert width, G = 2F.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fathom.model.config import ModelConfig
from fathom.model.layers import SwiGLU
from fathom.model.router import Router, RouterOutput
from fathom.ops.moe import dispatch, routed_experts


class ExpertTokens(NamedTuple):
    """The M tokens that the experts held here compute on."""

    x_MD: Tensor
    topk_ids_MK: Tensor
    """Indices into the experts held here; −1 for an expert held elsewhere."""
    weights_MK: Tensor


class Exchange(Protocol):
    """Brings tokens to the experts and their sums back: where expert parallelism puts its all-to-all."""

    def dispatch(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> ExpertTokens:
        """From every token of this rank with its experts to every token, of any rank, that takes an expert here."""

    def combine(self, y_MD: Tensor, sent: ExpertTokens) -> Tensor:
        """The way back (N, D): each token's sum over the ranks it was sent to. `sent` is what `dispatch` returned."""


class LocalExchange:
    """All experts are held here: tokens stay where they are."""

    def dispatch(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> ExpertTokens:
        return ExpertTokens(x_ND, topk_ids_NK, weights_NK)

    def combine(self, y_MD: Tensor, sent: ExpertTokens) -> Tensor:
        return y_MD


class Experts(nn.Module):
    """The routed experts' stacked weights, and the exchange that brings them their tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.exchange: Exchange = LocalExchange()

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The chosen experts' weighted sum (N, D)."""
        # Each attribute is read once: reading a quantised weight dequantises it.
        gate_up_EGD, down_EDF = self.gate_up_proj, self.down_proj
        sent = self.exchange.dispatch(x_ND, topk_ids_NK, weights_NK)
        order = dispatch(sent.topk_ids_MK, gate_up_EGD.shape[0], x_ND.dtype)
        y_MD = routed_experts(sent.x_MD, order, sent.weights_MK, gate_up_EGD, down_EDF)
        return self.exchange.combine(y_MD, sent)


class MoE(nn.Module):
    """A layer's mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        topk_ids_BSK: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        balance_loss: bool = True,
    ) -> tuple[Tensor, RouterOutput]:
        """The layer's output (B, S, D) and its router's; the arguments are those of `Router.forward`."""
        # Router and experts share the view: gradients are then summed in one order, bit for bit as in earlier releases.
        x_ND = x_BSD.flatten(0, 1)
        routing = self.gate(x_ND.view_as(x_BSD), topk_ids_BSK, cu_seqlens, balance_loss)
        chosen_NK = routing.topk_ids_BSK.flatten(0, 1), routing.weights_BSK.flatten(0, 1)
        routed_ND = self.experts(x_ND, *chosen_NK)
        return self.shared_experts(x_BSD) + routed_ND.view_as(x_BSD), routing
