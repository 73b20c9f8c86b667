"""Expanded attention on the CPU, forward and backward: attention.cpp as an autograd function.

Shapes: B batch, S query length, T key length, H heads, X query/key width P+R, V value width, R rope width, Y = P+V;
N = B·S tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu
from fathom.ops.attention.blocks import query_block, query_blocks

_KEPT_LENGTH = 1024
"""Up to this length the probabilities are kept for the backward pass; beyond, it recomputes them."""


class ExpandedAttention(torch.autograd.Function):
    """One head of one segment per task (attention.cpp)."""

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
    return sum((end - start) * end for start, end in query_blocks(length, block))
