"""Rotary positions on the R rope dimensions of queries and of the one shared key (DeepSeek-V2, section 2.1.3).

The released weights rotate INTERLEAVED pairs (x0, x1), (x2, x3), …; angles are float32 whatever the compute type.
YaRN (arXiv 2309.00071) slows the low-frequency dimensions to reach beyond the original context length.

Shapes: B batch, S query length, R qk_rope_head_dim, J = R/2 pairs.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from fathom.ops.rope import Rope


def mscale(factor: float, weight: float) -> float:
    """YaRN's temperature for a context `factor` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor on attention scores: (P+R)^-0.5, times mscale² under YaRN when mscale_all_dim is given."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rope_table(config: ModelConfig, positions: Tensor) -> Rope:
    """cos and sin for integer positions (S) or (B, S); the last dimension becomes J."""
    angles = positions[..., None].float() * _inverse_frequencies(config, positions.device)
    magnitude = _magnitude(config.rope_scaling)
    return Rope(angles.cos() * magnitude, angles.sin() * magnitude)


def _magnitude(yarn: YarnScaling | None) -> float:
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return mscale(yarn.factor, 1.0)


@lru_cache(maxsize=64)
def _inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair, (J), float32."""
    size = config.qk_rope_head_dim
    exponents_J = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies_J = 1.0 / config.rope_theta**exponents_J
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies_J
    low, high = _correction_range(config, yarn)
    ramp_J = (torch.arange(size // 2, device=device, dtype=torch.float32) - low) / (high - low)
    slowed_J = ramp_J.clamp(0, 1)
    return frequencies_J / yarn.factor * slowed_J + frequencies_J * (1 - slowed_J)


def _correction_range(config: ModelConfig, yarn: YarnScaling) -> tuple[float, float]:
    """Pairs between which YaRN passes from keeping a frequency to dividing it by the factor."""
    size, length = config.qk_rope_head_dim, yarn.original_max_position_embeddings

    def pair_turning(rotations: float) -> float:
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), size - 1)
    # Both bounds can fall together on a narrow rope; the ramp is then a step.
    return low, high + 0.001 if low == high else high
