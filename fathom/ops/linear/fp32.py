"""Linear maps of bfloat16 rows whose float32 weights must not be rounded, on tensor cores.

A float32 number is the sum of three bfloat16 ones, whose products with a bfloat16 number are exact in float32. Three
narrow products side by side therefore give the wide one, several times faster on a GPU, which multiplies float32
numbers outside its tensor cores.

Shapes: N rows, I size of an input row, O of an output row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import gpu
from fathom.ops.linear.reference import fp32_linear_reference


def fp32_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """As the reference; of bfloat16 rows on a GPU by narrow products."""
    if x_NI.dtype == weight_OI.dtype == torch.bfloat16 and gpu.usable(x_NI, weight_OI):
        return _multiply(x_NI, weight_OI.t())
    if not x_NI.is_cuda or (x_NI.dtype, weight_OI.dtype) != (torch.bfloat16, torch.float32):
        return fp32_linear_reference(x_NI, weight_OI)
    y_NO: Tensor = FP32Linear.apply(x_NI, weight_OI)
    return y_NO


class FP32Linear(torch.autograd.Function):
    """By narrow products, on any device."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return _product(x_NI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_NI, weight_OI = ctx.saved_tensors
        return _input_gradient(dy_NO, weight_OI), _weight_gradient(dy_NO, x_NI)


# Operators of their own: torch.compile would drop the rounding to bfloat16 and back that `_parts` is made of.


@torch.library.custom_op("fathom::fp32_matmul", mutates_args=())
def _product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    parts_NPO = _multiply(x_NI, torch.cat(_parts(weight_OI, 3)).t()).unflatten(1, (3, -1))
    return parts_NPO.sum(1)


@_product.register_fake
def _(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0], dtype=torch.float32)


@torch.library.custom_op("fathom::fp32_matmul_dgrad", mutates_args=())
def _input_gradient(dy_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """dy·W in bfloat16: two parts of either are more than its digits, and the product of both second ones is less."""
    dy, w = _parts(dy_NO, 2), _parts(weight_OI, 2)
    return torch.cat((dy[0], dy[0], dy[1]), 1) @ torch.cat((w[0], w[1], w[0]))


@_input_gradient.register_fake
def _(dy_NO: Tensor, weight_OI: Tensor) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[0], weight_OI.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("fathom::fp32_matmul_wgrad", mutates_args=())
def _weight_gradient(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    parts_POI = _multiply(torch.cat(_parts(dy_NO, 3), 1).t(), x_NI).unflatten(0, (3, -1))
    return parts_POI.sum(0)


@_weight_gradient.register_fake
def _(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    return dy_NO.new_empty(dy_NO.shape[1], x_NI.shape[1])


def _parts(wide: Tensor, count: int) -> list[Tensor]:
    """The bfloat16 numbers whose sum comes nearest to `wide`, largest first; three have all of its 24 digits."""
    parts = []
    for _ in range(count):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1]
    return parts


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a·b of bfloat16 matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
