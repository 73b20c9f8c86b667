"""Linear layers of few tokens, bound by reading the weights.

The reference is `linear_reference` (fathom/ops/linear/reference.py).

Shapes: N tokens, H heads that have a matrix each, I inputs, O outputs.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.linear.triton_tiles import Weight, load_tile, row_scales, tiling, type_of


def linear(x_NI: Tensor, weights: Sequence[Weight], outs: Sequence[Tensor]) -> None:
    """out = x·Wᵀ for one or two matrices (O, I) in one launch; inputs in x's type, sums in float32."""
    first, last = weights[0], weights[-1]
    sizes = [weight.data.shape[0] for weight in weights]
    second = sizes[1] if len(sizes) > 1 else 0
    _launch(x_NI[:, None], first, last, outs[0][:, None], outs[-1][:, None], sizes[0], second)


def head_linear(x_NHI: Tensor, weight_HOI: Tensor, out_NHO: Tensor) -> None:
    """out = x·Wᵀ with a matrix for every head; `weight_HOI` may be any view."""
    weight = Weight(weight_HOI)
    _launch(x_NHI, weight, weight, out_NHO, out_NHO, weight_HOI.shape[1], 0)


def _launch(
    x_NHI: Tensor, first: Weight, last: Weight, out_NHO: Tensor, last_NHO: Tensor, outputs: int, last_outputs: int
) -> None:
    tokens, heads, inputs = x_NHI.shape
    data = first.data
    stride_h = data.stride(0) if data.dim() == 3 else 0
    tiles = tiling(tokens, heads * (outputs + last_outputs), inputs, x_NHI.element_size())
    blocks = triton.cdiv(outputs, tiles.outputs)
    grid = (blocks + triton.cdiv(last_outputs, tiles.outputs), heads, triton.cdiv(tokens, tiles.tokens))
    _linear[grid](
        *(x_NHI, first.data, first.scales_or_data, out_NHO, outputs),
        *(last.data, last.scales_or_data, last_NHO, last_outputs),
        *(tokens, inputs, blocks, x_NHI.stride(0), x_NHI.stride(1), stride_h, *data.stride()[-2:]),
        *(out_NHO.stride(0), out_NHO.stride(1), last_NHO.stride(0)),
        FORMAT=first.format,
        TYPE=type_of(x_NHI.dtype),
        **tiles.options(),
    )


@triton.jit
def _linear(
    x,
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
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    w, scales, outputs = w0, scales0, outputs0
    second = block >= blocks0
    if second:
        w, scales, outputs = w1, scales1, outputs1
        block -= blocks0
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_O = block * BLOCK_O + tl.arange(0, BLOCK_O)
    n_ok, o_ok = n_N < tokens, o_O < outputs
    x += head * x_h
    w += head.to(tl.int64) * w_h
    sum_NO = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        x_NI = tl.load(x + n_N[:, None] * x_n + i_I[None, :], mask=n_ok[:, None] & (i_I < inputs)[None, :], other=0.0)
        tile_OI = load_tile(w, scales, o_O, o_ok, i_I, inputs, w_o, w_i, FORMAT, TYPE)
        sum_NO = tl.dot(x_NI, tl.trans(tile_OI), sum_NO, input_precision="ieee")
    sum_NO *= row_scales(scales, o_O, o_ok, FORMAT)[None, :]
    ok_NO = n_ok[:, None] & o_ok[None, :]
    if second:
        tl.store(y1 + n_N[:, None] * y1_n + o_O[None, :], sum_NO.to(y1.dtype.element_ty), mask=ok_NO)
    else:
        at_NO = y0 + n_N[:, None] * y0_n + head * y_h + o_O[None, :]
        tl.store(at_NO, sum_NO.to(y0.dtype.element_ty), mask=ok_NO)
