"""The attention that MLA is compared with: multi-head, grouped-query and multi-query (DeepSeek-V2, section 2.1 and
appendix D), built from the model's own linear layers, rotary embedding and attention kernel.

Keys and values are cached as they are: 2·U·V elements per token, in the cache that MLA uses. Heads are `v_head_dim`
wide and rotated over their whole width, so the configuration's `qk_rope_head_dim` must equal it.

Shapes: B batch, S query length, T key length, N new tokens, D hidden, H heads, U key/value heads, V head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.config import ConfigError
from fathom.model.cached_batch import DecodeBatch, LayerCache
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear
from fathom.ops.attention import expanded_attention
from fathom.ops.rope import Rope, apply_rope


class GroupedQueryAttention(nn.Module):
    """`kv_heads` equal to the heads is multi-head attention, 1 is multi-query attention."""

    def __init__(self, config: ModelConfig, kv_heads: int) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.v_head_dim
        if not 1 <= kv_heads <= heads or heads % kv_heads:
            raise ConfigError(f"kv_heads is {kv_heads}; it must divide num_attention_heads ({heads})")
        if config.qk_rope_head_dim != width:
            found = config.qk_rope_head_dim
            raise ConfigError(
                f"qk_rope_head_dim is {found}; whole heads are rotated, so it must be v_head_dim ({width})"
            )
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.q_proj = Linear(config.hidden_size, heads * width)
        self.k_proj = Linear(config.hidden_size, kv_heads * width)
        self.v_proj = Linear(config.hidden_size, kv_heads * width)
        self.o_proj = Linear(heads * width, config.hidden_size)

    @property
    def cache_width(self) -> int:
        """Elements cached per token."""
        return 2 * self.kv_heads * self.width

    def forward(
        self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """As `MultiHeadLatentAttention.forward`."""
        q_BSHV = apply_rope(self.q_proj(x_BSD).unflatten(-1, (self.heads, self.width)), rope)
        k_BSUV = apply_rope(self.k_proj(x_BSD).unflatten(-1, (self.kv_heads, self.width)), rope)
        v_BSUV = self.v_proj(x_BSD).unflatten(-1, (self.kv_heads, self.width))
        if cache is None:
            heads_BSHV = self._whole(q_BSHV, k_BSUV, v_BSUV, cu_seqlens)
        else:
            both_N = torch.cat((k_BSUV, v_BSUV), dim=-1)[0].flatten(1)
            cache.latents_MW[cache.slot_mapping_N] = both_N.to(cache.latents_MW.dtype)
            heads_BSHV = self._cached(q_BSHV, cache)
        out_BSD: Tensor = self.o_proj(heads_BSHV.flatten(2))
        return out_BSD

    def _whole(self, q_BSHV: Tensor, k_BSUV: Tensor, v_BSUV: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Uses MLA's kernel with an empty rotary part, so that speeds are comparable."""
        kv_BSHY = torch.cat((k_BSUV, v_BSUV), dim=-1).repeat_interleave(self.heads // self.kv_heads, dim=2)
        none = q_BSHV.new_zeros(*q_BSHV.shape[:2], 0)
        no_rope = Rope(*(torch.zeros(q_BSHV.shape[1], 0, device=q_BSHV.device) for _ in range(2)))
        return expanded_attention(q_BSHV, kv_BSHY, none, no_rope, self.width**-0.5, cu_seqlens)

    def _cached(self, q_1NHV: Tensor, cache: LayerCache) -> Tensor:
        """Each sub-batch attends to its own sequences' keys and values; returns (1, N, H, V)."""
        heads, first = [], 0
        for batch in cache.sub_batches:
            if not isinstance(batch, DecodeBatch):
                raise NotImplementedError("grouped-query attention supports rectangular sub-batches only")
            shape = batch.positions_BS.shape
            q_BSHV = q_1NHV[0, first : first + shape.numel()].unflatten(0, shape)
            first += shape.numel()
            kv_BTUY = cache.latents_MW[batch.slots_BT].to(q_1NHV.dtype).unflatten(-1, (self.kv_heads, -1))
            k_BUTV, v_BUTV = kv_BTUY.transpose(1, 2).split(self.width, dim=-1)
            seen_BST = torch.arange(k_BUTV.shape[2], device=q_1NHV.device) <= batch.positions_BS[..., None]
            out_BHSV = F.scaled_dot_product_attention(
                q_BSHV.transpose(1, 2), k_BUTV, v_BUTV, attn_mask=seen_BST[:, None], enable_gqa=True
            )
            heads.append(out_BHSV.transpose(1, 2).flatten(0, 1))
        return torch.cat(heads)[None]
