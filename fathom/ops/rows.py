"""Moving rows: out to the experts and back.

Shapes: N tokens, K experts per token, R rows, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops.cpu import build


def gather_rows(x_ND: Tensor, index_R: Tensor) -> Tensor:
    """Row r is x[index[r]], or zeros where index[r] is −1: (R, D). Not differentiable by itself."""
    if not build.usable(x_ND, index_R):
        zero_ND = torch.cat((x_ND, x_ND.new_zeros(1, x_ND.shape[1])))
        return zero_ND.index_select(0, torch.where(index_R < 0, x_ND.shape[0], index_R))
    out_RD = x_ND.new_empty(index_R.shape[0], x_ND.shape[1])
    build.call("gather_rows", x_ND.dtype, x_ND.contiguous(), index_R, out_RD, *out_RD.shape)
    return out_RD


def sum_rows(y_RD: Tensor, index_NK: Tensor) -> Tensor:
    """Σ_k y[index[n, k]]: (N, D). Nothing of size (N, K, D) is made in between; not differentiable by itself."""
    if not build.usable(y_RD, index_NK):
        return F.embedding_bag(index_NK, y_RD, mode="sum")
    out_ND = y_RD.new_empty(index_NK.shape[0], y_RD.shape[1])
    build.call("sum_rows", y_RD.dtype, y_RD, index_NK, out_ND, *index_NK.shape, y_RD.shape[1])
    return out_ND
