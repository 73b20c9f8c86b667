"""Attention, the two products at the heart of MLA's two forms; each reference beside its faster version.

`expanded_attention` is the expanded form's: per-head keys and values, all positions new (training, prefill).
`latent_attention` is the absorbed form's: every head attends one shared key, the cached latent (decode).

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu import build
from fathom.ops.rope import Rope, apply_rope


def causal_attention_reference(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ, masked to keys not after the query) · v; softmax in float32. Returns (B, S, H, V)."""
    scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BSHX) * scale
    length = q_BSHX.shape[1]
    future_ST = torch.ones(length, length, dtype=torch.bool, device=q_BSHX.device).triu(1)
    scores_BHST = scores_BHST.masked_fill(future_ST, float("-inf"))
    probs_BHST = _softmax(scores_BHST).to(v_BSHV.dtype)
    return torch.einsum("bhst,bthv->bshv", probs_BHST, v_BSHV)


def expanded_attention_reference(
    q_BSHX: Tensor, kv_BSHY: Tensor, k_rope_BSR: Tensor, rope: Rope, scale: float
) -> Tensor:
    """Latent attention in its expanded form: rotate, put keys together, attend causally. Returns (B, S, H, V).

    The last R numbers of each query are still to be rotated; `kv_BSHY` holds each head's P key numbers without
    position, then its V values; `k_rope_BSR` is the rotated key that all heads share.
    """
    return causal_attention_reference(*_heads(q_BSHX, kv_BSHY, k_rope_BSR, rope), scale)


def expanded_attention(q_BSHX: Tensor, kv_BSHY: Tensor, k_rope_BSR: Tensor, rope: Rope, scale: float) -> Tensor:
    """As the reference. On a GPU torch's fused kernel; on the CPU plain products in blocks of queries.

    No block multiplies keys that come after all of its queries, and the backward pass makes the probabilities again
    rather than keep them: memory grows with the length, not with its square.
    """
    if build.usable(q_BSHX, kv_BSHY, k_rope_BSR):
        out_BSHV: Tensor = _ExpandedAttention.apply(q_BSHX, kv_BSHY, k_rope_BSR, rope.cos, rope.sin, scale)
        return out_BSHV
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in _heads(q_BSHX, kv_BSHY, k_rope_BSR, rope))
    if q_BSHX.is_cuda:
        fused_BHSV = F.scaled_dot_product_attention(q_BHSX, k_BHTX, v_BHTV, is_causal=True, scale=scale)
        return fused_BHSV.transpose(1, 2)
    blocks = [
        _attend_block(q_BHSX[:, :, start:end] * scale, k_BHTX[:, :, :end], v_BHTV[:, :, :end], start)
        for start, end in _query_blocks(q_BSHX.shape[1])
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _heads(q_BSHX: Tensor, kv_BSHY: Tensor, k_rope_BSR: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (B, S, H, X) with their rotated parts in place, and values (B, S, H, V)."""
    heads, rotated = q_BSHX.shape[2], k_rope_BSR.shape[-1]
    nope = q_BSHX.shape[-1] - rotated
    q_nope_BSHP, q_rope_BSHR = q_BSHX.split((nope, rotated), dim=-1)
    k_nope_BSHP, v_BSHV = kv_BSHY.split((nope, kv_BSHY.shape[-1] - nope), dim=-1)
    k_rope_BSHR = k_rope_BSR.unsqueeze(2).expand(-1, -1, heads, -1)
    q_BSHX = torch.cat((q_nope_BSHP, apply_rope(q_rope_BSHR, rope)), dim=-1)
    return q_BSHX, torch.cat((k_nope_BSHP, k_rope_BSHR), dim=-1), v_BSHV


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks: wide enough for full-speed products, narrow enough to skip most masked keys."""
    size = min(512, max(128, length // 4))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend_block(q_BHSX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, start: int) -> Tensor:
    """Queries at positions start … against all keys up to the block's end."""
    scores_BHST = q_BHSX @ k_BHTX.transpose(-1, -2)
    query_S1 = torch.arange(start, start + q_BHSX.shape[2], device=q_BHSX.device)[:, None]
    future_ST = torch.arange(k_BHTX.shape[2], device=q_BHSX.device) > query_S1
    scores_BHST = scores_BHST.masked_fill(future_ST, float("-inf"))
    return _softmax(scores_BHST).to(v_BHTV.dtype) @ v_BHTV


class _ExpandedAttention(torch.autograd.Function):
    """The CPU's: torch's batched products, with everything between them in one pass (fathom/ops/cpu)."""

    @staticmethod
    def forward(
        ctx: Any, q_BSHX: Tensor, kv_BSHY: Tensor, k_rope_BSR: Tensor, cos: Tensor, sin: Tensor, scale: float
    ) -> Tensor:
        batch, length, heads, _ = q_BSHX.shape
        q_NSX, k_NTX, v_NTV = _split_heads(q_BSHX, kv_BSHY, k_rope_BSR, cos, sin)
        out_NSV = torch.empty_like(v_NTV)
        for start, end in _query_blocks(length):
            probs_NST = _probabilities(q_NSX, k_NTX, start, end, scale)
            torch.bmm(probs_NST, v_NTV[:, :end], out=out_NSV[:, start:end])
        ctx.save_for_backward(q_NSX, k_NTX, v_NTV, cos, sin)
        ctx.scale, ctx.rotated = scale, k_rope_BSR.shape[-1]
        return _swap_middle(out_NSV.view(batch, heads, length, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_NSX, k_NTX, v_NTV, cos, sin = ctx.saved_tensors
        length = q_NSX.shape[1]
        dout_NSV = _swap_middle(dout_BSHV).flatten(0, 1)
        dq_NSX = torch.empty_like(q_NSX)
        dk_NTX, dv_NTV = (torch.zeros_like(t, dtype=torch.float32) for t in (k_NTX, v_NTV))
        for start, end in _query_blocks(length):
            q_block, dout_block, k_seen, v_seen = (
                q_NSX[:, start:end],
                dout_NSV[:, start:end],
                k_NTX[:, :end],
                v_NTV[:, :end],
            )
            probs_NST = _probabilities(q_NSX, k_NTX, start, end, ctx.scale)
            dv_NTV[:, :end] += torch.bmm(probs_NST.transpose(1, 2), dout_block)
            dscores_NST = torch.bmm(dout_block, v_seen.transpose(1, 2))
            arguments = (probs_NST, dscores_NST, *probs_NST.shape, start, ctx.scale)
            build.call("causal_softmax_backward", probs_NST.dtype, *arguments)
            torch.bmm(dscores_NST, k_seen, out=dq_NSX[:, start:end])
            dk_NTX[:, :end] += torch.bmm(dscores_NST.transpose(1, 2), q_block)
        dk_NTX, dv_NTV = dk_NTX.to(k_NTX.dtype), dv_NTV.to(v_NTV.dtype)
        gradients = _split_heads_backward(dq_NSX, dk_NTX, dv_NTV, cos, sin, dout_BSHV.shape[0], ctx.rotated)
        return *gradients, None, None, None


def _probabilities(q_NSX: Tensor, k_NTX: Tensor, start: int, end: int, scale: float) -> Tensor:
    """Attention of the queries start … end to the keys 0 … end."""
    probs_NST = torch.bmm(q_NSX[:, start:end], k_NTX[:, :end].transpose(1, 2))
    build.call("causal_softmax", probs_NST.dtype, probs_NST, *probs_NST.shape, start, scale)
    return probs_NST


def _split_heads(
    q_BSHX: Tensor, kv_BSHY: Tensor, k_rope_BSR: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_heads`, with N = B·H in front: q (N, S, X), k (N, T, X), v (N, T, V)."""
    batch, length, heads, width = q_BSHX.shape
    rotated = k_rope_BSR.shape[-1]
    nope, value = width - rotated, kv_BSHY.shape[-1] - (width - rotated)
    q_NSX, k_NTX = (q_BSHX.new_empty(batch * heads, length, width) for _ in range(2))
    v_NTV = q_BSHX.new_empty(batch * heads, length, value)
    inputs = [t.contiguous() for t in (q_BSHX, kv_BSHY, k_rope_BSR, cos, sin)]
    sizes = (batch, length, heads, nope, rotated, value, int(cos.dim() == 2))
    build.call("split_heads", q_BSHX.dtype, *inputs, q_NSX, k_NTX, v_NTV, *sizes)
    return q_NSX, k_NTX, v_NTV


def _split_heads_backward(
    dq_NSX: Tensor, dk_NTX: Tensor, dv_NTV: Tensor, cos: Tensor, sin: Tensor, batch: int, rotated: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_split_heads`' first three inputs."""
    heads, (_, length, width), value = dq_NSX.shape[0] // batch, dq_NSX.shape, dv_NTV.shape[-1]
    nope = width - rotated
    dq_BSHX = dq_NSX.new_empty(batch, length, heads, width)
    dkv_BSHY = dq_NSX.new_empty(batch, length, heads, nope + value)
    dk_rope_BSR = dq_NSX.new_empty(batch, length, rotated)
    sizes = (batch, length, heads, nope, rotated, value, int(cos.dim() == 2))
    tables = (cos.contiguous(), sin.contiguous())
    outputs = (dq_BSHX, dkv_BSHY, dk_rope_BSR)
    build.call("split_heads_backward", dq_NSX.dtype, dq_NSX, dk_NTX, dv_NTV, *tables, *outputs, *sizes)
    return outputs


def _swap_middle(x_ABCD: Tensor) -> Tensor:
    """(A, B, C, D) → (A, C, B, D), contiguous."""
    a, b, c, d = x_ABCD.shape
    out_ACBD = x_ABCD.new_empty(a, c, b, d)
    build.call("swap_middle", x_ABCD.dtype, x_ABCD.contiguous(), out_ACBD, a, b, c, d)
    return out_ACBD


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
