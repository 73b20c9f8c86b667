"""SwiGLU's activation, silu(gate)·up (arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up; on the CPU in one pass forward and one backward, on a GPU in one where nobody trains."""
    if gpu.usable(gate, up):
        from fathom.ops.moe import triton_permute as rows  # Triton comes with torch's CUDA builds alone

        return rows.swiglu(gate, up)
    if not cpu.usable(gate, up):
        return F.silu(gate) * up
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
