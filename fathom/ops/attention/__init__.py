"""Attention, the matmuls at the heart of MLA's two forms; each reference beside its faster version.

`expanded_attention` is the expanded form's: per-head keys and values, all positions new (training, prefill).
`latent_attention` is the absorbed form's: every head attends one shared key, the cached latent (decode).

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R, Y = P+V; N queries and T keys of several sequences, one after another;
G segments.

`cu_seqlens` (1+G) int32, on the tensors' device, cuts the B·S tokens, row after row, into segments that do not see
each other: segment g is tokens cu_seqlens[g] … cu_seqlens[g+1] − 1. It begins with 0, ends with B·S and has a boundary
at the end of every row; then S = T. None: every row is one segment.
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


def causal_attention_reference(
    q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """softmax(scale · q·kᵀ, masked to keys not after the query) · v; softmax in float32. Returns (B, S, H, V).

    Of T ≥ S keys the last S stand at the queries' own positions. With `cu_seqlens` keys of other segments are masked.
    """
    scores_BHST = torch.einsum("bshx,bthx->bhst", q_BSHX, k_BTHX) * scale
    scores_BHST = scores_BHST.masked_fill(~_visible(q_BSHX, k_BTHX.shape[1], cu_seqlens), float("-inf"))
    probs_BHST = _softmax(scores_BHST).to(v_BTHV.dtype)
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


def expanded_attention(
    q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """As the reference (whose gradients need S = T). On a GPU torch's fused kernel; on the CPU blocks of queries.

    No block multiplies keys that come after all of its queries, and the CPU's kernel none of other segments. Long
    segments' probabilities are recomputed in the backward pass rather than kept: memory grows with the length, not with
    its square. Raises ValueError for a `cu_seqlens` that is not as this file describes it; its values are checked on
    the CPU alone, as a GPU would have to be waited for.
    """
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q_BSHX, kv_BTHY)
    if cpu.usable(q_BSHX, kv_BTHY, k_rope_BTR):
        inputs = (q_BSHX, kv_BTHY, k_rope_BTR, rope.cos, rope.sin)
        out_BSHV: Tensor = _ExpandedAttention.apply(*inputs, scale, cu_seqlens)
        return out_BSHV
    heads = _heads(q_BSHX, kv_BTHY, k_rope_BTR, rope)
    attend = fused_causal_attention if q_BSHX.is_cuda else _in_blocks
    return attend(*heads, scale, cu_seqlens)


def _check_cu_seqlens(cu_seqlens: Tensor, q_BSHX: Tensor, kv_BTHY: Tensor) -> None:
    (batch, length), keys = q_BSHX.shape[:2], kv_BTHY.shape[1]
    if keys != length:
        raise ValueError(f"cu_seqlens needs as many queries as keys, not {length} queries and {keys} keys")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.device != q_BSHX.device:
        found = f"{cu_seqlens.dtype} of {cu_seqlens.dim()} dimensions on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens must be int32 of one dimension on {q_BSHX.device}, not {found}")
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends != sorted(ends) or ends[:1] != [0] or ends[-1] != batch * length:
        raise ValueError(f"cu_seqlens must rise from 0 to the {batch * length} tokens of {batch} rows, not {ends}")
    if missing := set(range(0, batch * length, length)) - set(ends):
        raise ValueError(f"cu_seqlens must have the ends of rows of {length} tokens; {min(missing)} is missing")


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
        out_NHX = _flash(q, k, v, (lengths.cu_seqlens_q, lengths.cu_seqlens_k), most, scale)
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
    value = kv_THY.shape[-1] - (q_NHX.shape[-1] - k_rope_TR.shape[-1])
    return _flash_fits(q_NHX, value) and gpu.usable(q_NHX, kv_THY, k_rope_TR)


def _flash_fits(q: Tensor, value: int) -> bool:
    """Whether the flash kernel takes queries (…, X) of this type and width, with values of so many elements."""
    width = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and value <= width <= 256


def _flash(
    q_NHX: Tensor, k_THX: Tensor, v_THX: Tensor, cu_seqlens: tuple[Tensor, Tensor], most: tuple[int, int], scale: float
) -> Tensor:
    """torch's flash kernel, on a GPU: causal attention of sequences one after another; (N, H, X), with gradients.

    `cu_seqlens`: of queries and of keys. `most`: bounds of the queries and keys of one sequence.
    """
    # Its causal mask ends at the last query and the last key.
    out_NHX: Tensor = torch.ops.aten._flash_attention_forward(
        q_NHX, k_THX, v_THX, *cu_seqlens, *most, 0.0, True, False, scale=scale
    )[0]
    return out_NHX


def fused_causal_attention(
    q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`causal_attention_reference` by torch's fused kernels."""
    if cu_seqlens is not None and q_BSHX.is_cuda and _flash_fits(q_BSHX, v_BTHV.shape[-1]):
        return _flash_segments(q_BSHX, k_BTHX, v_BTHV, scale, cu_seqlens)
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    # torch's own causal mask puts the first query at the first key.
    causal = cu_seqlens is None and q_BHSX.shape[2] == k_BHTX.shape[2]
    mask = None if causal else _visible(q_BSHX, k_BTHX.shape[1], cu_seqlens)
    fused_BHSV = F.scaled_dot_product_attention(q_BHSX, k_BHTX, v_BHTV, attn_mask=mask, is_causal=causal, scale=scale)
    return fused_BHSV.transpose(1, 2)


def _flash_segments(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor, scale: float, cu_seqlens: Tensor) -> Tensor:
    """Segments as sequences of the flash kernel. (Neither this nor its gradients have been run on a GPU yet.)"""
    batch, length, _, width = q_BSHX.shape
    value = v_BSHV.shape[-1]
    q_NHX, k_NHX, v_NHX = (t.flatten(0, 1) for t in (q_BSHX, k_BSHX, F.pad(v_BSHV, (0, width - value))))
    # A row's length bounds its segments'; the longest segment itself would have to be read back from the device.
    out_NHX = _flash(q_NHX, k_NHX, v_NHX, (cu_seqlens, cu_seqlens), (length, length), scale)
    return out_NHX[..., :value].unflatten(0, (batch, length))


def _in_blocks(q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    """The same in plain torch, a block of queries at a time."""
    length, keys = q_BSHX.shape[1], k_BTHX.shape[1]
    older = keys - length
    segments = None if cu_seqlens is None else _segment_ids(q_BSHX, cu_seqlens)
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    blocks = []
    for start, end in _query_blocks(length, query_block(length, q_BSHX.dtype)):
        seen = slice(older + end)
        position_T = torch.arange(older + end, device=q_BSHX.device)
        hidden = position_T > position_T[older + start :, None]
        if segments is not None:
            hidden = hidden | _in_other_segments(segments[:, start:end], segments[:, seen])
        q_BHSX_block = q_BHSX[:, :, start:end] * scale
        blocks.append(_attend_block(q_BHSX_block, k_BHTX[:, :, seen], v_BHTV[:, :, seen], hidden))
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


def _visible(q_BSHX: Tensor, keys: int, cu_seqlens: Tensor | None) -> Tensor:
    """Which keys each query sees, (S, T) or (B, 1, S, T): those of its segment that are not after it."""
    length = q_BSHX.shape[1]
    visible_ST = torch.ones(length, keys, dtype=torch.bool, device=q_BSHX.device).tril(keys - length)
    if cu_seqlens is None:
        return visible_ST
    segment_BS = _segment_ids(q_BSHX, cu_seqlens)
    return visible_ST & ~_in_other_segments(segment_BS, segment_BS)


def _segment_ids(q_BSHX: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which segment each token is in, (B, S)."""
    batch, length = q_BSHX.shape[:2]
    token_N = torch.arange(batch * length, dtype=torch.int32, device=q_BSHX.device)
    return torch.searchsorted(cu_seqlens, token_N, right=True).view(batch, length)


def _in_other_segments(query_BS: Tensor, key_BT: Tensor) -> Tensor:
    """Whether a query and a key are in different ones, from their segments' ids: (B, 1, S, T)."""
    return (query_BS.unsqueeze(2) != key_BT.unsqueeze(1)).unsqueeze(1)


def query_block(length: int, dtype: torch.dtype) -> int:
    """Queries that the CPU takes at once: few enough to skip most masked keys, enough for full-speed products."""
    if cpu.has_bf16_gemm(dtype):
        return _OWN_BLOCK
    return min(512, max(256, length // 8))


def _query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend_block(q_BHSX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, hidden: Tensor) -> Tensor:
    """A block of queries against all keys up to its end, but those that are `hidden`, (S, T) or (B, 1, S, T)."""
    scores_BHST = (q_BHSX @ k_BHTX.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    return _softmax(scores_BHST).to(v_BHTV.dtype) @ v_BHTV


class _ExpandedAttention(torch.autograd.Function):
    """The CPU's, a head of a segment at a time (fathom/ops/attention/attention.cpp)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHX: Tensor,
        kv_BTHY: Tensor,
        k_rope_BTR: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        inputs = [t.contiguous() for t in (q_BSHX, kv_BTHY, k_rope_BTR, cos, sin)]
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        batch, length, heads, width = q_BSHX.shape
        keys, nope = kv_BTHY.shape[1], width - k_rope_BTR.shape[-1]
        value = kv_BTHY.shape[-1] - nope
        lengths = [length] * batch if cu_seqlens is None else cu_seqlens.diff().tolist()
        longest = max(lengths, default=0)
        block = max(1, min(longest, query_block(longest, q_BSHX.dtype)))
        sizes = (heads, nope, width - nope, value, block, cos.shape[:-1].numel(), scale)
        out_BSHV = q_BSHX.new_empty(batch, length, heads, value)
        kept = None
        if any(ctx.needs_input_grad[:3]) and keys == length and longest <= _KEPT_LENGTH:
            kept = q_BSHX.new_empty(heads * sum(_kept_size(length, block) for length in lengths))
        outputs = (cu_seqlens, out_BSHV, kept)
        cpu.call("attention", q_BSHX.dtype, *inputs, *outputs, len(lengths), keys, length, *sizes)
        ctx.save_for_backward(*inputs, cu_seqlens, kept)
        ctx.sizes = (len(lengths), length, *sizes)
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
        dk_rope_HNR = q_BSHX.new_empty(heads, batch * length, k_rope_BTR.shape[-1], dtype=torch.float32)
        arguments = (*saved, dout_BSHV.contiguous(), *gradients, dk_rope_HNR, *ctx.sizes)
        cpu.call("attention_backward", q_BSHX.dtype, *arguments)
        return *gradients, None, None, None, None


def _kept_size(length: int, block: int) -> int:
    """Elements of one head's probabilities as the kernel keeps them: of every block against the keys up to its end."""
    return sum((end - start) * end for start, end in _query_blocks(length, block))


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
