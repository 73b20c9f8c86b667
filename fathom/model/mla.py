"""Multi-head Latent Attention (DeepSeek-V2, section 2.1; DeepSeek-V3 report, 2.1.1).

Keys and values of all heads are up-projections of one small latent per token, so only the latent c (C elements) and
the rotated shared key (R elements) are ever cached. The same weights serve two algebraically equal forms:

- expanded: build k and v per head, then attend. Cheapest when all keys are new: training and prefill.
- absorbed: fold the key half of W_kvb into the query and the value half into the output, then attend the latents
  themselves. Cheapest when the cache is long and queries are few: decoding never expands the cache.

Shapes: B batch, S query length, T key length, N tokens, D hidden, H heads, P nope width, R rope width, V value width,
C latent rank, Q query rank, W = C+R, X = P+R.
"""

import torch
from torch import Tensor, nn

from fathom.model.cached_batch import DecodeBatch, LayerCache, VarlenBatch
from fathom.model.config import ModelConfig
from fathom.model.layers import LATENT_NORM_EPS, Linear, RMSNorm
from fathom.model.rope import softmax_scale
from fathom.ops.attention import expanded_attention, latent_attention, varlen_attention
from fathom.ops.attention.kv_cache import latents, write_kv_cache
from fathom.ops.rope import Rope, apply_rope


class MultiHeadLatentAttention(nn.Module):
    """Submodules are named as the released tensors; without a rank Q, `q_proj` is the only query projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        heads, width = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(width, config.cache_width)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, width)

    def forward(
        self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Attend causally: over whole rows, over the segments of `cu_seqlens` (`segments.py`), or, with a cache, one
        row (1, N, D) of new tokens that continue the sequences in it."""
        q_BSHX = self.queries(x_BSD)
        if cache is None:
            heads_BSHV = self.expanded(q_BSHX, *self.latents(x_BSD, rope), rope, cu_seqlens)
        else:
            self.write_kv_cache(x_BSD, rope, cache)
            heads_BSHV = self.attend_cache(q_BSHX, rope, cache)
        out_BSD: Tensor = self.o_proj(heads_BSHV.flatten(2))
        return out_BSD

    def write_kv_cache(self, x_1ND: Tensor, rope: Rope, cache: LayerCache) -> None:
        """Write the new tokens' latents, all that later tokens need of them."""
        norm = self.kv_a_layernorm
        kv_1NW = self.kv_a_proj_with_mqa(x_1ND)
        write_kv_cache(kv_1NW[0], norm.weight, norm.eps, rope, cache.slot_mapping_N, cache.latents_MW)

    def attend_cache(self, q_1NHX: Tensor, rope: Rope, cache: LayerCache) -> Tensor:
        """Each sub-batch attends the latents of its own sequences; (1, N, H, V)."""
        heads, end = [], 0
        for sub_batch in cache.sub_batches:
            start, end = end, end + len(sub_batch.positions)
            q_NHX, own_rope = q_1NHX[0, start:end], Rope(rope.cos[0, start:end], rope.sin[0, start:end])
            if isinstance(sub_batch, VarlenBatch):
                heads.append(self._varlen(q_NHX, own_rope, sub_batch, cache.latents_MW))
            else:
                heads.append(self._decode(q_NHX, own_rope, sub_batch, cache.latents_MW))
        return (heads[0] if len(heads) == 1 else torch.cat(heads))[None]

    def _decode(self, q_NHX: Tensor, rope: Rope, batch: DecodeBatch, latents_MW: Tensor) -> Tensor:
        shape = batch.positions_BS.shape
        rope_BSJ = Rope(rope.cos.unflatten(0, shape), rope.sin.unflatten(0, shape))
        latents_BTW = latents_MW[batch.slots_BT].to(q_NHX.dtype)
        return self.absorbed(q_NHX.unflatten(0, shape), latents_BTW, batch.positions_BS, rope_BSJ).flatten(0, 1)

    def _varlen(self, q_NHX: Tensor, rope: Rope, batch: VarlenBatch, latents_MW: Tensor) -> Tensor:
        latents_TW = latents_MW.index_select(0, batch.slots_T).to(q_NHX.dtype)
        c_TC, k_rope_TR = latents_TW.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        kv_THY = self.kv_b_proj(c_TC).unflatten(-1, (self.config.num_attention_heads, -1))
        return varlen_attention(q_NHX, kv_THY, k_rope_TR, rope, batch.lengths, self.scale)

    def queries(self, x_BSD: Tensor) -> Tensor:
        """Each head's query (B, S, H, X): P elements without position, then R that are still to be rotated."""
        config = self.config
        if config.q_lora_rank is None:
            q_BSX = self.q_proj(x_BSD)
        else:
            q_BSX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return q_BSX.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))

    def latents(self, x_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What is cached: the normalised latent c (B, S, C) and the rotated key all heads share (B, S, R)."""
        norm = self.kv_a_layernorm
        return latents(self.kv_a_proj_with_mqa(x_BSD), norm.weight, norm.eps, rope)

    def expanded(
        self, q_BSHX: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rope: Rope, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Causal attention of the last S of T tokens, with keys and values built per head; (B, S, H, V)."""
        kv_BTHY = self.kv_b_proj(c_BTC).unflatten(-1, (self.config.num_attention_heads, -1))
        return expanded_attention(q_BSHX, kv_BTHY, k_rope_BTR, rope, self.scale, cu_seqlens)

    def absorbed(self, q_BSHX: Tensor, cache_BTW: Tensor, positions_BS: Tensor, rope: Rope) -> Tensor:
        """Attention over the cached latents without expanding them; (B, S, H, V)."""
        config = self.config
        q_nope_BSHP, q_rope_BSHR = q_BSHX.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        up_HYC = self.kv_b_proj.weight.to(cache_BTW.dtype).unflatten(0, (config.num_attention_heads, -1))
        up_k_HPC, up_v_HVC = up_HYC.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        q_latent_BSHC = torch.einsum("bshp,hpc->bshc", q_nope_BSHP, up_k_HPC)
        q_BSHW = torch.cat((q_latent_BSHC, apply_rope(q_rope_BSHR, rope)), dim=-1)
        out_BSHC = latent_attention(q_BSHW, cache_BTW, positions_BS, config.kv_lora_rank, self.scale)
        return torch.einsum("bshc,hvc->bshv", out_BSHC, up_v_HVC)
