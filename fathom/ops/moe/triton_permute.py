"""The routed experts' rows: sorting the pairs by expert, and what is done to rows between the grouped products.

Plain torch sorts in some twenty launches and takes every elementwise operation for itself. The references are in
fathom/ops/moe/experts.py and fathom/ops/swiglu. No gradients.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, G = 2F, P = N·K pairs, R rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS, _PAIR_WARPS = 4096, 16
_COLUMNS = 1024


def dispatch(topk_ids_NK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Dispatch`'s four tensors (fathom/ops/moe/experts.py), without padding: a stable counting sort.

    A program for every expert reads all choices twice: to count those before its own, then to place its own. One more
    program takes the choices that are none (−1), as an expert after the last.
    """
    ids_P = topk_ids_NK.contiguous()
    sort_indices_R, inverse_indices_NK = torch.empty_like(ids_P).flatten(), torch.empty_like(ids_P)
    ends_E = torch.empty(experts, dtype=torch.int32, device=ids_P.device)
    tokens_per_expert_E = torch.empty(experts, dtype=torch.int64, device=ids_P.device)
    pairs = ids_P.numel()
    block = min(_PAIRS, max(128, triton.next_power_of_2(pairs)))
    _dispatch[(experts + 1,)](
        ids_P,
        sort_indices_R,
        inverse_indices_NK,
        ends_E,
        tokens_per_expert_E,
        pairs,
        BLOCK_P=block,
        num_warps=_PAIR_WARPS,
    )
    return sort_indices_R, inverse_indices_NK, ends_E, tokens_per_expert_E


def gather(x_ND: Tensor, sort_indices_R: Tensor, choices: int) -> Tensor:
    """Row r is the token of pair sort_indices_R[r], or any token for −1: (R, D)."""
    x_RD = x_ND.new_empty(len(sort_indices_R), x_ND.shape[1])
    _gather[_grid(x_RD)](x_ND, sort_indices_R, x_RD, x_ND.stride(0), choices, x_RD.shape[1], BLOCK_D=_columns(x_RD))
    return x_RD


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


def combine(y_RD: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Each token's K rows, but those whose index is −1, added up in float32, in their order: (N, D)."""
    y_RD, inverse_indices_NK = y_RD.contiguous(), inverse_indices_NK.contiguous()
    out_ND = y_RD.new_empty(inverse_indices_NK.shape[0], y_RD.shape[1])
    choices, block = inverse_indices_NK.shape[1], _columns(out_ND)
    _sum_rows[_grid(out_ND)](y_RD, inverse_indices_NK, out_ND, out_ND.shape[1], CHOICES=choices, BLOCK_D=block)
    return out_ND


def _activate(
    gate: Tensor, up: Tensor, stride: int, sort_indices_R: Tensor | None, weights_NK: Tensor | None, hidden_RF: Tensor
) -> None:
    tensors = (gate, up, sort_indices_R, weights_NK, hidden_RF)
    _swiglu[_grid(hidden_RF)](*tensors, stride, hidden_RF.shape[1], BLOCK_F=_columns(hidden_RF))


def _columns(out: Tensor) -> int:
    return min(_COLUMNS, triton.next_power_of_2(out.shape[1]))


def _grid(out: Tensor) -> tuple[int, int]:
    """A program for so many columns of one row."""
    return out.shape[0], triton.cdiv(out.shape[1], _columns(out))


@triton.jit
def _dispatch(ids, pair, row, ends, load, pairs, BLOCK_P: tl.constexpr):
    expert, experts = tl.program_id(0), tl.num_programs(0) - 1
    is_expert = expert < experts
    p_P = tl.arange(0, BLOCK_P)
    before_P, own_P = tl.zeros((BLOCK_P,), tl.int32), tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, pairs, BLOCK_P):
        id_P = tl.load(ids + start + p_P, mask=start + p_P < pairs, other=2147483647)
        id_P = tl.where(id_P < 0, experts, id_P)
        before_P += (id_P < expert).to(tl.int32)
        own_P += (id_P == expert).to(tl.int32)
    at, own = tl.sum(before_P, 0), tl.sum(own_P, 0)
    tl.store(ends + expert, at + own, mask=is_expert)
    tl.store(load + expert, own.to(tl.int64), mask=is_expert)
    for start in range(0, pairs, BLOCK_P):
        id_P = tl.load(ids + start + p_P, mask=start + p_P < pairs, other=2147483647)
        id_P = tl.where(id_P < 0, experts, id_P)
        own_P = (id_P == expert).to(tl.int32)
        to_P = at + tl.cumsum(own_P, 0) - 1
        tl.store(pair + to_P, tl.where(is_expert, start + p_P, -1).to(tl.int64), mask=own_P > 0)
        tl.store(row + start + p_P, tl.where(is_expert, to_P, -1).to(tl.int64), mask=own_P > 0)
        at += tl.sum(own_P, 0)


@triton.jit
def _gather(x, pair, out, x_n, choices, hidden, BLOCK_D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_D = tl.load(x + tl.maximum(tl.load(pair + r), 0) // choices * x_n + d_D, mask=d_D < hidden)
    tl.store(out + r * hidden + d_D, x_D, mask=d_D < hidden)


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
def _sum_rows(y, row, out, hidden, CHOICES: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(CHOICES):
        at = tl.load(row + n * CHOICES + k)
        sum_D += tl.load(y + at * hidden + d_D, mask=(d_D < hidden) & (at >= 0), other=0.0).to(tl.float32)
    tl.store(out + n * hidden + d_D, sum_D.to(out.dtype.element_ty), mask=d_D < hidden)
