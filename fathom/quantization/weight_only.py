"""A model whose matrices are kept in 8 or 4 bits. Decoding is bound by reading weights: half the bytes, half the time.

Weights alone are quantised; what is multiplied with them stays as it is. The compiled kernels read the numbers as they
lie. Plain torch, which takes long prompts, widens a matrix when it comes to it, which long prompts pay for.
"""

import copy
from collections.abc import Iterator
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fathom.model.layers import Linear
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.quantization.integer import Precision, dequantize, quantize


class Packed(nn.Module):
    """Stands for a weight: what is stored (numbers, scales) on one side, the matrix on the other."""

    def __init__(self, precision: Precision, dtype: torch.dtype) -> None:
        super().__init__()
        self.precision, self.dtype = precision, dtype

    def forward(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return dequantize(numbers, scales, self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(weight, self.precision)


def quantized(model: Model, precision: Precision) -> Model:
    """A copy of the model for inference with int8 or int4 matrices; what is not quantised is shared with `model`.

    Linear maps, experts and the head are quantised. Embedding, norms and gates stay, and so does kv_b_proj, a few
    percent of the bytes, which attention absorbs in two directions.

    Raises ValueError for another precision, and for int4 where 32 does not divide a matrix's columns.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it must be {' or '.join(get_args(Precision))}")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared).requires_grad_(False)
    for name, module, parameter in _matrices(packed):
        weight = getattr(module, parameter)
        try:
            parametrize.register_parametrization(module, parameter, Packed(precision, weight.dtype), unsafe=True)
        except ValueError as error:
            raise ValueError(f"{name}.{parameter}: {error}") from None
    return packed


def stored(module: nn.Module, parameter: str) -> tuple[Tensor, Tensor | None]:
    """What lies in memory for a module's weight: numbers and scales, or the weight itself."""
    if not parametrize.is_parametrized(module, parameter):
        return getattr(module, parameter), None
    packed = cast(nn.ModuleDict, module.parametrizations)[parameter]
    return cast(Tensor, packed.original0), cast(Tensor, packed.original1)


def _matrices(model: Model) -> Iterator[tuple[str, nn.Module, str]]:
    kept = {id(part.kv_b_proj) for part in model.modules() if isinstance(part, MultiHeadLatentAttention)}
    if model.config.tie_word_embeddings:
        kept.add(id(model.lm_head))
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and id(module) not in kept:
            yield name, module, "weight"
        elif isinstance(module, Experts):
            yield name, module, "gate_up_proj"
            yield name, module, "down_proj"
