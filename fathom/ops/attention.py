"""Attention, the two products at the heart of MLA's two forms; each reference beside its faster version.

`causal_attention` is the expanded form's: per-head keys and values, all positions new (training, prefill).
`latent_attention` is the absorbed form's: every head attends one shared key, the cached latent (decode).

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 128
"""Queries per block on the CPU: wide enough for full-speed products, narrow enough to skip most masked keys."""


def causal_attention_reference(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ, masked to keys not after the query) · v; softmax in float32. Returns (B, S, H, V)."""
    scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BSHX) * scale
    length = q_BSHX.shape[1]
    future_ST = torch.ones(length, length, dtype=torch.bool, device=q_BSHX.device).triu(1)
    scores_BHST = scores_BHST.masked_fill(future_ST, float("-inf"))
    probs_BHST = _softmax(scores_BHST).to(v_BSHV.dtype)
    return torch.einsum("bhst,bthv->bshv", probs_BHST, v_BSHV)


def causal_attention(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """As `causal_attention_reference`. On a GPU torch's fused kernel; on the CPU plain products in query blocks.

    No block multiplies keys that come after all of its queries. On 2 CPU cores this took two thirds of the time of
    torch's fused CPU kernel, forward and backward (docs/log.md).
    """
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BSHX, v_BSHV))
    if q_BSHX.is_cuda:
        fused_BHSV = F.scaled_dot_product_attention(q_BHSX, k_BHTX, v_BHTV, is_causal=True, scale=scale)
        return fused_BHSV.transpose(1, 2)
    length = q_BSHX.shape[1]
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        blocks.append(_attend_block(q_BHSX[:, :, start:end] * scale, k_BHTX[:, :, :end], v_BHTV[:, :, :end], start))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _attend_block(q_BHSX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, start: int) -> Tensor:
    """Queries at positions start … against all keys up to the block's end."""
    scores_BHST = q_BHSX @ k_BHTX.transpose(-1, -2)
    query_S1 = torch.arange(start, start + q_BHSX.shape[2], device=q_BHSX.device)[:, None]
    future_ST = torch.arange(k_BHTX.shape[2], device=q_BHSX.device) > query_S1
    scores_BHST = scores_BHST.masked_fill(future_ST, float("-inf"))
    return _softmax(scores_BHST).to(v_BHTV.dtype) @ v_BHTV


def latent_attention(q_BSHW: Tensor, cache_BTW: Tensor, positions_BS: Tensor, latent_size: int, scale: float) -> Tensor:
    """Attend the cached latents, which are key (all W) and value (the first C) of every head at once.

    A query at position p sees cache slots 0 … p; whatever lies beyond (rejected drafts) is never read into the
    result. Returns (B, S, H, C).
    """
    batch, length, heads, width = q_BSHW.shape
    # One product for all heads: the key is shared, so heads are only more queries.
    scores_BST = (q_BSHW * scale).reshape(batch, length * heads, width) @ cache_BTW.transpose(1, 2)
    hidden_BST = torch.arange(cache_BTW.shape[1], device=q_BSHW.device) > positions_BS[..., None]
    hidden_BST = hidden_BST.repeat_interleave(heads, dim=1)
    probs_BST = _softmax(scores_BST.masked_fill(hidden_BST, float("-inf"))).to(q_BSHW.dtype)
    return (probs_BST @ cache_BTW[..., :latent_size]).view(batch, length, heads, latent_size)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
