"""RMSNorm in plain torch (arXiv 1910.07467).

Shapes: D size of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, in float32 at least; returns x's type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, weight_D.shape, weight_D.to(wide.dtype), eps).to(x.dtype)
