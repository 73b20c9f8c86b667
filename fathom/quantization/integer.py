"""Weights in 8 and 4 bits: the two formats, in plain torch. fathom/ops/linear/gemv.h reads the same bytes.

int8: whole numbers −127 … 127 times a float32 scale of their row. int4: whole numbers −8 … 7 times a bfloat16 scale of
their group of 32 columns; a group is four words, of which column 4k + l is the k-th half byte of word l, plus 8.
Symmetric rounding to the nearest, no calibration.

Shapes: (…, R rows, I columns), G = I/32 groups.
"""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["int8", "int4"]

_GROUP = 32
_WORDS = 4
_SHIFTS = range(0, 32, 4)


def quantize(weight_RI: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The numbers and the scales of matrices (…, R, I): int8 (…, R, I) with float32 (…, R), or int32 words
    (…, R, I/8) with bfloat16 (…, R, I/32).

    Raises ValueError where int4 meets a number of columns that 32 does not divide.
    """
    return _to_int8(weight_RI.float()) if precision == "int8" else _to_int4(weight_RI.float())


def dequantize(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices (…, R, I) that the kernels multiply with."""
    if numbers.dtype == torch.int8:
        return (numbers * scales[..., None]).to(dtype)
    groups_RGL = numbers.unflatten(-1, (-1, _WORDS))
    halves_RGKL = torch.stack([(groups_RGL >> shift) & 15 for shift in _SHIFTS], dim=-2)
    weight_RGX = (halves_RGKL.flatten(-2) - 8) * scales[..., None].float()
    return weight_RGX.flatten(-2).to(dtype)


def _to_int8(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    scales_R = weight_RI.abs().amax(-1) / 127
    whole_RI = (weight_RI / scales_R.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
    return whole_RI.clamp(-127, 127).to(torch.int8), scales_R


def _to_int4(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    if weight_RI.shape[-1] % _GROUP:
        raise ValueError(
            f"int4 needs matrices whose number of columns is a multiple of {_GROUP}, and one has "
            f"{weight_RI.shape[-1]}; int8 takes any"
        )
    groups_RGX = weight_RI.unflatten(-1, (-1, _GROUP))
    # The number of the largest magnitude becomes −8 exactly: one more step than +7 would give.
    extreme_RG1 = groups_RGX.gather(-1, groups_RGX.abs().argmax(-1, keepdim=True))
    scales_RG = (extreme_RG1 / -8).squeeze(-1).bfloat16()
    divisor_RG1 = scales_RG.float()[..., None]
    whole_RGX = torch.where(divisor_RG1 == 0, 0.0, groups_RGX / divisor_RG1).round().clamp(-8, 7).int() + 8
    halves_RGKL = whole_RGX.unflatten(-1, (-1, _WORDS))
    words_RGL = torch.zeros_like(halves_RGKL[..., 0, :])
    for k, shift in enumerate(_SHIFTS):
        words_RGL |= halves_RGKL[..., k, :] << shift
    return words_RGL.flatten(-2), scales_RG
