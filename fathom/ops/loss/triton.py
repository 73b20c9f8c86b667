"""The loss and its gradient straight from a chunk of logits, which the gradient replaces.

Plain torch makes five passes over a float32 copy of the logits; here each logit is read twice and written once, in its
own type.

Shapes: M tokens, O vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16


def cross_entropy_(logits_MO: Tensor, targets_M: Tensor, ignored: int) -> Tensor:
    """Each row's −log softmax(logits)[target], (M) float32; 0 where the target is `ignored`.

    `logits_MO`, contiguous, become p − onehot, the gradient of the sum. A target outside the vocabulary gives NaN: to
    raise an error the host would have to wait for the GPU.
    """
    tokens, words = logits_MO.shape
    losses_M = torch.empty(tokens, dtype=torch.float32, device=logits_MO.device)
    block = min(_BLOCK, triton.next_power_of_2(words))
    _kernel[(tokens,)](logits_MO, targets_M, losses_M, words, ignored, BLOCK=block, num_warps=_WARPS)
    return losses_M


@triton.jit
def _kernel(logits_MO, targets_M, losses_M, words, ignored, BLOCK: tl.constexpr):
    """One row."""
    token = tl.program_id(0)
    target = tl.load(targets_M + token)
    row = logits_MO + token.to(tl.int64) * words
    column = tl.arange(0, BLOCK)
    # Read before the loop, whose sums wait for every thread: later some of them may be writing gradients already.
    inside = (target >= 0) & (target < words)
    chosen = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)

    # The sum so far is kept relative to the largest logit so far.
    largest, total = float("-inf"), 0.0
    for start in range(0, words, BLOCK):
        logits = tl.load(row + start + column, mask=start + column < words, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(logits, 0))
        # Nothing but −inf so far must not become NaN.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(logits - base), 0)

    counts = target != ignored
    tl.store(losses_M + token, tl.where(counts, tl.log(total) + largest - chosen, 0.0))

    scale = tl.where(counts, 1.0 / total, 0.0)
    for start in range(0, words, BLOCK):
        there = start + column < words
        logits = tl.load(row + start + column, mask=there, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logits - largest) * scale - tl.where(counts & (start + column == target), 1.0, 0.0)
        tl.store(row + start + column, gradient.to(row.dtype.element_ty), mask=there)
