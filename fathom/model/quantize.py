"""Weight-only quantisation of a model. Decoding is bound by reading weights: half the bytes, half the time.

Activations keep their type.
"""

import copy
from collections.abc import Iterator
from typing import get_args

from torch import nn

from fathom.model.layers import Linear
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.quantization.integer import Precision
from fathom.quantization.weight_only import quantize_parameter


def quantizable_weights(model: Model) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights worth quantising, as module name, module and parameter name: linear layers, experts, the head.

    Left out are embedding, norms and routers, which are few bytes a token; kv_b_proj, a few percent of the bytes, which
    attention absorbs on both sides, as W and as Wᵀ; and a tied head, which is the embedding.
    """
    excluded = {id(part.kv_b_proj) for part in model.modules() if isinstance(part, MultiHeadLatentAttention)}
    if model.config.tie_word_embeddings:
        excluded.add(id(model.lm_head))
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and id(module) not in excluded:
            yield name, module, "weight"
        elif isinstance(module, Experts):
            yield name, module, "gate_up_proj"
            yield name, module, "down_proj"


def quantized(model: Model, precision: Precision) -> Model:
    """A copy of the model for inference whose large matrices (`quantizable_weights`) are int8 or int4.

    Tensors that are not quantised are shared with `model`. Raises ValueError for another precision, and for int4 where
    a matrix's number of columns is not a multiple of 32.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it must be {' or '.join(get_args(Precision))}")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = copy.deepcopy(model, shared).requires_grad_(False)
    for name, module, parameter in quantizable_weights(found):
        try:
            quantize_parameter(module, parameter, precision)
        except ValueError as error:
            raise ValueError(f"{name}.{parameter}: {error}") from None
    return found
