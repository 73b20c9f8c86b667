"""Bfloat16 copies of the weight matrices, for a GPU's matmuls; the optimizer keeps the float32 master weights.

Casting each weight where it is used would read and write it again in every micro-batch and its backward pass, and
every gradient would be cast to float32 before it is added: with a mixture's many idle weights this takes as long as a
fifth of the matmuls. Instead a copy is made once a step, and bfloat16 gradients are added to the float32 ones directly:
the first micro-batch's wait for the second's, so that the first float32 values written are their sums.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model
from fathom.ops import gpu


class Bf16Weights:
    """A model that computes with bfloat16 matrices and accumulates their gradients in the float32 originals.

    Embedding, norms, routers and all buffers are shared with the original. Gradients are complete after `collect`.
    """

    def __init__(self, original: Model) -> None:
        self._masters: list[Tensor] = _matrices(original)
        self._copies: list[Tensor] = [nn.Parameter(master.detach().bfloat16()) for master in self._masters]
        self._first: dict[int, Tensor] = {}
        """Gradients of the first micro-batch, by the index of the matrix, until the second comes."""
        for index, weight in enumerate(self._copies):
            weight.register_post_accumulate_grad_hook(partial(self._accumulate, index))
        others = (*original.parameters(), *original.buffers())
        memo = {id(t): t for t in others} | dict(zip(map(id, self._masters), self._copies, strict=True))
        self.model: Model = copy.deepcopy(original, memo)

    def _accumulate(self, index: int, weight: Tensor) -> None:
        """Add a micro-batch's gradient to those before it."""
        master, gradient = self._masters[index], weight.grad
        assert gradient is not None
        weight.grad = None
        before = self._first.pop(index, None) if master.grad is None else master.grad
        if before is None:
            self._first[index] = gradient.contiguous()
        else:
            master.grad = _sum(before, gradient)

    def collect(self) -> None:
        """After the last micro-batch: hand over the gradients that no second one was added to."""
        while self._first:
            index, gradient = self._first.popitem()
            self._masters[index].grad = gradient.float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the updated master weights."""
        torch._foreach_copy_(self._copies, self._masters)


def _matrices(model: Model) -> list[Tensor]:
    """The parameters that are multiplied in the activations' type, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            found |= {id(parameter): parameter for parameter in module.parameters()}
    return list(found.values())


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b in float32; into `a` where that is float32."""
    if a.is_cuda and gpu.TRITON_INSTALLED:
        from fathom.ops.linear.triton_accumulate import sum_in_float32  # Triton comes with torch's CUDA builds alone

        return sum_in_float32(a, b.contiguous())
    return a.float().add_(b)
