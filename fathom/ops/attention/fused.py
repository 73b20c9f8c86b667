"""Causal attention by torch's fused kernels, which is what a GPU runs.

Shapes: B batch, S query length, T key length, H heads, X query/key width, V value width; N queries and T keys of
several sequences, one after another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.attention.reference import visible


def fused_causal_attention(
    q_BSHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`causal_attention_reference` by torch's fused kernels."""
    if cu_seqlens is not None and q_BSHX.is_cuda and flash_takes(q_BSHX, v_BTHV.shape[-1]):
        return _flash_segments(q_BSHX, k_BTHX, v_BTHV, scale, cu_seqlens)
    q_BHSX, k_BHTX, v_BHTV = (t.transpose(1, 2) for t in (q_BSHX, k_BTHX, v_BTHV))
    # torch's own causal mask puts the first query at the first key.
    causal = cu_seqlens is None and q_BHSX.shape[2] == k_BHTX.shape[2]
    mask = None if causal else visible(q_BSHX, k_BTHX.shape[1], cu_seqlens)
    fused_BHSV = F.scaled_dot_product_attention(q_BHSX, k_BHTX, v_BHTV, attn_mask=mask, is_causal=causal, scale=scale)
    return fused_BHSV.transpose(1, 2)


def flash_takes(q: Tensor, value: int) -> bool:
    """Whether the flash kernel takes queries (…, X) of this type and width, with values of so many elements."""
    width = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and value <= width <= 256


def flash(
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


def _flash_segments(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor, scale: float, cu_seqlens: Tensor) -> Tensor:
    """Segments as sequences of the flash kernel. (Neither this nor its gradients have been run on a GPU yet.)"""
    batch, length, _, width = q_BSHX.shape
    value = v_BSHV.shape[-1]
    q_NHX, k_NHX, v_NHX = (t.flatten(0, 1) for t in (q_BSHX, k_BSHX, F.pad(v_BSHV, (0, width - value))))
    # A row's length bounds its segments'; the longest segment itself would have to be read back from the device.
    out_NHX = flash(q_NHX, k_NHX, v_NHX, (cu_seqlens, cu_seqlens), (length, length), scale)
    return out_NHX[..., :value].unflatten(0, (batch, length))
