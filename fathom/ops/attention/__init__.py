"""Attention, the matmuls at the heart of MLA's two forms.

`expanded_attention` is the expanded form's: per-head keys and values, all positions new (training, prefill).
`latent_attention` is the absorbed form's: every head attends one shared key, the cached latent (decode).
Definitions: reference.py.

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width,
C latent width, R rope width, W = C+R, Y = P+V; N queries and T keys of several sequences, one after another;
G segments.

`cu_seqlens` (1+G) int32, on the tensors' device, cuts the B·S tokens, row after row, into segments that do not see
each other: segment g is tokens cu_seqlens[g] … cu_seqlens[g+1] − 1. It rises from 0 to B·S and has a boundary
at the end of every row; then S = T. None: every row is one segment.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.ops import cpu, gpu
from fathom.ops.attention.blocks import attention_in_blocks, query_block
from fathom.ops.attention.cpu_kernel import ExpandedAttention
from fathom.ops.attention.fused import flash, flash_takes, fused_causal_attention
from fathom.ops.attention.reference import (
    causal_attention_reference,
    expanded_attention_reference,
    heads_reference,
    latent_attention,
)
from fathom.ops.rope import Rope

__all__ = [
    "SeqLens",
    "causal_attention_reference",
    "check_cu_seqlens",
    "expanded_attention",
    "expanded_attention_reference",
    "fused_causal_attention",
    "heads_reference",
    "latent_attention",
    "query_block",
    "varlen_attention",
]


def expanded_attention(
    q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """As the reference (whose gradients need S = T). On a GPU torch's fused kernel; on the CPU blocks of queries.

    No block multiplies keys that come after all of its queries, and the CPU's kernel none of other segments. Long
    segments' probabilities are recomputed in the backward pass rather than kept: memory grows with the length, not with
    its square. Raises ValueError for a `cu_seqlens` that is not as this file describes it (`check_cu_seqlens`).
    """
    if cu_seqlens is not None:
        if kv_BTHY.shape[1] != q_BSHX.shape[1]:
            raise ValueError(f"cu_seqlens needs as many keys as queries, not {kv_BTHY.shape[1]}, {q_BSHX.shape[1]}")
        check_cu_seqlens(cu_seqlens, *q_BSHX.shape[:2])
    if cpu.usable(q_BSHX, kv_BTHY, k_rope_BTR):
        inputs = (q_BSHX, kv_BTHY, k_rope_BTR, rope.cos, rope.sin)
        out_BSHV: Tensor = ExpandedAttention.apply(*inputs, scale, cu_seqlens)
        return out_BSHV
    heads = _heads(q_BSHX, kv_BTHY, k_rope_BTR, rope)
    attend = fused_causal_attention if q_BSHX.is_cuda else attention_in_blocks
    return attend(*heads, scale, cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, length: int) -> None:
    """Raises ValueError unless it cuts `rows` rows of `length` tokens. Values on a GPU would have to be waited for."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        shape = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} of shape {shape}; it must be int32 of shape (1 + segments)")
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return
    ends, tokens = cu_seqlens.tolist(), rows * length
    if ends[:1] != [0] or ends[-1] != tokens or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens is {ends}; it must increase strictly from 0 to the {tokens} tokens of the batch")
    if missing := set(range(length, tokens, length)) - set(ends):
        raise ValueError(f"cu_seqlens is {ends}; it must contain {min(missing)}, the end of a row of {length} tokens")


def _heads(q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; on a GPU without gradients in one kernel."""
    if gpu.usable(q_BSHX, kv_BTHY, k_rope_BTR):
        from fathom.ops.attention.triton_heads import heads  # Triton comes with torch's CUDA builds alone

        return heads(q_BSHX, kv_BTHY, k_rope_BTR, rope)
    return heads_reference(q_BSHX, kv_BTHY, k_rope_BTR, rope)


class SeqLens(NamedTuple):
    """Queries and keys of each sequence, and their cumulative sums from 0 on: int32, on the device."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> "SeqLens":
        """From the numbers of queries and keys of each sequence."""
        ends = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
        return SeqLens(tuple(queries), tuple(keys), *(t.to(device) for t in ends))


def varlen_attention(
    q_NHX: Tensor, kv_THY: Tensor, k_rope_TR: Tensor, rope: Rope, lengths: SeqLens, scale: float
) -> Tensor:
    """`expanded_attention` of several sequences of any lengths, one after another; `rope` (N, J). Returns (N, H, V).

    On a GPU in one call of the flash kernel, with values padded to the width of keys.
    """
    alone = lengths.queries == lengths.keys and len(lengths.keys) == 1
    if not alone and _flash_usable(q_NHX, kv_THY, k_rope_TR):
        from fathom.ops.attention.triton_heads import heads  # Triton comes with torch's CUDA builds alone

        q, k, v = (t[0] for t in heads(q_NHX[None], kv_THY[None], k_rope_TR[None], rope, pads=True))
        most = (max(lengths.queries), max(lengths.keys))
        out_NHX = flash(q, k, v, (lengths.cu_seqlens_q, lengths.cu_seqlens_k), most, scale)
        value = kv_THY.shape[-1] - (q_NHX.shape[-1] - k_rope_TR.shape[-1])
        return out_NHX[..., :value]
    each = zip(
        *(t.split(lengths.queries) for t in (q_NHX, *rope)),
        *(t.split(lengths.keys) for t in (kv_THY, k_rope_TR)),
        strict=True,
    )
    outs = [expanded_attention(q[None], kv[None], k_rope[None], Rope(*r), scale)[0] for q, *r, kv, k_rope in each]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _flash_usable(q_NHX: Tensor, kv_THY: Tensor, k_rope_TR: Tensor) -> bool:
    value = kv_THY.shape[-1] - (q_NHX.shape[-1] - k_rope_TR.shape[-1])
    return flash_takes(q_NHX, value) and gpu.usable(q_NHX, kv_THY, k_rope_TR)
