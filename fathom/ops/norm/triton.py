"""The residual stream of few tokens: add the layer's results, and normalise the sum for the next layer.

The reference is a sum and `rms_norm_reference` (fathom/ops/norm).

Shapes: N tokens, D hidden, K terms to add.
"""

import triton
import triton.language as tl
from torch import Tensor


def add_and_normalise(x_ND: Tensor, y_NKD: Tensor | None, weight_D: Tensor, eps: float, out_ND: Tensor) -> None:
    """x += Σ_k y (in this order), in float32; out = RMSNorm(x) in its own type."""
    tokens, hidden = x_ND.shape
    block = triton.next_power_of_2(hidden)
    results = 0 if y_NKD is None else y_NKD.shape[1]
    arguments = (x_ND, x_ND if y_NKD is None else y_NKD, weight_D, eps, out_ND, hidden)
    _add[(tokens,)](*arguments, RESULTS=results, BLOCK_D=block, num_warps=min(8, max(1, block // 256)))


@triton.jit
def normalised(x_D, weight, d_D, size, eps):
    """A row's RMSNorm, in float32; `d_D` are the row's columns, of which `size` exist, and the others are 0."""
    x_D = x_D.to(tl.float32)
    return x_D * tl.rsqrt(tl.sum(x_D * x_D, 0) / size + eps) * tl.load(weight + d_D, mask=d_D < size, other=0.0)


@triton.jit
def _add(x, y, weight, eps, out, hidden, RESULTS: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0)
    d_D = tl.arange(0, BLOCK_D)
    ok = d_D < hidden
    x_D = tl.load(x + n * hidden + d_D, mask=ok, other=0.0)
    for k in tl.static_range(RESULTS):
        x_D += tl.load(y + (n * RESULTS + k) * hidden + d_D, mask=ok, other=0.0)
    if RESULTS > 0:
        tl.store(x + n * hidden + d_D, x_D, mask=ok)
    tl.store(out + n * hidden + d_D, normalised(x_D, weight, d_D, hidden, eps).to(out.dtype.element_ty), mask=ok)
