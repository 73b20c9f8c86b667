"""DeepSeek-V3's FP8 weights: E4M3 numbers with one float32 scale per block of 128x128 (report, section 3.3.2).

value = fp8 · scale_inv. A matrix `NAME.weight` has its scales in `NAME.weight_scale_inv`, one per block, ragged edges
counted as blocks. The released repository's README_WEIGHTS.md describes the format.

Shapes: R rows, I columns, r and i blocks of 128 along them.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
SCALE = "_scale_inv"
"""What a scale's name has behind its weight's."""
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""config.json's quantization_config, by which other programs know the format."""

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Embedding, head, norms, router and eh_proj stay wide, as in the released weights.
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
)


def is_quantized(name: str) -> bool:
    """Whether the released FP8 checkpoints hold the tensor of this name in FP8."""
    return _QUANTIZED.fullmatch(name) is not None


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """How many blocks a matrix has, (r, i)."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(weight_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (R, I) in E4M3 and the scales (r, i) in float32; each block's largest number becomes 448.

    Raises ValueError for weights that are not finite: one would take its whole block with it.
    """
    rows, columns = weight_RI.shape
    blocks_rBiB = _blocks(weight_RI.float())
    largest_ri = blocks_rBiB.abs().amax(dim=1).amax(dim=-1)
    if not largest_ri.isfinite().all():
        raise ValueError("there are numbers that are not finite, which FP8 blocks cannot hold")
    scales_ri = (largest_ri / _LARGEST).clamp_min(_SMALLEST_SCALE)
    numbers_rBiB = (blocks_rBiB / scales_ri[:, None, :, None]).to(torch.float8_e4m3fn)
    return numbers_rBiB.flatten(2).flatten(0, 1)[:rows, :columns], scales_ri


def dequantize(numbers_RI: Tensor, scales_ri: Tensor) -> Tensor:
    """The values (R, I) in float32."""
    rows, columns = numbers_RI.shape
    values_rBiB = _blocks(_widened(numbers_RI)) * scales_ri[:, None, :, None]
    return values_rBiB.flatten(2).flatten(0, 1)[:rows, :columns]


def rounding_bound(weight_RI: Tensor, scales_ri: Tensor) -> Tensor:
    """How far each value (R, I) may lie from its FP8 number: half a step, which is 2^-4 of it, or 2^-10 near zero."""
    rows, columns = weight_RI.shape
    bounds_rBiB = torch.maximum(_blocks(weight_RI.abs()) * 2**-4, scales_ri[:, None, :, None] * 2**-10)
    return bounds_rBiB.flatten(2).flatten(0, 1)[:rows, :columns]


def _blocks(matrix_RI: Tensor) -> Tensor:
    """The matrix as (r, 128, i, 128), filled up with zeros."""
    rows, columns = matrix_RI.shape
    if rows % BLOCK or columns % BLOCK:
        matrix_RI = F.pad(matrix_RI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return matrix_RI.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def _widened(numbers_RI: Tensor) -> Tensor:
    """The numbers in float32, as `numbers_RI.float()` gives them, twenty times as fast.

    The bits of an E4M3 number are those of a bfloat16 number 2^120 times as small, but for the exponent's width: four
    bits that stand for the missing ones are slipped in behind the sign. NaN is the one number that has no such twin.
    """
    bits_RI = numbers_RI.view(torch.int8)
    if ((bits_RI & 127) == 127).any():
        return numbers_RI.float()
    shifted_RI = (bits_RI.to(torch.int16) << 4) & ~0x7800
    return shifted_RI.view(torch.bfloat16).float() * 2.0**120
