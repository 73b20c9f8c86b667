"""SwiGLU's activation, silu(gate)·up (arXiv 2002.05202), alone and with a weight per row for routed experts.

Shapes: R rows, F width, G = 2F.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.cpu import build


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up; on the CPU in one pass forward and one backward."""
    if not build.usable(gate, up):
        return F.silu(gate) * up
    hidden: Tensor = _SwiGLU.apply(gate, up)
    return hidden


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        hidden, width = torch.empty_like(gate), gate.shape[-1]
        build.call("swiglu", gate.dtype, gate, up, width, None, hidden, gate.numel() // width, width)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        arguments = (gate, up, width, None, dhidden.contiguous(), dgate, dup, width, None, None)
        build.call("swiglu_backward", gate.dtype, *arguments, gate.numel() // width, width)
        return dgate, dup


def weighted_swiglu(gate_up_RG: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate)·up·weight of rows that hold gate and up side by side, (R, F); not differentiable by itself."""
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    if not build.usable(gate_up_RG, weight_R):
        return F.silu(gate_RF) * up_RF * weight_R[:, None].to(gate_RF.dtype)
    hidden_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
    rows, width = gate_RF.shape
    build.call("swiglu", gate_RF.dtype, gate_RF, up_RF, 2 * width, weight_R, hidden_RF, rows, width)
    return hidden_RF


def weighted_swiglu_backward(gate_up_RG: Tensor, weight_R: Tensor, dhidden_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up (R, G) and of the weight (R), and the weighted hidden rows (R, F) once more."""
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    if not build.usable(gate_up_RG, weight_R):
        return _weighted_swiglu_backward(gate_RF, up_RF, weight_R, dhidden_RF)
    rows, width = gate_RF.shape
    dgate_up_RG, hidden_RF, dweight_R = (
        torch.empty_like(gate_up_RG),
        torch.empty_like(dhidden_RF),
        torch.empty_like(weight_R),
    )
    dgate_RF, dup_RF = dgate_up_RG.chunk(2, dim=-1)
    arguments = (gate_RF, up_RF, 2 * width, weight_R, dhidden_RF, dgate_RF, dup_RF, 2 * width, hidden_RF, dweight_R)
    build.call("swiglu_backward", gate_RF.dtype, *arguments, rows, width)
    return dgate_up_RG, dweight_R, hidden_RF


def _weighted_swiglu_backward(
    gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor, dhidden_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gate_RF = gate_RF.contiguous()  # exponentials of strided bf16 rows cost more than the copy
    weight_R1 = weight_R[:, None].to(gate_RF.dtype)
    silu_RF = F.silu(gate_RF)
    product_RF = silu_RF * up_RF
    dweight_R = (dhidden_RF * product_RF).sum(-1, dtype=weight_R.dtype)
    dscaled_RF = dhidden_RF * weight_R1
    dgate_RF = torch.ops.aten.silu_backward(dscaled_RF * up_RF, gate_RF)
    return torch.cat((dgate_RF, dscaled_RF * silu_RF), dim=-1), dweight_R, product_RF * weight_R1
