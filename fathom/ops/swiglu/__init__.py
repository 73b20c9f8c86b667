"""SwiGLU's activation, silu(gate)·up (arXiv 2002.05202).

Shapes: R rows, F width, G = 2F.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu
from fathom.ops.swiglu.reference import swiglu_reference, weighted_swiglu_backward_reference

__all__ = ["swiglu", "swiglu_reference", "weighted_swiglu_backward", "weighted_swiglu_backward_reference"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up; on the CPU in one pass forward and one backward, on a GPU in one kernel without gradients."""
    if gpu.usable(gate, up):
        from fathom.ops.swiglu import triton  # Triton comes with torch's CUDA builds alone

        return triton.swiglu(gate, up)
    if not cpu.usable(gate, up):
        return swiglu_reference(gate, up)
    hidden: Tensor = _SwiGLU.apply(gate, up)
    return hidden


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        hidden, width = torch.empty_like(gate), gate.shape[-1]
        cpu.call("swiglu", gate.dtype, gate, up, hidden, gate.numel() // width, width)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        arguments = (gate, up, dhidden.contiguous(), dgate, dup, gate.numel() // width, width)
        cpu.call("swiglu_backward", gate.dtype, *arguments)
        return dgate, dup


def weighted_swiglu_backward(gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; in one kernel on a GPU."""
    if gate_up_RG.is_cuda and gpu.TRITON_INSTALLED:
        return _weighted_swiglu_backward_on_gpu(gate_up_RG, weight_R, dscaled_RF)
    return weighted_swiglu_backward_reference(gate_up_RG, weight_R, dscaled_RF)


# A custom operator, so that torch.compile does not look inside: it would make three passes of it.
@torch.library.custom_op("fathom::weighted_swiglu_backward", mutates_args=())
def _weighted_swiglu_backward_on_gpu(
    gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if dscaled_RF.dtype == torch.float64:  # the kernel sums in float32
        return weighted_swiglu_backward_reference(gate_up_RG, weight_R, dscaled_RF)
    from fathom.ops.swiglu.triton import weighted_swiglu_backward  # Triton comes with torch's CUDA builds alone

    return weighted_swiglu_backward(gate_up_RG, weight_R, dscaled_RF)


@_weighted_swiglu_backward_on_gpu.register_fake
def _(gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dscaled_RF.dtype, torch.float32)
    return torch.empty_like(gate_up_RG), torch.empty_like(dscaled_RF), weight_R.new_empty(len(weight_R), dtype=wide)
