"""Rotary embedding of queries and keys, on tables of cosines and sines (RoFormer, arXiv 2104.09864).

Shapes: B batch, S query length, H heads, R rotated width, J = R/2 pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """cos and sin of each position's angles, (S, J) when all rows share positions, else (B, S, J); float32."""

    cos: Tensor
    sin: Tensor


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x (B, S, R) or (B, S, H, R) by its positions' angles.

    Pairs are read interleaved and written as two halves: queries and keys alike, so their dot products are those of
    the interleaved layout without the cost of interleaving again.
    """
    heads = x.dim() == 4
    cos, sin = (t.unsqueeze(-2) if heads else t for t in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)
