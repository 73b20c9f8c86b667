"""MLA's two forms of attention in plain torch: the definitions (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R, Y = P+V; N = B·S tokens. `cu_seqlens` is described in fathom/ops/attention.
"""

import torch
from torch import Tensor

from fathom.ops.rope import Rope, apply_rope


def causal_attention_reference(
    q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """softmax(scale · q·kᵀ, masked to keys not after the query) · v; softmax in float32. Returns (B, S, H, V).

    Of T ≥ S keys the last S stand at the queries' own positions. With `cu_seqlens` keys of other segments are masked.
    """
    scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BTHX) * scale
    scores_BHST = scores_BHST.masked_fill(~visible(q_BSHX, k_BTHX.shape[1], cu_seqlens), float("-inf"))
    probs_BHST = softmax(scores_BHST).to(v_BTHV.dtype)
    return torch.einsum("bhst,bthv->bshv", probs_BHST, v_BTHV)


def expanded_attention_reference(
    q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Latent attention in its expanded form: rotate, put keys together, attend causally. Returns (B, S, H, V).

    The last R elements of each query are still to be rotated, by `rope`, which has their positions; `kv_BTHY` holds
    each head's P key elements without position, then its V values; `k_rope_BTR` is the rotated key that all heads
    share. Of T ≥ S keys the last S stand at the queries' own positions. With `cu_seqlens` keys of other segments are
    masked.
    """
    return causal_attention_reference(*heads_reference(q_BSHX, kv_BTHY, k_rope_BTR, rope), scale, cu_seqlens)


def heads_reference(q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, S, H, X) and keys (B, T, H, X) with their rotated parts in place, and values (B, T, H, V)."""
    heads, rotated = q_BSHX.shape[2], k_rope_BTR.shape[-1]
    nope = q_BSHX.shape[-1] - rotated
    q_nope_BSHP, q_rope_BSHR = q_BSHX.split((nope, rotated), dim=-1)
    k_nope_BTHP, v_BTHV = kv_BTHY.split((nope, kv_BTHY.shape[-1] - nope), dim=-1)
    k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, heads, -1)
    q_BSHX = torch.cat((q_nope_BSHP, apply_rope(q_rope_BSHR, rope)), dim=-1)
    return q_BSHX, torch.cat((k_nope_BTHP, k_rope_BTHR), dim=-1), v_BTHV


def latent_attention(q_BSHW: Tensor, cache_BTW: Tensor, positions_BS: Tensor, latent_size: int, scale: float) -> Tensor:
    """Attend the cached latents, which are key (all W) and value (the first C) of every head at once.

    A query at position p sees cache slots 0 … p; whatever lies beyond (rejected drafts) is never read into the
    result. Returns (B, S, H, C).
    """
    batch, length, heads, width = q_BSHW.shape
    # One matmul for all heads: the key is shared, so heads are only more queries.
    scores_BST = (q_BSHW * scale).reshape(batch, length * heads, width) @ cache_BTW.transpose(1, 2)
    hidden_BST = torch.arange(cache_BTW.shape[1], device=q_BSHW.device) > positions_BS[..., None]
    hidden_BST = hidden_BST.repeat_interleave(heads, dim=1)
    probs_BST = softmax(scores_BST.masked_fill(hidden_BST, float("-inf"))).to(q_BSHW.dtype)
    return (probs_BST @ cache_BTW[..., :latent_size]).view(batch, length, heads, latent_size)


def visible(q_BSHX: Tensor, keys: int, cu_seqlens: Tensor | None) -> Tensor:
    """Which keys each query sees, (S, T) or (B, 1, S, T): those of its segment that are not after it."""
    length = q_BSHX.shape[1]
    visible_ST = torch.ones(length, keys, dtype=torch.bool, device=q_BSHX.device).tril(keys - length)
    if cu_seqlens is None:
        return visible_ST
    segment_BS = segment_ids(q_BSHX, cu_seqlens)
    return visible_ST & ~in_other_segments(segment_BS, segment_BS)


def segment_ids(q_BSHX: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which segment each token is in, (B, S)."""
    batch, length = q_BSHX.shape[:2]
    token_N = torch.arange(batch * length, dtype=torch.int32, device=q_BSHX.device)
    return torch.searchsorted(cu_seqlens, token_N, right=True).view(batch, length)


def in_other_segments(query_BS: Tensor, key_BT: Tensor) -> Tensor:
    """Whether a query and a key are in different ones, from their segments' ids: (B, 1, S, T)."""
    return (query_BS.unsqueeze(2) != key_BT.unsqueeze(1)).unsqueeze(1)


def softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
