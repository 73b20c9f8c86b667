"""RMSNorm with statistics in float32 (arXiv 1910.07467).

Shapes: N rows (all dimensions but the last), D size of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu
from fathom.ops.norm.reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As the reference; on the CPU in one pass forward and one backward, on a GPU in one kernel without gradients."""
    if not cpu.usable(x, weight_D):
        if x.dtype == weight_D.dtype and gpu.usable(x, weight_D):
            return F.rms_norm(x, weight_D.shape, weight_D, eps)  # its statistics are float32 there
        return rms_norm_reference(x, weight_D, eps)
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = _rows(x)
        y, inverse_N = x.new_empty(x.shape), x.new_empty(x_ND.shape[0], dtype=torch.float32)
        cpu.call("rms_norm", x.dtype, x_ND, x_ND.stride(0), weight_D.float(), y, inverse_N, *x_ND.shape, eps)
        ctx.save_for_backward(x, weight_D, inverse_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_D, inverse_N = ctx.saved_tensors
        x_ND, dy, dx = _rows(x), dy.contiguous(), x.new_empty(x.shape)
        shares_TD = x.new_zeros(torch.get_num_threads(), x.shape[-1], dtype=torch.float32)
        arguments = (x_ND, x_ND.stride(0), weight_D.float(), inverse_N, dy, dx, shares_TD, *x_ND.shape)
        cpu.call("rms_norm_backward", x.dtype, *arguments)
        return dx, shares_TD.sum(0).to(weight_D.dtype), None


def _rows(x: Tensor) -> Tensor:
    """(N, D) with contiguous rows; a view wherever the rows are evenly spaced."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
