"""Bfloat16 copies of the matrices, for a GPU to multiply; the float32 masters stay with the optimizer.

Narrowing each weight where it is used would read and write it again in every micro-batch and its backward pass, and
every gradient would be widened before it is added: on a mixture's many idle weights this takes as long as a fifth of
the products. A copy is made once a step instead, and bfloat16 gradients are added to the masters' as they lie: the
first micro-batch's wait for the second's, so that the first float32 numbers written are their sums.
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
    """A model that computes with bfloat16 matrices and leaves their gradients with the float32 originals.

    Embedding, norms, routers and all buffers are the original's own. Gradients are complete after `collect`.
    """

    def __init__(self, original: Model) -> None:
        self._masters: list[Tensor] = _matrices(original)
        self._copies: list[Tensor] = [nn.Parameter(master.detach().bfloat16()) for master in self._masters]
        self._first: dict[int, Tensor] = {}
        """Gradients of the one micro-batch that has been so far, by the matrix's number."""
        for index, narrow in enumerate(self._copies):
            narrow.register_post_accumulate_grad_hook(partial(self._hand_over, index))
        others = (*original.parameters(), *original.buffers())
        instead = {id(t): t for t in others} | dict(zip(map(id, self._masters), self._copies, strict=True))
        self.model: Model = copy.deepcopy(original, instead)

    def _hand_over(self, index: int, narrow: Tensor) -> None:
        """A micro-batch's gradient joins those before it."""
        master, gradient = self._masters[index], narrow.grad
        assert gradient is not None
        narrow.grad = None
        before = self._first.pop(index, None) if master.grad is None else master.grad
        if before is None:
            self._first[index] = gradient.contiguous()
        else:
            master.grad = _sum(before, gradient)

    def collect(self) -> None:
        """After the last micro-batch: what was the only gradient of its matrix becomes the master's, too."""
        while self._first:
            index, gradient = self._first.popitem()
            self._masters[index].grad = gradient.float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the optimizer made of the masters."""
        torch._foreach_copy_(self._copies, self._masters)


def _matrices(model: Model) -> list[Tensor]:
    """All that are multiplied in the activations' type, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            found |= {id(parameter): parameter for parameter in module.parameters()}
    return list(found.values())


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b in float32; into `a` where that is float32."""
    if a.is_cuda and gpu.INSTALLED:
        from fathom.ops.linear.triton_accumulate import sum_in_float32  # Triton comes with torch's CUDA builds alone

        return sum_in_float32(a, b.contiguous())
    return a.float().add_(b)
