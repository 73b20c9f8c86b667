"""Accumulating gradients in float32, in one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


def sum_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of whatever types, in float32; into `a` where that is float32. Both are contiguous and of one shape."""
    out = a if a.dtype == torch.float32 else torch.empty_like(a, dtype=torch.float32)
    if a.numel():
        _sum[(triton.cdiv(a.numel(), _BLOCK),)](a, b, out, a.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@triton.jit
def _sum(a, b, out, elements, BLOCK: tl.constexpr):
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = here < elements
    total = tl.load(a + here, mask=there).to(tl.float32) + tl.load(b + here, mask=there).to(tl.float32)
    tl.store(out + here, total, mask=there)
