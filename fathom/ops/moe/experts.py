"""Routed experts: every token's K SwiGLU experts, as matmuls grouped by expert (DeepSeekMoE, arXiv 2401.06066).

The gate's weight multiplies the hidden activation (F elements) rather than the output (D elements): the down projection
is linear, so it is the same sum.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, G = 2F, R rows: (token, expert) pairs sorted
by expert (fathom/ops/moe/permute.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu
from fathom.ops.moe.grouped import grouped_matmul, grouped_mm_takes, grouped_wgrad
from fathom.ops.moe.permute import Dispatch, combine
from fathom.ops.swiglu import weighted_swiglu_backward
from fathom.ops.swiglu.reference import halves


def routed_experts(x_ND: Tensor, order: Dispatch, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """As the reference; the experts' weights may be kept in float32 under narrower activations.

    On the CPU each thread takes a whole expert at a time (experts.cpp). Elsewhere, and with fewer experts than threads,
    grouped matmuls forward and backward; where torch's `grouped_mm` does not apply (float64, or widths whose rows are
    not multiples of 16 bytes), one matmul per expert on the same rows.
    """
    arguments = (x_ND, order.sort_indices_R, order.inverse_indices_NK, order.ends_E, weights_NK, gate_up_EGD, down_EDF)
    if _kernels_take(*arguments):
        out_ND: Tensor = _ExpertByExpert.apply(*arguments)
        return out_ND
    if grouped_mm_takes(x_ND, gate_up_EGD, down_EDF) and gpu.usable(*arguments):
        return _on_gpu(x_ND, order, weights_NK, gate_up_EGD, down_EDF)
    out_ND = _RoutedExperts.apply(*arguments[:-2], gate_up_EGD.to(x_ND.dtype), down_EDF.to(x_ND.dtype))
    return out_ND


def _kernels_take(x_ND: Tensor, *others: Tensor) -> bool:
    *_, weights_NK, gate_up_EGD, down_EDF = others
    matching = all(t.dtype in (torch.float32, x_ND.dtype) and t.is_contiguous() for t in (gate_up_EGD, down_EDF))
    return (
        cpu.usable(x_ND, *others)
        and matching
        and weights_NK.dtype == torch.float32
        and gate_up_EGD.shape[0] >= torch.get_num_threads()
    )


class _ExpertByExpert(torch.autograd.Function):
    """experts.cpp. Saves the tokens and the experts' pre-activations; the backward pass recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF = inputs
        x_ND = x_ND.contiguous()
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        experts, hidden, width = down_EDF.shape
        gate_up_RG = x_ND.new_empty(len(sort_indices_R), 2 * width)
        y_RD = x_ND.new_empty(len(sort_indices_R), hidden)
        tensors = (x_ND, token_R, weight_R, ends_E, gate_up_EGD, down_EDF, gate_up_RG, y_RD)
        sizes = (experts, hidden, width, int(down_EDF.dtype == torch.float32))
        cpu.call("routed_experts", x_ND.dtype, *tensors, *sizes)
        ctx.save_for_backward(x_ND, *inputs[1:], gate_up_RG)
        return combine(y_RD, inverse_indices_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, gate_up_RG = ctx.saved_tensors
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF = inputs
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        tensors = (x_ND, token_R, weight_R, ends_E, gate_up_EGD, down_EDF, gate_up_RG, dout_ND.contiguous())
        dx_RD, dweight_R = x_ND.new_empty(len(sort_indices_R), x_ND.shape[1]), torch.empty_like(weight_R)
        gate_up_needs_grad, down_needs_grad = ctx.needs_input_grad[5:]
        dgate_up_EGD = torch.empty_like(gate_up_EGD) if gate_up_needs_grad else None
        ddown_EDF = torch.empty_like(down_EDF) if down_needs_grad else None
        sizes = (*down_EDF.shape, int(down_EDF.dtype == torch.float32))
        outputs = (dx_RD, dweight_R, dgate_up_EGD, ddown_EDF)
        cpu.call("routed_experts_backward", x_ND.dtype, *tensors, *outputs, *sizes)
        dweights_NK = values_of_pairs(dweight_R, inverse_indices_NK)
        return combine(dx_RD, inverse_indices_NK), None, None, None, dweights_NK, dgate_up_EGD, ddown_EDF


def _on_gpu(x_ND: Tensor, order: Dispatch, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Without gradients: two grouped matmuls and three Triton kernels."""
    # Triton comes with torch's CUDA builds alone.
    from fathom.ops.moe.triton_permute import gather
    from fathom.ops.swiglu.triton import weighted_swiglu

    x_RD = gather(x_ND, order.sort_indices_R, weights_NK.shape[1])
    gate_up_RG = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=order.ends_E)
    hidden_RF = weighted_swiglu(gate_up_RG, order.sort_indices_R, weights_NK)
    y_RD = F.grouped_mm(hidden_RF, down_EDF.transpose(1, 2), offs=order.ends_E)
    return combine(y_RD, order.inverse_indices_NK)


class _RoutedExperts(torch.autograd.Function):
    """Saves the tokens and the experts' pre-activations; the backward pass recomputes sorted rows and activations."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF = inputs
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        gate_up_RG = grouped_matmul(_gather_rows(x_ND, token_R, inverse_indices_NK), gate_up_EGD.mT, ends_E)
        gate_RF, up_RF = halves(gate_up_RG)
        hidden_RF = F.silu(gate_RF) * up_RF * weight_R[:, None].to(x_ND.dtype)
        y_RD = grouped_matmul(hidden_RF, down_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(*inputs, gate_up_RG)
        return combine(y_RD, inverse_indices_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gate_up_RG = ctx.saved_tensors
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF = inputs
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        dy_RD = _gather_rows(grads[0], token_R, inverse_indices_NK)
        dscaled_RF = grouped_matmul(dy_RD, down_EDF, ends_E)
        activation = (gate_up_RG, weight_R.to(x_ND.dtype), dscaled_RF)
        dgate_up_RG, scaled_RF, dweight_R = weighted_swiglu_backward(*activation)
        gate_up_needs_grad, down_needs_grad = ctx.needs_input_grad[5:]
        ddown_EDF = grouped_wgrad(dy_RD, scaled_RF, ends_E) if down_needs_grad else None
        dgate_up_EGD = None
        if gate_up_needs_grad:
            dgate_up_EGD = grouped_wgrad(dgate_up_RG, _gather_rows(x_ND, token_R, inverse_indices_NK), ends_E)
        dx_ND = combine(grouped_matmul(dgate_up_RG, gate_up_EGD, ends_E), inverse_indices_NK)
        dweights_NK = values_of_pairs(dweight_R, inverse_indices_NK).to(weights_NK.dtype)
        return dx_ND, None, None, None, dweights_NK, dgate_up_EGD, ddown_EDF


def _tokens_and_weights(sort_indices_R: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row, −1 where there is none, and its weight (any value where there is none)."""
    return sort_indices_R // weights_NK.shape[1], weights_NK.flatten().index_select(0, sort_indices_R.clamp_min(0))


def values_of_pairs(value_R: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """The value in each pair's row, (N, K); 0 for a choice that is none."""
    value_NK = value_R.index_select(0, inverse_indices_NK.flatten().clamp_min(0)).view_as(inverse_indices_NK)
    return value_NK.masked_fill(inverse_indices_NK < 0, 0)


def _gather_rows(x_ND: Tensor, token_R: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Row r is token token_R[r], or zeros for padding: (R, D). After the last expert's rows anything may stand."""
    if len(token_R) == inverse_indices_NK.numel():  # at most a row for every pair, so none is padding
        return x_ND.index_select(0, token_R.clamp_min(0))
    padded_ND = torch.cat((x_ND, x_ND.new_zeros(1, x_ND.shape[1])))
    return padded_ND.index_select(0, torch.where(token_R < 0, x_ND.shape[0], token_R))
