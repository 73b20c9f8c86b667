"""Dispatch and combine: (token, expert) pairs sorted by expert, and each token's results added up.

Sorted, each expert's tokens are neighbours, so that one grouped matmul serves all experts: the cost follows the active
parameters, not the number of experts, and no token is ever dropped.

Shapes: N tokens, D hidden, E experts, K experts per token, P = N·K (token, expert) pairs, R rows: the pairs sorted by
expert, each expert's rows padded to a multiple where the matmuls are oneDNN's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    `dtype`: of the tokens, if known. Rows are not padded for a type whose matmuls are our own (gemm.h).
    """
    if gpu.usable(topk_ids_NK):
        from fathom.ops.moe import triton_permute  # Triton comes with torch's CUDA builds alone

        return Dispatch(*triton_permute.dispatch(topk_ids_NK, experts))
    pairs = topk_ids_NK.numel()
    ids_P = topk_ids_NK.flatten()
    ids_P, pair_P = ids_P.masked_fill(ids_P < 0, experts).sort(stable=True)  # those that are none come last
    every_E = torch.arange(experts, device=ids_P.device)
    begin_E, end_E = torch.searchsorted(ids_P, every_E), torch.searchsorted(ids_P, every_E, right=True)
    tokens_per_expert_E = end_E - begin_E
    own = dtype is not None and cpu.has_bf16_gemm(dtype)
    pads = ids_P.device.type == "cpu" and pairs >= 2 * _LEAST_MULTIPLE * experts and not own
    rows_E = padded_loads(tokens_per_expert_E) if pads else tokens_per_expert_E
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


def padded_loads(tokens_per_expert_E: Tensor) -> Tensor:
    """Loads rounded up to one of sixteen steps between a power of two and the next, or to a multiple of sixteen.

    oneDNN prepares a kernel per matrix height, at about a millisecond each, and keeps a thousand: as loads differ at
    every step, unpadded training on the CPU spends longer preparing matmuls than running them (docs/log/training.md).
    """
    power_E = tokens_per_expert_E.clamp_min(1).double().log2().floor()
    multiple_E = (2**power_E / _LEAST_MULTIPLE).clamp_min(_LEAST_MULTIPLE).to(torch.int64)
    return (tokens_per_expert_E + multiple_E - 1) // multiple_E * multiple_E


def combine(y_RD: Tensor, inverse_indices_NK: Tensor) -> Tensor:
    """Each token's K rows added up, but those whose index is −1: (N, D), and nothing of size (N, K, D) in between."""
    if torch.compiler.is_compiling():  # becomes one kernel
        y_NKD = y_RD[inverse_indices_NK.clamp_min(0)]
        return y_NKD.masked_fill((inverse_indices_NK < 0).unsqueeze(2), 0).sum(1)
    if gpu.usable(y_RD, inverse_indices_NK):
        from fathom.ops.moe import triton_permute  # Triton comes with torch's CUDA builds alone

        return triton_permute.combine(y_RD, inverse_indices_NK)
    if not cpu.usable(y_RD, inverse_indices_NK):
        padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
        return F.embedding_bag(inverse_indices_NK.where(inverse_indices_NK >= 0, len(y_RD)), padded_RD, mode="sum")
    out_ND = y_RD.new_empty(inverse_indices_NK.shape[0], y_RD.shape[1])
    cpu.call("combine", y_RD.dtype, y_RD, inverse_indices_NK, out_ND, *inverse_indices_NK.shape, y_RD.shape[1])
    return out_ND
