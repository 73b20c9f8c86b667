"""Linear layers of bfloat16 activations whose float32 weights must not be rounded, on tensor cores.

A float32 value is the sum of three bfloat16 values, whose products with a bfloat16 value are exact in float32. Three
bfloat16 matmuls therefore give the float32 one, several times faster on a GPU, whose tensor cores do not multiply
float32.

Shapes: N rows, I inputs, O outputs, P = 3 parts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import gpu
from fathom.ops.linear.reference import fp32_linear_reference


def fp32_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """As the reference; on a GPU bfloat16 activations take bfloat16 matmuls."""
    if x_NI.dtype == weight_OI.dtype == torch.bfloat16 and gpu.usable(x_NI, weight_OI):
        return _multiply(x_NI, weight_OI.t())
    if not x_NI.is_cuda or (x_NI.dtype, weight_OI.dtype) != (torch.bfloat16, torch.float32):
        return fp32_linear_reference(x_NI, weight_OI)
    y_NO: Tensor = FP32Linear.apply(x_NI, weight_OI)
    return y_NO


class FP32Linear(torch.autograd.Function):
    """By bfloat16 matmuls, on any device."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return _forward(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_NI, weight_OI = ctx.saved_tensors
        return _dgrad(dy_NO, weight_OI), _wgrad(dy_NO, x_NI)


# Operators of their own: torch.compile would drop the rounding to bfloat16 and back that `_parts` is made of.


@torch.library.custom_op("fathom::fp32_matmul", mutates_args=())
def _forward(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    parts_NPO = _multiply(x_NI, torch.cat(_parts(weight_OI, 3)).t()).unflatten(1, (3, -1))
    return parts_NPO.sum(1)


@_forward.register_fake
def _(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0], dtype=torch.float32)


@torch.library.custom_op("fathom::fp32_matmul_dgrad", mutates_args=())
def _dgrad(dy_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """dy·W in bfloat16: two parts of each factor exceed its precision, and both second parts' product is negligible."""
    dy, w = _parts(dy_NO, 2), _parts(weight_OI, 2)
    return torch.cat((dy[0], dy[0], dy[1]), 1) @ torch.cat((w[0], w[1], w[0]))


@_dgrad.register_fake
def _(dy_NO: Tensor, weight_OI: Tensor) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[0], weight_OI.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("fathom::fp32_matmul_wgrad", mutates_args=())
def _wgrad(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    parts_POI = _multiply(torch.cat(_parts(dy_NO, 3), 1).t(), x_NI).unflatten(0, (3, -1))
    return parts_POI.sum(0)


@_wgrad.register_fake
def _(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[1], x_NI.shape[1])


def _parts(wide: Tensor, count: int) -> list[Tensor]:
    """The bfloat16 values whose sum is nearest to `wide`, largest first; three hold all 24 bits of its significand."""
    parts = []
    for _ in range(count):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1]
    return parts


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a·b of bfloat16 matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
