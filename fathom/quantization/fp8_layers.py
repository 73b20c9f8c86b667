"""Layers whose weights stay in memory as FP8 checkpoints hold them: E4M3 values and a scale per block of 128x128.

Half the memory of bfloat16. A matmul dequantises a chunk of rows at a time, multiplies with it and drops it, so that no
whole matrix exists in a wider type (except kv_b_proj, which decoding absorbs into the query). Slower than a bfloat16
model where memory is not the limit; for inference only, in plain torch.

Shapes: N tokens, D hidden, K experts per token, E experts, R rows, I columns, r and i blocks of 128 along them.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.ops.swiglu import swiglu
from fathom.quantization import fp8


class FP8Linear(nn.Module):
    """A linear layer without bias, or a stack of them (E, R, I), in FP8 blocks."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        *stack, rows, columns = shape
        scales = torch.empty(*stack, *fp8.scale_shape(rows, columns))
        # As bytes: `Module.to` converts every floating type, FP8 included.
        self.qweight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model; scales stay float32."""
        scales = self.scales.detach()  # `to` changes the parameter itself
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = nn.Parameter(scales.to(self.qweight.device), requires_grad=False)
        return self

    @property
    def weight(self) -> Tensor:
        """The whole matrix (R, I) in float32."""
        return fp8.dequantize(self.qweight.view(torch.float8_e4m3fn), self.scales)

    def load(self, qweight_RI: Tensor, scales_ri: Tensor, expert: int | None = None) -> None:
        """Copy E4M3 values and their scales in, as the matrix or as one expert's matrix of a stack."""
        index = ... if expert is None else expert
        self.qweight[index] = qweight_RI.view(torch.uint8).to(self.qweight.device)
        self.scales[index] = scales_ri.to(self.scales.device)

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x·Wᵀ in x's type, (…, I) → (…, R); W is the matrix, or one expert's matrix of a stack."""
        index = ... if expert is None else expert
        qweight_RI, scales_ri = self.qweight[index].view(torch.float8_e4m3fn), self.scales[index]
        outputs = []
        for first, last in fp8.row_chunks(tuple(qweight_RI.shape)):
            chunk = fp8.dequantize(qweight_RI[first:last], scales_ri[first // fp8.BLOCK : -(-last // fp8.BLOCK)])
            outputs.append(F.linear(x, chunk.to(x.dtype)))
        return torch.cat(outputs, dim=-1)


class FP8Experts(nn.Module):
    """The routed experts in FP8 blocks; only those that were chosen are dequantised."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = FP8Linear(experts, width, hidden), FP8Linear(experts, width, hidden)
        self.down = FP8Linear(experts, hidden, width)

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs (N, D)."""
        out_ND = torch.zeros_like(x_ND)
        for expert in topk_ids_NK.unique().tolist():
            token, choice = (topk_ids_NK == expert).nonzero(as_tuple=True)
            hidden = swiglu(self.gate(x_ND[token], expert), self.up(x_ND[token], expert))
            weighted = hidden * weights_NK[token, choice, None].to(x_ND.dtype)
            out_ND.index_add_(0, token, self.down(weighted, expert))
        return out_ND
