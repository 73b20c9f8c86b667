"""Loading a tile of a weight matrix in any of the formats of fathom/quantization/integer.py.

Shapes: O output rows, I input columns, X a block of either.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_FORMATS = {torch.int8: INT8.value, torch.int32: INT4.value}


class Weight(NamedTuple):
    """A matrix (O, I), or a stack of them, as it lies in memory."""

    data: Tensor
    scales: Tensor | None = None

    @property
    def format(self) -> int:
        """PLAIN, INT8 or INT4, from the type it is stored in."""
        return _FORMATS.get(self.data.dtype, PLAIN.value)

    @property
    def scales_or_data(self) -> Tensor:
        """The scales or, as a kernel needs some pointer, the data where there are none."""
        return self.data if self.scales is None else self.scales


class Tiling(NamedTuple):
    """Block sizes and launch options of a linear layer's kernel."""

    tokens: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        blocks = {"BLOCK_N": self.tokens, "BLOCK_O": self.outputs, "BLOCK_I": self.inputs}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


def tiling(tokens: int, outputs: int, inputs: int, bytes_each: int) -> Tiling:
    """For a linear layer of `tokens` rows; `outputs` counts those of all matrices in one launch.

    The sizes are the fastest of some thirty that were tried on an H200 (docs/log/gpu.md). Few outputs need small
    tiles, or they would not reach all multiprocessors.
    """
    block_n = min(64, max(16, triton.next_power_of_2(tokens)))
    many = outputs >= 8192
    if block_n == 16:
        block_o, block_i, warps, stages = (32 if many else 16), 128, 2, 4
    elif many:
        block_o, block_i, warps, stages = 128, 64, 4, 3
    elif block_n == 32:
        block_o, block_i, warps, stages = 32, 256, 4, 4
    else:
        block_o, block_i, warps, stages = (64 if outputs >= 4096 else 16), 128, 4, 4
    block_i = max(32, min(block_i * 2 // bytes_each, triton.next_power_of_2(inputs)))
    return Tiling(block_n, block_o, block_i, warps, stages)


def type_of(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a floating-point type."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@triton.jit
def load_tile(w, scales, o_X, o_ok_X, i_X, inputs, stride_o, stride_i, FORMAT: tl.constexpr, TYPE: tl.constexpr):
    """Rows `o_X` times columns `i_X` of a matrix in TYPE; zeros outside. int8 still lacks its rows' scales.

    Columns are consecutive and, for int4, whole groups of 32.
    """
    o_X = o_X.to(tl.int64)
    if FORMAT == INT4:
        BLOCK_O: tl.constexpr = o_X.shape[0]
        BLOCK_I: tl.constexpr = i_X.shape[0]
        GROUPS: tl.constexpr = BLOCK_I // 32
        group_G = tl.min(i_X) // 32 + tl.arange(0, GROUPS)
        ok_OG = o_ok_X[:, None] & (group_G < inputs // 32)[None, :]
        at_OG = o_X[:, None] * (inputs // 32) + group_G[None, :]
        scale_OG = tl.load(scales + at_OG, mask=ok_OG, other=0.0).to(tl.float32)
        # Column 4k + l of a group is the k-th half byte of its word l.
        word_OGL = tl.load(w + at_OG[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], mask=ok_OG[:, :, None], other=0)
        half_OGKL = (word_OGL[:, :, None, :] >> (tl.arange(0, 8) * 4)[None, None, :, None]) & 15
        value_OGX = tl.reshape(half_OGKL, (BLOCK_O, GROUPS, 32)) - 8
        tile_OI = tl.reshape(value_OGX.to(tl.float32) * scale_OG[:, :, None], (BLOCK_O, BLOCK_I))
    else:
        ok_OI = o_ok_X[:, None] & (i_X < inputs)[None, :]
        tile_OI = tl.load(w + o_X[:, None] * stride_o + i_X[None, :] * stride_i, mask=ok_OI, other=0)
    return tile_OI.to(TYPE)


@triton.jit
def row_scales(scales, o_X, o_ok_X, FORMAT: tl.constexpr):
    """The factors that dot products with an int8 tile's rows still lack; 1 for the other formats."""
    if FORMAT == INT8:
        return tl.load(scales + o_X, mask=o_ok_X, other=0.0)
    return tl.full(o_X.shape, 1.0, tl.float32)
