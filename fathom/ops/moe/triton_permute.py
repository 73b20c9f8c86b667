"""Dispatch and combine on a GPU without gradients: sorting the pairs by expert, gathering rows and adding them up.

Plain torch sorts in some twenty launches. The references are in fathom/ops/moe/permute.py.

Shapes: N tokens, D hidden, E experts, K experts per token, P = N·K pairs, R rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops import gpu

_PAIRS, _PAIR_WARPS = 4096, 16


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
    grid, block = gpu.row_grid(x_RD)
    _gather[grid](x_ND, sort_indices_R, x_RD, x_ND.stride(0), choices, x_RD.shape[1], BLOCK_D=block)
    return x_RD


def combine(y_RD: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Each token's K rows, but those whose index is −1, added up in float32, in their order: (N, D)."""
    y_RD, inverse_indices_NK = y_RD.contiguous(), inverse_indices_NK.contiguous()
    out_ND = y_RD.new_empty(inverse_indices_NK.shape[0], y_RD.shape[1])
    choices, (grid, block) = inverse_indices_NK.shape[1], gpu.row_grid(out_ND)
    _combine[grid](y_RD, inverse_indices_NK, out_ND, out_ND.shape[1], CHOICES=choices, BLOCK_D=block)
    return out_ND


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
def _combine(y, row, out, hidden, CHOICES: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(CHOICES):
        at = tl.load(row + n * CHOICES + k)
        sum_D += tl.load(y + at * hidden + d_D, mask=(d_D < hidden) & (at >= 0), other=0.0).to(tl.float32)
    tl.store(out + n * hidden + d_D, sum_D.to(out.dtype.element_ty), mask=d_D < hidden)
