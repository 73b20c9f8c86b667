"""Linear maps of few rows: reading the weights is all the work, so that norm and sum around them come for free.

The reference is `rms_norm_reference` followed by `linear_reference` (fathom/ops).

Shapes: N tokens, H heads that have a matrix each, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.gpu.tiles import Weight, load_tile, row_scales, type_of


class Norm(NamedTuple):
    """An RMSNorm that is still to be applied to the input."""

    weight_I: Tensor
    eps: float


def token_block(tokens: int) -> int:
    """Tokens that a program takes together: tensor cores multiply sixteen rows at least."""
    return min(64, max(16, triton.next_power_of_2(tokens)))


def linear(
    x_NI: Tensor,
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    norm: Norm | None = None,
    adds: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """out = x·Wᵀ for one or two matrices (O, I) in one launch, or out += x·Wᵀ where it `adds`.

    With `norm`, x is normalised first. What is multiplied has the type `dtype`, or else that of unquantised weights, or
    else the norm's; sums are float32.
    """
    first, last = weights[0], weights[-1]
    sizes = [weight.numbers.shape[0] for weight in weights]
    second = sizes[1] if len(sizes) > 1 else 0
    _launch(x_NI[:, None], first, last, outs[0][:, None], outs[-1][:, None], sizes[0], second, norm, adds, dtype)


def head_linear(x_NHI: Tensor, weight_HOI: Tensor, out_NHO: Tensor) -> None:
    """out = x·Wᵀ, every head with its own matrix; `weight_HOI` may be any view."""
    weight = Weight(weight_HOI)
    _launch(x_NHI, weight, weight, out_NHO, out_NHO, weight_HOI.shape[1], 0)


def _launch(
    x_NHI: Tensor,
    first: Weight,
    last: Weight,
    out_NHO: Tensor,
    last_NHO: Tensor,
    outputs: int,
    last_outputs: int,
    norm: Norm | None = None,
    adds: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    tokens, heads, inputs = x_NHI.shape
    numbers = first.numbers
    kind = dtype or (numbers if numbers.is_floating_point() else x_NHI if norm is None else norm.weight_I).dtype
    stride_h = numbers.stride(0) if numbers.dim() == 3 else 0
    block_n, block_o = token_block(tokens), 16 if tokens <= 16 else 32
    blocks = triton.cdiv(outputs, block_o)
    grid = (blocks + triton.cdiv(last_outputs, block_o), heads, triton.cdiv(tokens, block_n))
    _linear[grid](
        *(x_NHI, x_NHI if norm is None else norm.weight_I, 0.0 if norm is None else norm.eps),
        *(first.numbers, first.scales_or_numbers, out_NHO, outputs),
        *(last.numbers, last.scales_or_numbers, last_NHO, last_outputs),
        *(tokens, inputs, blocks, x_NHI.stride(0), x_NHI.stride(1), stride_h, *numbers.stride()[-2:]),
        *(out_NHO.stride(0), out_NHO.stride(1), last_NHO.stride(0)),
        NORM=norm is not None,
        ADDS=adds,
        FORMAT=first.format,
        TYPE=type_of(kind),
        BLOCK_N=block_n,
        BLOCK_O=block_o,
        BLOCK_I=_input_block(kind, inputs, block_n),
        num_warps=4,
        num_stages=3,
    )


def _input_block(kind: torch.dtype, inputs: int, block_n: int) -> int:
    most = 256 if block_n == 16 else 128
    return max(32, min(most * 2 // kind.itemsize, triton.next_power_of_2(inputs)))


@triton.jit
def _linear(
    x,
    norm,
    eps,
    w0,
    scales0,
    y0,
    outputs0,
    w1,
    scales1,
    y1,
    outputs1,
    tokens,
    inputs,
    blocks0,
    x_n,
    x_h,
    w_h,
    w_o,
    w_i,
    y0_n,
    y_h,
    y1_n,
    NORM: tl.constexpr,
    ADDS: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    w, scales, y, y_n, outputs = w0, scales0, y0, y0_n, outputs0
    if block >= blocks0:
        w, scales, y, y_n, outputs = w1, scales1, y1, y1_n, outputs1
        block -= blocks0
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_O = block * BLOCK_O + tl.arange(0, BLOCK_O)
    n_ok, o_ok = n_N < tokens, o_O < outputs
    x += head * x_h
    w += head.to(tl.int64) * w_h
    sum_NO = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    square_N = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        x_NI = tl.load(x + n_N[:, None] * x_n + i_I[None, :], mask=n_ok[:, None] & (i_I < inputs)[None, :], other=0.0)
        if NORM:
            x_NI = x_NI.to(tl.float32)
            square_N += tl.sum(x_NI * x_NI, 1)
            x_NI *= tl.load(norm + i_I, mask=i_I < inputs, other=0.0).to(tl.float32)[None, :]
        tile_OI = load_tile(w, scales, o_O, o_ok, i_I, inputs, w_o, w_i, FORMAT, TYPE)
        sum_NO = tl.dot(x_NI.to(TYPE), tl.trans(tile_OI), sum_NO, input_precision="ieee")
    if NORM:
        sum_NO *= tl.rsqrt(square_N / inputs + eps)[:, None]
    sum_NO *= row_scales(scales, o_O, o_ok, FORMAT)[None, :]
    at_NO = y + n_N[:, None] * y_n + head * y_h + o_O[None, :]
    ok_NO = n_ok[:, None] & o_ok[None, :]
    if ADDS:
        sum_NO += tl.load(at_NO, mask=ok_NO, other=0.0).to(tl.float32)
    tl.store(at_NO, sum_NO.to(y.dtype.element_ty), mask=ok_NO)
