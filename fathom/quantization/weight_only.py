"""Weight-only quantisation of one parameter, as a parametrisation: stored in int8 or int4, read as a matrix.

The compiled kernels read the stored values as they are (`stored`). Plain torch, which runs long prefills, dequantises a
matrix each time the parameter is read; that cost is spread over many tokens.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fathom.quantization.integer import Precision, dequantize, quantize


class QuantizedWeight(nn.Module):
    """The parametrisation: quantised values and scales on the one side, the matrix in `dtype` on the other."""

    def __init__(self, precision: Precision, dtype: torch.dtype) -> None:
        super().__init__()
        self.precision, self.dtype = precision, dtype

    def forward(self, qweight: Tensor, scales: Tensor) -> Tensor:
        return dequantize(qweight, scales, self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(weight, self.precision)


def quantize_parameter(module: nn.Module, parameter: str, precision: Precision) -> None:
    """Store the parameter of that name in int8 or int4; reading it gives a matrix of the type that it had.

    Raises ValueError where `precision` cannot hold its shape.
    """
    dtype = getattr(module, parameter).dtype
    parametrize.register_parametrization(module, parameter, QuantizedWeight(precision, dtype), unsafe=True)


def stored(module: nn.Module, parameter: str) -> tuple[Tensor, Tensor | None]:
    """What is in memory for a module's weight: quantised values and scales, or the weight itself and None."""
    if not parametrize.is_parametrized(module, parameter):
        return getattr(module, parameter), None
    quantized = cast(nn.ModuleDict, module.parametrizations)[parameter]
    return cast(Tensor, quantized.original0), cast(Tensor, quantized.original1)
