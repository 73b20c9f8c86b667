"""A model whose matrices stay in memory as FP8 checkpoints hold them: E4M3 numbers and a scale per block of 128x128.

Half the memory of bfloat16. Products take a band of blocks at a time: it is widened, multiplied with and forgotten, so
that no matrix is ever whole in a wider type (but kv_b_proj, which decoding folds into the query). Slower than a wide
model where memory is not what limits; for inference alone, in plain torch.

Shapes: N tokens, D hidden, K experts per token, E experts, R rows, I columns, r and i blocks of 128 along them.
"""

from collections.abc import Callable
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.checkpoint.hf.name_mapping import locate
from fathom.checkpoint.hf.weights import StoredWeights, row_chunks
from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.ops.swiglu import swiglu
from fathom.quantization import fp8


class Blocks(nn.Module):
    """A linear map without bias, or a stack of them, in FP8 blocks."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        *stack, rows, columns = shape
        scales = torch.empty(*stack, *fp8.scale_shape(rows, columns))
        # As bytes: torch takes FP8 for one of the floating types that `to` converts a model into.
        self.numbers = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model; scales stay float32."""
        scales = self.scales.detach()  # `to` changes the parameter itself
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = nn.Parameter(scales.to(self.numbers.device), requires_grad=False)
        return self

    @property
    def weight(self) -> Tensor:
        """The whole matrix (R, I) in float32."""
        return fp8.dequantize(self.numbers.view(torch.float8_e4m3fn), self.scales)

    def fill(self, numbers_RI: Tensor, scales_ri: Tensor, number: int | None = None) -> None:
        """Take numbers in E4M3 and their scales as the matrix, or as the one of that number in a stack."""
        where = ... if number is None else number
        self.numbers[where] = numbers_RI.view(torch.uint8).to(self.numbers.device)
        self.scales[where] = scales_ri.to(self.scales.device)

    def forward(self, x: Tensor, number: int | None = None) -> Tensor:
        """x·Wᵀ in x's type, W being the matrix of that number in a stack."""
        where = ... if number is None else number
        numbers_RI, scales_ri = self.numbers[where].view(torch.float8_e4m3fn), self.scales[where]
        products = []
        for first, last in row_chunks(tuple(numbers_RI.shape)):
            band = fp8.dequantize(numbers_RI[first:last], scales_ri[first // fp8.BLOCK : -(-last // fp8.BLOCK)])
            products.append(F.linear(x, band.to(x.dtype)))
        return torch.cat(products, dim=-1)


class BlockExperts(nn.Module):
    """The routed experts; only the chosen ones are widened."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = Blocks(experts, width, hidden), Blocks(experts, width, hidden)
        self.down = Blocks(experts, hidden, width)

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' weighted sum (N, D), and the load (E)."""
        out_ND = torch.zeros_like(x_ND)
        tokens_per_expert_E = topk_ids_NK.flatten().bincount(minlength=len(self.down.numbers))
        for expert in tokens_per_expert_E.nonzero()[:, 0].tolist():
            token, choice = (topk_ids_NK == expert).nonzero(as_tuple=True)
            hidden = swiglu(self.gate(x_ND[token], expert), self.up(x_ND[token], expert))
            weighted = hidden * weights_NK[token, choice, None].to(x_ND.dtype)
            out_ND.index_add_(0, token, self.down(weighted, expert))
        return out_ND, tokens_per_expert_E


def keep_blocks(model: Model, weights: StoredWeights) -> frozenset[str]:
    """Make room in `model` for the matrices that `weights` holds in FP8; returns the released names of those."""
    homes: dict[str, set[str]] = {}
    for entry in weights.entries():
        if weights.is_fp8(entry.name) and fp8.is_quantized(entry.name):
            homes.setdefault(_home(entry.name, model), set()).add(entry.name)
    for name, released in list(homes.items()):
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            experts, hidden, width = module.down_proj.shape
            if len(released) < 3 * experts:  # a stack is of one type
                del homes[name]
                continue
            room: nn.Module = BlockExperts(experts, hidden, width)
        else:
            room = Blocks(*cast(Linear, module).weight.shape)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, room)
    return frozenset[str]().union(*homes.values())


def fill_blocks(model: Model, name: str, numbers_RI: Tensor, scales_ri: Tensor) -> None:
    """Put one released matrix in its place."""
    module, where = model.get_submodule(_home(name, model)), locate(name, model.config)
    assert where is not None
    if isinstance(module, BlockExperts):
        module = module.get_submodule(name.split(".")[-2].removesuffix("_proj"))
    cast(Blocks, module).fill(numbers_RI, scales_ri, where.expert)


def _home(name: str, model: Model) -> str:
    """The module that a released matrix is part of."""
    where = locate(name, model.config)
    assert where is not None
    return where.parameter.rpartition(".")[0]
