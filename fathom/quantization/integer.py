"""Weights in 8 and 4 bits: the two formats in plain torch. The kernels (fathom/ops/linear/) read the same bytes.

int8: integers −127 … 127 with a float32 scale per row. int4: integers −8 … 7 with a bfloat16 scale per group of 32
columns; a group is packed into four 32-bit words, column 4k + l being nibble k of word l, plus 8.
Round to nearest, symmetric, no calibration.

Shapes: (…, R rows, I columns), G = I/32 groups, of a group: L words, K nibbles in each, X columns.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["int8", "int4"]

_GROUP = 32
_WORDS = 4
_SHIFTS = range(0, 32, 4)


def quantize(weight_RI: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Quantised values and scales of matrices (…, R, I).

    int8: int8 (…, R, I) and float32 (…, R). int4: int32 words (…, R, I/8) and bfloat16 (…, R, I/32).

    Raises ValueError for int4 where the number of columns is not a multiple of 32.
    """
    return _to_int8(weight_RI.float()) if precision == "int8" else _to_int4(weight_RI.float())


def dequantize(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices (…, R, I) that the quantised values and their scales stand for."""
    if qweight.dtype == torch.int8:
        return (qweight * scales[..., None]).to(dtype)
    words_RGL = qweight.unflatten(-1, (-1, _WORDS))
    nibbles_RGKL = torch.stack([(words_RGL >> shift) & 15 for shift in _SHIFTS], dim=-2)
    weight_RGX = (nibbles_RGKL.flatten(-2) - 8) * scales[..., None].float()
    return weight_RGX.flatten(-2).to(dtype)


def quantized_bytes(shape: Sequence[int], precision: Precision) -> int:
    """Bytes that matrices of this shape (…, R, I) take once quantised, scales included; raises as `quantize` does."""
    elements, columns = math.prod(shape), shape[-1]
    if precision == "int8":
        return elements + 4 * (elements // columns)
    _check_columns(columns)
    return elements // 2 + 2 * (elements // _GROUP)


def _to_int8(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    scales_R = weight_RI.abs().amax(-1) / 127
    rounded_RI = (weight_RI / scales_R.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
    return rounded_RI.clamp(-127, 127).to(torch.int8), scales_R


def _to_int4(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    _check_columns(weight_RI.shape[-1])
    groups_RGX = weight_RI.unflatten(-1, (-1, _GROUP))
    # The value of largest magnitude becomes −8 exactly: one more step than +7 would give.
    extreme_RG1 = groups_RGX.gather(-1, groups_RGX.abs().argmax(-1, keepdim=True))
    scales_RG = (extreme_RG1 / -8).squeeze(-1).bfloat16()
    divisor_RG1 = scales_RG.float()[..., None]
    rounded_RGX = torch.where(divisor_RG1 == 0, 0.0, groups_RGX / divisor_RG1).round().clamp(-8, 7).int() + 8
    nibbles_RGKL = rounded_RGX.unflatten(-1, (-1, _WORDS))
    words_RGL = torch.zeros_like(nibbles_RGKL[..., 0, :])
    for k, shift in enumerate(_SHIFTS):
        words_RGL |= nibbles_RGKL[..., k, :] << shift
    return words_RGL.flatten(-2), scales_RG


def _check_columns(columns: int) -> None:
    if columns % _GROUP:
        raise ValueError(
            f"int4 needs matrices whose number of columns is a multiple of {_GROUP}, and one has {columns}; int8 takes "
            "any"
        )
