"""Rotary embedding inside a kernel; the reference is `apply_rope` (fathom/ops/rope)."""

import triton
import triton.language as tl


@triton.jit
def rotated(even, odd, cos, sin, TYPE: tl.constexpr):
    """The first and the second half of what `apply_rope` makes of pairs (even, odd), rounded to TYPE."""
    return (even * cos - odd * sin).to(TYPE), (odd * cos + even * sin).to(TYPE)
