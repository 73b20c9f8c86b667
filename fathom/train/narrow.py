"""Bfloat16 copies of the matrices, for a GPU to multiply; the float32 masters stay with the optimizer.

Narrowing each weight where it is used would read and write it again in every micro-batch and its backward pass, and
every gradient would be widened before it is added: on a mixture's many idle weights this takes as long as a fifth of
the products. A copy is made once a step instead, and bfloat16 gradients are added to the masters' as they lie.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from fathom.model.layers import Linear
from fathom.model.moe import Experts
from fathom.model.transformer import Model


class NarrowCopy:
    """A model that computes with bfloat16 matrices and leaves their gradients with the float32 originals.

    Embedding, norms, routers and all buffers are the original's own.
    """

    def __init__(self, original: Model) -> None:
        self._masters: list[Tensor] = _matrices(original)
        self._copies: list[Tensor] = [nn.Parameter(master.detach().bfloat16()) for master in self._masters]
        for master, narrow in zip(self._masters, self._copies, strict=True):
            narrow.register_post_accumulate_grad_hook(partial(_hand_over, master))
        others = (*original.parameters(), *original.buffers())
        instead = {id(t): t for t in others} | dict(zip(map(id, self._masters), self._copies, strict=True))
        self.model: Model = copy.deepcopy(original, instead)

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


def _hand_over(master: Tensor, narrow: Tensor) -> None:
    """A micro-batch's gradient joins its master's."""
    assert narrow.grad is not None
    if master.grad is None:
        master.grad = narrow.grad.float()
    else:
        master.grad.add_(narrow.grad)
    narrow.grad = None
