"""Backward through the routed experts' activation in one pass; the reference is in fathom/ops/moe/experts.py.

Shapes: R rows, F expert width, G = 2F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 4


def weighted_swiglu_backward(gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `weighted_swiglu_backward_reference`; all contiguous."""
    rows, width = dscaled_RF.shape
    dgate_up_RG, scaled_RF = torch.empty_like(gate_up_RG), torch.empty_like(dscaled_RF)
    dweight_R = torch.empty(rows, dtype=torch.float32, device=weight_R.device)
    if rows:
        tensors = (gate_up_RG, weight_R, dscaled_RF, dgate_up_RG, scaled_RF, dweight_R)
        _kernel[(rows,)](*tensors, width, BLOCK=min(_BLOCK, triton.next_power_of_2(width)), num_warps=_WARPS)
    return dgate_up_RG, scaled_RF, dweight_R


@triton.jit
def _kernel(gate_up, weight, dscaled, dgate_up, scaled, dweight, width, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row).to(tl.float32)
    sum_F = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        f_F = start + tl.arange(0, BLOCK)
        ok_F = f_F < width
        to_gate, to_hidden = row * 2 * width + f_F, row * width + f_F
        gate_F = tl.load(gate_up + to_gate, mask=ok_F, other=0.0).to(tl.float32)
        up_F = tl.load(gate_up + to_gate + width, mask=ok_F, other=0.0).to(tl.float32)
        dscaled_F = tl.load(dscaled + to_hidden, mask=ok_F, other=0.0).to(tl.float32)
        sigmoid_F = tl.sigmoid(gate_F)
        silu_F = gate_F * sigmoid_F
        dhidden_F = dscaled_F * w
        sum_F += dscaled_F * silu_F * up_F
        dgate_F = dhidden_F * up_F * (sigmoid_F + silu_F * (1 - sigmoid_F))
        tl.store(dgate_up + to_gate, dgate_F.to(dgate_up.dtype.element_ty), mask=ok_F)
        tl.store(dgate_up + to_gate + width, (dhidden_F * silu_F).to(dgate_up.dtype.element_ty), mask=ok_F)
        tl.store(scaled + to_hidden, (silu_F * up_F * w).to(scaled.dtype.element_ty), mask=ok_F)
    tl.store(dweight + row, tl.sum(sum_F, 0))
