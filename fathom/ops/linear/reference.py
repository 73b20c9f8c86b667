"""Linear layers in plain torch: the definitions.

Shapes: N rows (all dimensions but the last), I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_reference(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x·Wᵀ over the last dimension, in x's type: (…, I) → (…, O)."""
    return F.linear(x, weight_OI.to(x.dtype))


def fp32_linear_reference(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x·Wᵀ in float32 at least: (N, O)."""
    x_NI = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32))
    return F.linear(x_NI, weight_OI.to(x_NI.dtype))
