"""One transformer layer: latent attention, then a dense or a MoE feed-forward, each on a normalised residual stream.

Shapes: B batch, S length, D hidden.
"""

from torch import Tensor, nn

from fathom.model.cached_batch import LayerCache
from fathom.model.config import ModelConfig
from fathom.model.layers import RMSNorm, SwiGLU
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.moe import MoE
from fathom.model.router import RouterOutput
from fathom.ops.rope import Rope


class Block(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x)). Submodules are named as the released tensors."""

    def __init__(self, config: ModelConfig, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if moe else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        topk_ids_BSK: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """The new residual stream (B, S, D), and what the router of a MoE layer computed.

        Rows are whole sequences, or segments of `cu_seqlens` (`segments.py`), or, with a cache, chunks of several
        sequences. `topk_ids_BSK` replays a routing (`Router.forward`).
        """
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, cache, cu_seqlens)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, MoE):
            # The balance loss is one of whole sequences, which chunks are not.
            out_BSD, routing = self.mlp(normed_BSD, topk_ids_BSK, cu_seqlens, balance_loss=cache is None)
            return x_BSD + out_BSD, routing
        return x_BSD + self.mlp(normed_BSD), None
