"""The three plain layers: linear, RMSNorm and SwiGLU.

Weights may have a wider type than the activations (float32 master weights under bf16 compute): every layer computes in
the type of its input, norms and the router in float32 at least.
"""

import torch
from torch import Tensor, nn

from fathom.ops.linear import linear
from fathom.ops.norm import rms_norm
from fathom.ops.swiglu import swiglu

LATENT_NORM_EPS = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm whatever rms_norm_eps says, as `transformers` reads checkpoints."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is wider still."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """y = x·Wᵀ without bias, in x's type."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): the dense layers' and the shared experts' feed-forward."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return down
