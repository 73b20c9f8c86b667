"""SwiGLU's activation on a GPU in one pass: plain, with the routed experts' weights, and backward through the latter.

The references are in fathom/ops/swiglu/reference.py.

Shapes: N tokens, K experts per token, R rows (pairs of a token and an expert), F expert width, G = 2F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops import gpu

_BLOCK, _WARPS = 2048, 4


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up of any shape; in float32 until the result is rounded."""
    gate, up, hidden = gate.contiguous(), up.contiguous(), torch.empty_like(gate)
    width = gate.shape[-1]
    _activate(gate, up, width, None, None, hidden.view(-1, width))
    return hidden


def weighted_swiglu(gate_up_RG: Tensor, sort_indices_R: Tensor, weights_NK: Tensor) -> Tensor:
    """silu(gate)·up·weight of each row's pair, anything for rows without a pair: (R, F)."""
    rows, both = gate_up_RG.shape
    hidden_RF = gate_up_RG.new_empty(rows, both // 2)
    _activate(gate_up_RG, gate_up_RG[:, both // 2 :], both, sort_indices_R, weights_NK.contiguous(), hidden_RF)
    return hidden_RF


def _activate(
    gate: Tensor, up: Tensor, stride: int, sort_indices_R: Tensor | None, weights_NK: Tensor | None, hidden_RF: Tensor
) -> None:
    tensors = (gate, up, sort_indices_R, weights_NK, hidden_RF)
    grid, block = gpu.row_grid(hidden_RF)
    _swiglu[grid](*tensors, stride, hidden_RF.shape[1], BLOCK_F=block)


def weighted_swiglu_backward(gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `weighted_swiglu_backward_reference`; all contiguous."""
    rows, width = dscaled_RF.shape
    dgate_up_RG, scaled_RF = torch.empty_like(gate_up_RG), torch.empty_like(dscaled_RF)
    dweight_R = torch.empty(rows, dtype=torch.float32, device=weight_R.device)
    if rows:
        tensors = (gate_up_RG, weight_R, dscaled_RF, dgate_up_RG, scaled_RF, dweight_R)
        _weighted_swiglu_backward[(rows,)](
            *tensors, width, BLOCK=min(_BLOCK, triton.next_power_of_2(width)), num_warps=_WARPS
        )
    return dgate_up_RG, scaled_RF, dweight_R


@triton.jit
def _swiglu(gate, up, pair, weights, out, stride, width, BLOCK_F: tl.constexpr):
    """`pair` and `weights` may be None."""
    r = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    ok_F = f_F < width
    gate_F = tl.load(gate + r * stride + f_F, mask=ok_F, other=0.0).to(tl.float32)
    up_F = tl.load(up + r * stride + f_F, mask=ok_F, other=0.0).to(tl.float32)
    hidden_F = gate_F * tl.sigmoid(gate_F) * up_F
    if weights is not None:
        hidden_F *= tl.load(weights + tl.maximum(tl.load(pair + r), 0)).to(tl.float32)
    tl.store(out + r * width + f_F, hidden_F.to(out.dtype.element_ty), mask=ok_F)


@triton.jit
def _weighted_swiglu_backward(gate_up, weight, dscaled, dgate_up, scaled, dweight, width, BLOCK: tl.constexpr):
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
