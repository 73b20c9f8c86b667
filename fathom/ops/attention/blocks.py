"""Causal attention in plain torch, a block of queries at a time: no block multiplies keys after all of its queries.

Shapes: B batch, S query length, T key length, H heads, X query/key width, V value width.
"""

import torch
from torch import Tensor

from fathom.ops import cpu
from fathom.ops.attention.reference import in_other_segments, segment_ids, softmax

_GEMM_BLOCK = 64
"""Queries at a time where matmuls are our own (gemm.h), which have no cost per call."""


def attention_in_blocks(
    q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    """`causal_attention_reference`, a block of queries at a time."""
    length, keys = q_BSHX.shape[1], k_BTHX.shape[1]
    older = keys - length
    segments = None if cu_seqlens is None else segment_ids(q_BSHX, cu_seqlens)
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    blocks = []
    for start, end in query_blocks(length, query_block(length, q_BSHX.dtype)):
        seen = slice(older + end)
        position_T = torch.arange(older + end, device=q_BSHX.device)
        hidden = position_T > position_T[older + start :, None]
        if segments is not None:
            hidden = hidden | in_other_segments(segments[:, start:end], segments[:, seen])
        q_BHSX_block = q_BHSX[:, :, start:end] * scale
        blocks.append(_attend_block(q_BHSX_block, k_BHTX[:, :, seen], v_BHTV[:, :, seen], hidden))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def query_block(length: int, dtype: torch.dtype) -> int:
    """Queries that the CPU takes at once: few enough to skip most masked keys, enough for matmuls at full speed."""
    if cpu.has_bf16_gemm(dtype):
        return _GEMM_BLOCK
    return min(512, max(256, length // 8))


def query_blocks(length: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend_block(q_BHSX: Tensor, k_BHTX: Tensor, v_BHTV: Tensor, hidden: Tensor) -> Tensor:
    """A block of queries against all keys up to its end, but those that are `hidden`, (S, T) or (B, 1, S, T)."""
    scores_BHST = (q_BHSX @ k_BHTX.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    return softmax(scores_BHST).to(v_BHTV.dtype) @ v_BHTV
