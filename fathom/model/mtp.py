"""Multi-token prediction: module k predicts the token k+1 places ahead (DeepSeek-V3 report, section 2.2).

h' = W_eh · [norm_e(embedding of t_{i+k}) ; norm_h(h_i of the module before)], the embedding FIRST as in the released
weights; then one MoE layer and the norm `shared_head.norm`. Module 1 is fed the main model's state after its final
norm. Embedding and output head are the main model's own, so they are not in here.

Shapes: B batch, S length, D hidden.
"""

import torch
from torch import Tensor, nn

from fathom.model.block import Block
from fathom.model.cached_batch import LayerCache
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear, RMSNorm
from fathom.model.router import RouterOutput
from fathom.ops.rope import Rope


class MTPModule(Block):
    """A MoE layer with its own input projection and output norm, as layer L + k − 1 of a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, moe=True)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]  # a layer of another signature: it has two inputs
        self,
        embedded_BSD: Tensor,
        h_BSD: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput]:
        """The hidden states after `shared_head.norm` (B, S, D), for the head and the next module; and the routing."""
        x_BSD, routing = super().forward(self.project(embedded_BSD, h_BSD), rope, cache, cu_seqlens)
        assert routing is not None  # the layer is MoE
        return self.shared_head["norm"](x_BSD), routing

    def project(self, embedded_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """h', the layer's input (B, S, D)."""
        h_BSD = self.eh_proj(torch.cat((self.enorm(embedded_BSD), self.hnorm(h_BSD)), dim=-1))
        return h_BSD
