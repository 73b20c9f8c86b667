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
from fathom.model.moe import RouterFacts
from fathom.ops.rope import Rope


class MTPModule(Block):
    """A MoE layer with its own input projection and output norm, as layer L + k − 1 of a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, moe=True)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def predict(
        self, embedded_BSD: Tensor, h_BSD: Tensor, rope: Rope, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterFacts]:
        """The state after `shared_head.norm` (B, S, D): feed it to the head, and on to the next module."""
        x_BSD, facts = self(self.joined(embedded_BSD, h_BSD), rope, cache)
        return self.shared_head["norm"](x_BSD), facts

    def joined(self, embedded_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """h': what the layer is fed."""
        joined_BSD: Tensor = self.eh_proj(torch.cat((self.enorm(embedded_BSD), self.hnorm(h_BSD)), dim=-1))
        return joined_BSD
