"""Matmuls grouped by expert, forward and backward.

Shapes: E experts, R rows sorted by expert, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Custom operators, so that torch.compile does not look inside: its model of grouped_mm covers bf16 alone (torch 2.13),
# and it could not trace the loop that replaces it.


@torch.library.custom_op("fathom::grouped_matmul", mutates_args=())
def grouped_matmul(x_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e times w_e: (R, O); rows after the last expert's are not computed."""
    if grouped_mm_takes(x_RI, w_EIO):
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
    if grouped_mm_takes(a_RI, b_RO):
        return F.grouped_mm(a_RI.t(), b_RO, offs=ends_E)
    return torch.stack([a_RI[rows].t() @ b_RO[rows] for rows in _expert_rows(ends_E)])


@grouped_wgrad.register_fake
def _(a_RI: Tensor, b_RO: Tensor, ends_E: Tensor) -> Tensor:
    return a_RI.new_empty(ends_E.shape[0], a_RI.shape[1], b_RO.shape[1])


@register_flop_formula([torch.ops.fathom.grouped_matmul, torch.ops.fathom.grouped_wgrad])
def _flops(left: torch.Size, right: torch.Size, ends: torch.Size, **_: object) -> int:
    """For torch's FLOP counter: either way every row, padding included, meets the other operand's last dimension."""
    return 2 * left[0] * left[1] * right[-1]


def _expert_rows(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_mm_takes(*operands: Tensor) -> bool:
    """torch's `grouped_mm` takes one type, bf16, float16 or float32, and rows that are multiples of 16 bytes."""
    wide = all(size * t.element_size() % 16 == 0 for t in operands for size in t.shape[1:])
    one = len({t.dtype for t in operands}) == 1 and operands[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
    return wide and one and operands[0].shape[0] > 0
