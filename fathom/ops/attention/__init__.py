"""Attention, the two products at the heart of MLA's two forms; each reference beside its faster version.

`expanded_attention` is the expanded form's: per-head keys and values, all positions new (training, prefill).
`latent_attention` is the absorbed form's: every head attends one shared key, the cached latent (decode).

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R, Y = P+V; N queries and T keys of several sequences, one after another.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu
from fathom.ops.rope import Rope, apply_rope

_OWN_BLOCK = 64
"""Queries at a time where the kernels multiply themselves, which costs nothing to begin."""
_KEPT_LENGTH = 1024
"""Up to this length the CPU keeps a call's probabilities for the backward pass; beyond, it makes them again."""


def causal_attention_reference(q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ, masked to keys not after the query) · v; softmax in float32. Returns (B, S, H, V).

    Of T ≥ S keys the last S stand at the queries' own positions.
    """
    scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BTHX) * scale
    scores_BHST = scores_BHST.masked_fill(~_visible(q_BSHX.shape[1], k_BTHX.shape[1], q_BSHX.device), float("-inf"))
    probs_BHST = _softmax(scores_BHST).to(v_BTHV.dtype)
    return torch.einsum("bhst,bthv->bshv", probs_BHST, v_BTHV)


def expanded_attention_reference(
    q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, scale: float
) -> Tensor:
    """Latent attention in its expanded form: rotate, put keys together, attend causally. Returns (B, S, H, V).

    The last R numbers of each query are still to be rotated, by `rope`, which has their positions; `kv_BTHY` holds each
    head's P key numbers without position, then its V values; `k_rope_BTR` is the rotated key that all heads share. Of
    T ≥ S keys the last S stand at the queries' own positions.
    """
    return causal_attention_reference(*heads_reference(q_BSHX, kv_BTHY, k_rope_BTR, rope), scale)


def expanded_attention(q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, scale: float) -> Tensor:
    """As the reference (whose gradients need S = T). On a GPU torch's fused kernel; on the CPU blocks of queries.

    No block multiplies keys that come after all of its queries. Long sequences' probabilities are made again in the
    backward pass rather than kept: memory grows with the length, not with its square.
    """
    if cpu.usable(q_BSHX, kv_BTHY, k_rope_BTR):
        out_BSHV: Tensor = _ExpandedAttention.apply(q_BSHX, kv_BTHY, k_rope_BTR, rope.cos, rope.sin, scale)
        return out_BSHV
    heads = _heads(q_BSHX, kv_BTHY, k_rope_BTR, rope)
    attend = fused_causal_attention if q_BSHX.is_cuda else _in_blocks
    return attend(*heads, scale)


class SeqLens(NamedTuple):
    """How many queries and keys each of some sequences has, and where they end: int32, from 0 on, on the device."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> "SeqLens":
        """Of sequences with so many queries and keys each."""
        ends = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
        return SeqLens(tuple(queries), tuple(keys), *(t.to(device) for t in ends))


def varlen_attention(
    q_NHX: Tensor, kv_THY: Tensor, k_rope_TR: Tensor, rope: Rope, lengths: SeqLens, scale: float
) -> Tensor:
    """`expanded_attention` of several sequences of any lengths, one after another; `rope` (N, J). Gives (N, H, V).

    On a GPU all at once, by the flash kernel, which wants values as wide as keys.
    """
    alone = lengths.queries == lengths.keys and len(lengths.keys) == 1
    if not alone and _flash_takes(q_NHX, kv_THY, k_rope_TR):
        from fathom.ops.attention.triton_heads import heads  # Triton comes with torch's CUDA builds alone

        q, k, v = (t[0] for t in heads(q_NHX[None], kv_THY[None], k_rope_TR[None], rope, pads=True))
        most = (max(lengths.queries), max(lengths.keys))
        # Its causal mask ends at the last query and the last key.
        out_NHX = torch.ops.aten._flash_attention_forward(
            q, k, v, lengths.cu_seqlens_q, lengths.cu_seqlens_k, *most, 0.0, True, False, scale=scale
        )[0]
        value = kv_THY.shape[-1] - (q_NHX.shape[-1] - k_rope_TR.shape[-1])
        return out_NHX[..., :value]
    each = zip(
        *(t.split(lengths.queries) for t in (q_NHX, *rope)),
        *(t.split(lengths.keys) for t in (kv_THY, k_rope_TR)),
        strict=True,
    )
    outs = [expanded_attention(q[None], kv[None], k_rope[None], Rope(*r), scale)[0] for q, *r, kv, k_rope in each]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _flash_takes(q_NHX: Tensor, kv_THY: Tensor, k_rope_TR: Tensor) -> bool:
    width, wide = q_NHX.shape[-1], kv_THY.shape[-1] - (q_NHX.shape[-1] - k_rope_TR.shape[-1])
    narrow = q_NHX.dtype in (torch.bfloat16, torch.float16)
    return narrow and width % 8 == 0 and wide <= width <= 256 and gpu.usable(q_NHX, kv_THY, k_rope_TR)


def fused_causal_attention(q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """`causal_attention_reference` by torch's fused kernel."""
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    length, keys = q_BHSX.shape[2], k_BHTX.shape[2]
    # torch's own causal mask puts the first query at the first key.
    mask_ST = None if length == keys else _visible(length, keys, q_BSHX.device)
    fused_BHSV = F.scaled_dot_product_attention(
        q_BHSX, k_BHTX, v_BHTV, attn_mask=mask_ST, is_causal=mask_ST is None, scale=scale
    )
    return fused_BHSV.transpose(1, 2)


def _in_blocks(q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """The same in plain torch, a block of queries at a time."""
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    length = q_BHSX.shape[2]
    older = k_BHTX.shape[2] - length
    blocks = [
        _attend_block(
            q_BHSX[:, :, start:end] * scale, k_BHTX[:, :, : older + end], v_BHTV[:, :, : older + end], older + start
        )
        for start, end in _query_blocks(length, query_block(length, q_BHSX.dtype))
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _heads(q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; in one kernel on a GPU where nobody trains."""
    if gpu.usable(q_BSHX, kv_BTHY, k_rope_BTR):
        from fathom.ops.attention.triton_heads import heads  # Triton comes with torch's CUDA builds alone

        return heads(q_BSHX, kv_BTHY, k_rope_BTR, rope)
    return heads_reference(q_BSHX, kv_BTHY, k_rope_BTR, rope)


def heads_reference(q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, S, H, X) and keys (B, T, H, X) with their rotated parts in place, and values (B, T, H, V)."""
    heads, rotated = q_BSHX.shape[2], k_rope_BTR.shape[-1]
    nope = q_BSHX.shape[-1] - rotated
    q_nope_BSHP, q_rope_BSHR = q_BSHX.split((nope, rotated), dim=-1)
    k_nope_BTHP, v_BTHV = kv_BTHY.split((nope, kv_BTHY.shape[-1] - nope), dim=-1)
    k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, heads, -1)
    q_BSHX = torch.cat((q_nope_BSHP, apply_rope(q_rope_BSHR, rope)), dim=-1)
    return q_BSHX, torch.cat((k_nope_BTHP, k_rope_BTHR), dim=-1), v_BTHV


def _visible(length: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees (S, T): those not after it."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)


def query_block(length: int, dtype: torch.dtype) -> int:
    """Queries that the CPU takes at once: few enough to skip most masked keys, enough for full-speed products."""
    if cpu.has_bf16_gemm(dtype):
        return _OWN_BLOCK
    return min(512, max(256, length // 8))


def _query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend_block(q_BHSX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, start: int) -> Tensor:
    """Queries at positions start … against all keys up to the block's end."""
    scores_BHST = q_BHSX @ k_BHTX.transpose(-1, -2)
    query_S1 = torch.arange(start, start + q_BHSX.shape[2], device=q_BHSX.device)[:, None]
    future_ST = torch.arange(k_BHTX.shape[2], device=q_BHSX.device) > query_S1
    scores_BHST = scores_BHST.masked_fill(future_ST, float("-inf"))
    return _softmax(scores_BHST).to(v_BHTV.dtype) @ v_BHTV


class _ExpandedAttention(torch.autograd.Function):
    """The CPU's, a head at a time (fathom/ops/attention/attention.cpp)."""

    @staticmethod
    def forward(
        ctx: Any, q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, cos: Tensor, sin: Tensor, scale: float
    ) -> Tensor:
        inputs = [t.contiguous() for t in (q_BSHX, kv_BTHY, k_rope_BTR, cos, sin)]
        batch, length, heads, width = q_BSHX.shape
        nope = width - k_rope_BTR.shape[-1]
        value = kv_BTHY.shape[-1] - nope
        block = min(length, query_block(length, q_BSHX.dtype))
        sizes = (heads, nope, width - nope, value, block, int(cos.dim() == 2), scale)
        out_BSHV = q_BSHX.new_empty(batch, length, heads, value)
        kept = None
        if any(ctx.needs_input_grad[:3]) and kv_BTHY.shape[1] == length <= _KEPT_LENGTH:
            numbers = sum((end - start) * end for start, end in _query_blocks(length, block))
            kept = q_BSHX.new_empty(batch * heads, numbers)
        cpu.call("attention", q_BSHX.dtype, *inputs, out_BSHV, kept, batch, kv_BTHY.shape[1], length, *sizes)
        ctx.save_for_backward(*inputs, kept)
        ctx.sizes = (batch, length, *sizes)
        return out_BSHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        q_BSHX, kv_BTHY, k_rope_BTR, *_ = saved
        batch, length, heads, _ = q_BSHX.shape
        if kv_BTHY.shape[1] != length:
            raise NotImplementedError("gradients of attention need as many queries as keys")
        gradients = [torch.empty_like(t) for t in (q_BSHX, kv_BTHY, k_rope_BTR)]
        each_head_BHSR = q_BSHX.new_empty(batch, heads, length, k_rope_BTR.shape[-1], dtype=torch.float32)
        arguments = (*saved, dout_BSHV.contiguous(), *gradients, each_head_BHSR, *ctx.sizes)
        cpu.call("attention_backward", q_BSHX.dtype, *arguments)
        return *gradients, None, None, None


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
