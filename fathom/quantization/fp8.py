"""DeepSeek-V3's FP8 format for weights: E4M3 values, one float32 scale per block of 128x128 (report, section 3.3.2).

weight = fp8 value · scale. A matrix whose size is not a multiple of 128 has partial blocks at its edges, each with a
scale of its own. The released repository's README_WEIGHTS.md describes the format.

Shapes: R rows, I columns, r and i blocks of 128 along them, B = 128.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_CHUNK_ELEMENTS = 1 << 20


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """How many blocks a matrix has, (r, i)."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of chunks of about a million elements, which end at block boundaries."""
    rows = shape[0]
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, _CHUNK_ELEMENTS // width // BLOCK) * BLOCK
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def quantize(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values (R, I) and float32 scales (r, i); the largest magnitude of a block becomes 448.

    Raises ValueError for weights that are not finite: one of them would make its whole block useless.
    """
    rows, columns = weight_RI.shape
    blocks_rBiB = _blocks(weight_RI.float())
    largest_ri = blocks_rBiB.abs().amax(dim=1).amax(dim=-1)
    if not largest_ri.isfinite().all():
        raise ValueError("there are values that are not finite, which FP8 blocks cannot hold")
    scales_ri = (largest_ri / _LARGEST).clamp_min(_SMALLEST_SCALE)
    qweight_rBiB = (blocks_rBiB / scales_ri[:, None, :, None]).to(torch.float8_e4m3fn)
    return qweight_rBiB.flatten(2).flatten(0, 1)[:rows, :columns], scales_ri


def dequantize(qweight_RI: Tensor, scales_ri: Tensor) -> Tensor:
    """The weight (R, I) in float32."""
    rows, columns = qweight_RI.shape
    weight_rBiB = _blocks(_to_float32(qweight_RI)) * scales_ri[:, None, :, None]
    return weight_rBiB.flatten(2).flatten(0, 1)[:rows, :columns]


def rounding_bound(weight_RI: Tensor, scales_ri: Tensor) -> Tensor:
    """The largest rounding error of each element (R, I): half a step, 2^-4 of its magnitude, or 2^-10 near zero."""
    rows, columns = weight_RI.shape
    bounds_rBiB = torch.maximum(_blocks(weight_RI.abs()) * 2**-4, scales_ri[:, None, :, None] * 2**-10)
    return bounds_rBiB.flatten(2).flatten(0, 1)[:rows, :columns]


def _blocks(matrix_RI: Tensor) -> Tensor:
    """The matrix as (r, 128, i, 128), padded with zeros."""
    rows, columns = matrix_RI.shape
    if rows % BLOCK or columns % BLOCK:
        matrix_RI = F.pad(matrix_RI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return matrix_RI.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def _to_float32(qweight_RI: Tensor) -> Tensor:
    """`qweight_RI.float()`, twenty times as fast.

    An E4M3 value has the bits of a bfloat16 value 2^120 times smaller, but for the width of the exponent: four zero
    bits are inserted behind the sign. NaN is the one value without such a twin.
    """
    bits_RI = qweight_RI.view(torch.int8)
    if ((bits_RI & 127) == 127).any():
        return qweight_RI.float()
    shifted_RI = (bits_RI.to(torch.int16) << 4) & ~0x7800
    return shifted_RI.view(torch.bfloat16).float() * 2.0**120
