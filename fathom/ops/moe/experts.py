"""Routed experts: every token's K SwiGLU experts, as products grouped by expert (DeepSeekMoE, arXiv 2401.06066).

The (token, expert) pairs are sorted by expert into rows, so that each expert's tokens are neighbours and one
grouped product serves all experts: the cost follows the active work, not the number of experts, and no token is ever
dropped. The gate's weight multiplies the hidden activation (F numbers) rather than the output (D numbers): the down
projection is linear, so it is the same sum.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, P = N·K (token, expert) pairs,
R rows: the pairs sorted by expert, each expert's rows padded to a multiple where oneDNN multiplies them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fathom.ops import cpu, gpu

_LEAST_MULTIPLE = 16


class Dispatch(NamedTuple):
    """Where each (token, expert) pair stands once the pairs are sorted by expert."""

    sort_indices_R: Tensor
    """Row r holds pair sort_indices_R[r] of the flattened (N, K) choices, so token sort_indices_R[r] // K; −1 for a row
    without a pair: padding, and what is left after the last expert's rows."""
    inverse_indices_NK: Tensor
    """The inverse: the row of token n's k-th choice; −1 where that choice is none."""
    ends_E: Tensor
    """Row after expert e's last one, int32 as the grouped matmul takes it."""
    tokens_per_expert_E: Tensor
    """Tokens each expert received, int64."""


def dispatch(topk_ids_NK: Tensor, experts: int, dtype: torch.dtype | None = None) -> Dispatch:
    """Sort the pairs by expert; stable, so equal inputs give equal sums. On a GPU in one kernel.

    An id of −1 is a choice that is not computed here (with expert parallelism: another rank's expert). It stands in no
    expert's rows, is in no load, and adds nothing to the token's sum, nor to any gradient.
    `dtype`: of the tokens, where it is known. Rows of a type that the kernels multiply themselves are not padded.
    """
    if gpu.usable(topk_ids_NK):
        from fathom.ops.moe import triton_permute as rows  # Triton comes with torch's CUDA builds alone

        return Dispatch(*rows.dispatch(topk_ids_NK, experts))
    pairs = topk_ids_NK.numel()
    ids_P = topk_ids_NK.flatten()
    ids_P, pair_P = ids_P.masked_fill(ids_P < 0, experts).sort(stable=True)  # those that are none come last
    every_E = torch.arange(experts, device=ids_P.device)
    begin_E, end_E = torch.searchsorted(ids_P, every_E), torch.searchsorted(ids_P, every_E, right=True)
    tokens_per_expert_E = end_E - begin_E
    own = dtype is not None and cpu.has_bf16_gemm(dtype)
    pads = ids_P.device.type == "cpu" and pairs >= 2 * _LEAST_MULTIPLE * experts and not own
    rows_E = _padded(tokens_per_expert_E) if pads else tokens_per_expert_E
    spare = experts * _LEAST_MULTIPLE + pairs // _LEAST_MULTIPLE if pads else 0
    ends_E = rows_E.cumsum(0)
    row_P, none_P = torch.arange(pairs, device=ids_P.device), ids_P == experts
    sort_indices_R = pair_P.masked_fill(none_P, -1)
    if pads:
        row_P = row_P + torch.cat((ends_E - rows_E - begin_E, ends_E[-1:] - end_E[-1:]))[ids_P]
        sort_indices_R = pair_P.new_full((pairs + spare,), -1)
        sort_indices_R[row_P] = pair_P.masked_fill(none_P, -1)
    row_P = row_P.masked_fill(none_P, -1)
    inverse_indices_NK = torch.empty_like(pair_P)
    inverse_indices_NK[pair_P] = row_P
    return Dispatch(
        sort_indices_R, inverse_indices_NK.view_as(topk_ids_NK), ends_E.to(torch.int32), tokens_per_expert_E
    )


def _padded(tokens_per_expert_E: Tensor) -> Tensor:
    """Loads rounded up to one of sixteen steps between a power of two and the next, or to a multiple of sixteen.

    oneDNN prepares a kernel per matrix height, at about a millisecond each, and keeps a thousand: as loads differ at
    every step, unpadded training on the CPU spends longer preparing products than multiplying (docs/log/training.md).
    """
    power_E = tokens_per_expert_E.clamp_min(1).double().log2().floor()
    multiple_E = (2**power_E / _LEAST_MULTIPLE).clamp_min(_LEAST_MULTIPLE).to(torch.int64)
    return (tokens_per_expert_E + multiple_E - 1) // multiple_E * multiple_E


def routed_experts_reference(
    x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Σ_k weight_k · down_e(silu(gate_e(x)) · up_e(x)) with e = the token's k-th expert, one expert at a time.

    `gate_up_EGD` stacks gate over up (G = 2F). An id of −1 adds nothing. Returns (N, D) in x's type.
    """
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EGD.shape[0]):
        token, choice = (topk_ids_NK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_ND[token], gate_up_EGD[expert]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights_NK[token, choice, None].to(x_ND.dtype)
        out_ND = out_ND.index_add(0, token, F.linear(hidden, down_EDF[expert]))
    return out_ND


def routed_experts(x_ND: Tensor, order: Dispatch, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """As the reference; the experts' weights may be kept in float32 under narrower activations.

    On the CPU each thread takes a whole expert at a time (fathom/ops/moe/experts.cpp). Elsewhere, and where there are
    fewer experts than threads, four grouped products forward and backward; where torch's grouped product does not
    apply — float64, or widths whose rows are not multiples of 16 bytes — one product per expert on the same rows.
    """
    arguments = (x_ND, order.sort_indices_R, order.inverse_indices_NK, order.ends_E, weights_NK, gate_up_EGD, down_EDF)
    if _kernels_take(*arguments):
        out_ND: Tensor = _ExpertByExpert.apply(*arguments)
        return out_ND
    if _grouped_mm_takes(x_ND, gate_up_EGD, down_EDF) and gpu.usable(*arguments):
        return _on_gpu(x_ND, order, weights_NK, gate_up_EGD, down_EDF)
    out_ND = _RoutedExperts.apply(*arguments[:-2], gate_up_EGD.to(x_ND.dtype), down_EDF.to(x_ND.dtype))
    return out_ND


def _kernels_take(x_ND: Tensor, *others: Tensor) -> bool:
    *_, weights_NK, gate_up_EGD, down_EDF = others
    known = all(t.dtype in (torch.float32, x_ND.dtype) and t.is_contiguous() for t in (gate_up_EGD, down_EDF))
    return (
        cpu.usable(x_ND, *others)
        and known
        and weights_NK.dtype == torch.float32
        and gate_up_EGD.shape[0] >= torch.get_num_threads()
    )


class _ExpertByExpert(torch.autograd.Function):
    """The CPU's. Saves the tokens and the experts' pre-activations; everything else is remade backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        sort_indices_R: Tensor,
        inverse_indices_NK: Tensor,
        ends_E: Tensor,
        weights_NK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        experts, hidden, width = down_EDF.shape
        gate_up_RG = x_ND.new_empty(len(sort_indices_R), 2 * width)
        y_RD = x_ND.new_empty(len(sort_indices_R), hidden)
        inputs = (x_ND, token_R, weight_R, ends_E, gate_up_EGD, down_EDF)
        sizes = (experts, hidden, width, int(down_EDF.dtype == torch.float32))
        cpu.call("routed_experts", x_ND.dtype, *inputs, gate_up_RG, y_RD, *sizes)
        ctx.save_for_backward(
            x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF, gate_up_RG
        )
        return combine(y_RD, inverse_indices_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF, gate_up_RG = (
            ctx.saved_tensors
        )
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        inputs = (x_ND, token_R, weight_R, ends_E, gate_up_EGD, down_EDF, gate_up_RG, dout_ND.contiguous())
        dx_RD, dweight_R = x_ND.new_empty(len(sort_indices_R), x_ND.shape[1]), torch.empty_like(weight_R)
        dgate_up_EGD, ddown_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        sizes = (*down_EDF.shape, int(down_EDF.dtype == torch.float32))
        outputs = (dx_RD, dweight_R, dgate_up_EGD, ddown_EDF)
        cpu.call("routed_experts_backward", x_ND.dtype, *inputs, *outputs, *sizes)
        dweights_NK = _of_pairs(dweight_R, inverse_indices_NK)
        return combine(dx_RD, inverse_indices_NK), None, None, None, dweights_NK, dgate_up_EGD, ddown_EDF


def _on_gpu(x_ND: Tensor, order: Dispatch, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Without gradients: two grouped products and three kernels of our own."""
    from fathom.ops.moe import triton_permute as rows  # Triton comes with torch's CUDA builds alone

    x_RD = rows.gather(x_ND, order.sort_indices_R, weights_NK.shape[1])
    gate_up_RG = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=order.ends_E)
    hidden_RF = rows.weighted_swiglu(gate_up_RG, order.sort_indices_R, weights_NK)
    y_RD = F.grouped_mm(hidden_RF, down_EDF.transpose(1, 2), offs=order.ends_E)
    return rows.combine(y_RD, order.inverse_indices_NK)


class _RoutedExperts(torch.autograd.Function):
    """Saves only the tokens and the experts' pre-activations; the sorted rows and activations are remade backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        sort_indices_R: Tensor,
        inverse_indices_NK: Tensor,
        ends_E: Tensor,
        weights_NK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        gate_up_RG = grouped_matmul(
            _gather_rows(x_ND, token_R, inverse_indices_NK), gate_up_EGD.transpose(1, 2), ends_E
        )
        gate_RF, up_RF = _halves(gate_up_RG)
        hidden_RF = F.silu(gate_RF) * up_RF * weight_R[:, None].to(x_ND.dtype)
        y_RD = grouped_matmul(hidden_RF, down_EDF.transpose(1, 2), ends_E)
        ctx.save_for_backward(
            x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF, gate_up_RG
        )
        return combine(y_RD, inverse_indices_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, sort_indices_R, inverse_indices_NK, ends_E, weights_NK, gate_up_EGD, down_EDF, gate_up_RG = (
            ctx.saved_tensors
        )
        token_R, weight_R = _tokens_and_weights(sort_indices_R, weights_NK)
        dy_RD = _gather_rows(grads[0], token_R, inverse_indices_NK)
        dscaled_RF = grouped_matmul(dy_RD, down_EDF, ends_E)
        backward = _weighted_swiglu_backward if x_ND.is_cuda and gpu.INSTALLED else weighted_swiglu_backward_reference
        dgate_up_RG, scaled_RF, dweight_R = backward(gate_up_RG, weight_R.to(x_ND.dtype), dscaled_RF)
        ddown_EDF = grouped_wgrad(dy_RD, scaled_RF, ends_E)
        dgate_up_EGD = grouped_wgrad(dgate_up_RG, _gather_rows(x_ND, token_R, inverse_indices_NK), ends_E)
        dx_ND = combine(grouped_matmul(dgate_up_RG, gate_up_EGD, ends_E), inverse_indices_NK)
        dweights_NK = _of_pairs(dweight_R, inverse_indices_NK).to(weights_NK.dtype)
        return dx_ND, None, None, None, dweights_NK, dgate_up_EGD, ddown_EDF


def _tokens_and_weights(sort_indices_R: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row, −1 where there is none, and its weight (any value where there is none)."""
    return sort_indices_R // weights_NK.shape[1], weights_NK.flatten().index_select(0, sort_indices_R.clamp_min(0))


def _of_pairs(value_R: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """The value in each pair's row, (N, K); 0 for a choice that is none."""
    value_NK = value_R.index_select(0, inverse_indices_NK.flatten().clamp_min(0)).view_as(inverse_indices_NK)
    return value_NK.masked_fill(inverse_indices_NK < 0, 0)


def _gather_rows(x_ND: Tensor, token_R: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Row r is token token_R[r], or zeros for padding: (R, D). After the last expert's rows anything may stand."""
    if len(token_R) == inverse_indices_NK.numel():  # at most a row for every pair, so none is padding
        return x_ND.index_select(0, token_R.clamp_min(0))
    padded_ND = torch.cat((x_ND, x_ND.new_zeros(1, x_ND.shape[1])))
    return padded_ND.index_select(0, torch.where(token_R < 0, x_ND.shape[0], token_R))


def _halves(gate_up_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Gate, copied to be contiguous, and up: exponentials of strided bf16 rows cost more than the copy."""
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    return gate_RF.contiguous(), up_RF


def weighted_swiglu_backward_reference(
    gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through scaled = silu(gate)·up·weight: gradients of gate over up (R, G), scaled itself (R, F), and the
    weights' gradients (R) in float32 at least."""
    gate_RF, up_RF = _halves(gate_up_RG)
    weight_R1 = weight_R[:, None]
    silu_RF = F.silu(gate_RF)
    hidden_RF = silu_RF * up_RF
    wide = torch.promote_types(dscaled_RF.dtype, torch.float32)
    dweight_R = (dscaled_RF * hidden_RF).sum(-1, dtype=wide)
    dhidden_RF = dscaled_RF * weight_R1
    dgate_RF = torch.ops.aten.silu_backward(dhidden_RF * up_RF, gate_RF)
    return torch.cat((dgate_RF, dhidden_RF * silu_RF), dim=-1), hidden_RF * weight_R1, dweight_R


# An operator of its own, so that torch.compile takes it whole: it would make three passes of it.
@torch.library.custom_op("fathom::weighted_swiglu_backward", mutates_args=())
def _weighted_swiglu_backward(
    gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if dscaled_RF.dtype == torch.float64:  # sums beyond float32 are not the kernel's
        return weighted_swiglu_backward_reference(gate_up_RG, weight_R, dscaled_RF)
    from fathom.ops.swiglu.triton import weighted_swiglu_backward  # Triton comes with torch's CUDA builds alone

    return weighted_swiglu_backward(gate_up_RG, weight_R, dscaled_RF)


@_weighted_swiglu_backward.register_fake
def _(gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dscaled_RF.dtype, torch.float32)
    return torch.empty_like(gate_up_RG), torch.empty_like(dscaled_RF), weight_R.new_empty(len(weight_R), dtype=wide)


def combine(y_RD: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Each token's K rows added up, but those whose index is −1: (N, D), and nothing of size (N, K, D) in between."""
    if torch.compiler.is_compiling():  # becomes one kernel
        y_NKD = y_RD[inverse_indices_NK.clamp_min(0)]
        return y_NKD.masked_fill((inverse_indices_NK < 0).unsqueeze(2), 0).sum(1)
    if gpu.usable(y_RD, inverse_indices_NK):
        from fathom.ops.moe import triton_permute as rows  # Triton comes with torch's CUDA builds alone

        return rows.combine(y_RD, inverse_indices_NK)
    if not cpu.usable(y_RD, inverse_indices_NK):
        padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
        return F.embedding_bag(inverse_indices_NK.where(inverse_indices_NK >= 0, len(y_RD)), padded_RD, mode="sum")
    out_ND = y_RD.new_empty(inverse_indices_NK.shape[0], y_RD.shape[1])
    cpu.call("combine", y_RD.dtype, y_RD, inverse_indices_NK, out_ND, *inverse_indices_NK.shape, y_RD.shape[1])
    return out_ND


# The two products are operators of their own, so that torch.compile takes them whole: its model of grouped_mm knows
# bf16 alone (torch 2.13), and it could not trace the loop that stands in for it.


@torch.library.custom_op("fathom::grouped_matmul", mutates_args=())
def grouped_matmul(x_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e times w_e: (R, O); rows after the last expert's are not computed."""
    if _grouped_mm_takes(x_RI, w_EIO):
        return F.grouped_mm(x_RI, w_EIO, offs=ends_E)
    out_RO = x_RI.new_empty(x_RI.shape[0], w_EIO.shape[2])
    for expert, rows in enumerate(_expert_rows(ends_E)):
        out_RO[rows] = x_RI[rows] @ w_EIO[expert]
    return out_RO


@grouped_matmul.register_fake
def _(x_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], w_EIO.shape[2])


@torch.library.custom_op("fathom::grouped_wgrad", mutates_args=())
def grouped_wgrad(a_RI: Tensor, b_RO: Tensor, ends_E: Tensor) -> Tensor:
    """aᵀ·b over each expert's rows: (E, I, O), zero for an expert without rows."""
    if _grouped_mm_takes(a_RI, b_RO):
        return F.grouped_mm(a_RI.t(), b_RO, offs=ends_E)
    return torch.stack([a_RI[rows].t() @ b_RO[rows] for rows in _expert_rows(ends_E)])


@grouped_wgrad.register_fake
def _(a_RI: Tensor, b_RO: Tensor, ends_E: Tensor) -> Tensor:
    return a_RI.new_empty(ends_E.shape[0], a_RI.shape[1], b_RO.shape[1])


@register_flop_formula([torch.ops.fathom.grouped_matmul, torch.ops.fathom.grouped_wgrad])
def _flops(left: torch.Size, right: torch.Size, ends: torch.Size, **_: object) -> int:
    """For torch's FLOP counter: either way every row meets the other operand's last dimension (padding included)."""
    return 2 * left[0] * left[1] * right[-1]


def _expert_rows(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _grouped_mm_takes(*operands: Tensor) -> bool:
    """torch's grouped product wants one type, bf16, float16 or float32, and rows that are multiples of 16 bytes."""
    wide = all(size * t.element_size() % 16 == 0 for t in operands for size in t.shape[1:])
    one = len({t.dtype for t in operands}) == 1 and operands[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
    return wide and one and operands[0].shape[0] > 0
