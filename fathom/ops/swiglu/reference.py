"""SwiGLU's activation in plain torch (arXiv 2002.05202).

Shapes: R rows, F width, G = 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, in the tensors' own type."""
    return F.silu(gate) * up


def weighted_swiglu_backward_reference(
    gate_up_RG: Tensor, weight_R: Tensor, dscaled_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through scaled = silu(gate)·up·weight: gradients of gate over up (R, G), scaled itself (R, F), and the
    weights' gradients (R) in float32 at least."""
    gate_RF, up_RF = halves(gate_up_RG)
    weight_R1 = weight_R[:, None]
    silu_RF = F.silu(gate_RF)
    hidden_RF = silu_RF * up_RF
    wide = torch.promote_types(dscaled_RF.dtype, torch.float32)
    dweight_R = (dscaled_RF * hidden_RF).sum(-1, dtype=wide)
    dhidden_RF = dscaled_RF * weight_R1
    dgate_RF = torch.ops.aten.silu_backward(dhidden_RF * up_RF, gate_RF)
    return torch.cat((dgate_RF, dhidden_RF * silu_RF), dim=-1), hidden_RF * weight_R1, dweight_R


def halves(gate_up_RG: Tensor) -> tuple[Tensor, Tensor]:
    """Gate, copied to be contiguous, and up: exponentials of strided bf16 rows cost more than the copy."""
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    return gate_RF.contiguous(), up_RF
