"""Linear layers y = x·Wᵀ whose weights may be kept in a wider type than the activations.

Shapes: N rows (all dimensions but the last), I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu
from fathom.ops.linear.reference import linear_reference

__all__ = ["dgrad", "fprop", "has_kernel", "linear", "linear_reference", "wgrad"]

_LEAST_ROWS = 32
"""With fewer rows, packing the weights costs more than it saves."""


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """As the reference. CPUs with bfloat16 dot products round float32 weights as they read them (gemm.h).

    There the gradient of float32 weights is summed in float32 and never rounded to x's type.
    """
    if x.numel() < _LEAST_ROWS * x.shape[-1] or not has_kernel(x, weight_OI):
        return linear_reference(x, weight_OI)
    y: Tensor = _Linear.apply(x, weight_OI)
    return y


def has_kernel(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether our kernels do the layer's matmuls, rounding float32 weights themselves."""
    matching = weight_OI.dtype in (torch.float32, x.dtype)
    return matching and cpu.usable(x, weight_OI) and cpu.has_bf16_gemm(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x, weight_OI = x.contiguous(), weight_OI.contiguous()
        ctx.save_for_backward(x, weight_OI)
        y = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
        fprop(x.view(-1, x.shape[-1]), weight_OI, y.view(-1, y.shape[-1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        dy_NO, dx, dweight_OI = dy.contiguous().view(-1, dy.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            dgrad(dy_NO, weight_OI, dx.view(-1, x.shape[-1]))
        if ctx.needs_input_grad[1]:
            wide_OI = torch.empty_like(weight_OI, dtype=torch.float32)
            wgrad(dy_NO, x.view(-1, x.shape[-1]), wide_OI, adds=False)
            dweight_OI = wide_OI.to(weight_OI.dtype)
        return dx, dweight_OI


# The three matmuls of training, into existing contiguous matrices. Without our kernels (`has_kernel`) they are torch's,
# and the weights must have the activations' type.


def fprop(x_NI: Tensor, weight_OI: Tensor, out_NO: Tensor) -> None:
    """out = x·Wᵀ."""
    if not has_kernel(x_NI, weight_OI):
        torch.mm(x_NI, weight_OI.t(), out=out_NO)
    else:
        cpu.call("linear", weight_OI.dtype, x_NI, weight_OI, out_NO, *_sizes(x_NI, out_NO))


def dgrad(dy_NO: Tensor, weight_OI: Tensor, out_NI: Tensor) -> None:
    """out = dy·W."""
    if not has_kernel(dy_NO, weight_OI):
        torch.mm(dy_NO, weight_OI, out=out_NI)
    else:
        cpu.call("linear_dgrad", weight_OI.dtype, dy_NO, weight_OI, out_NI, *_sizes(out_NI, dy_NO))


def wgrad(dy_NO: Tensor, x_NI: Tensor, out_OI: Tensor, adds: bool) -> None:
    """out = dyᵀ·x or, where it `adds`, out += dyᵀ·x; in float32 at least."""
    if not has_kernel(x_NI, out_OI):
        if x_NI.is_cuda and x_NI.dtype != out_OI.dtype and not adds:
            torch.mm(dy_NO.t(), x_NI, out_dtype=out_OI.dtype, out=out_OI)  # not rounded to x's type on its way
            return
        found_OI = dy_NO.t() @ x_NI
        out_OI.add_(found_OI) if adds else out_OI.copy_(found_OI)
    else:
        cpu.call("linear_wgrad", out_OI.dtype, dy_NO, x_NI, out_OI, *_sizes(x_NI, dy_NO), int(adds))


def _sizes(x_NI: Tensor, y_NO: Tensor) -> tuple[int, int, int]:
    return x_NI.shape[0], x_NI.shape[1], y_NO.shape[1]
