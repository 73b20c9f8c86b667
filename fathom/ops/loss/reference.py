"""Losses and log-probabilities from whole logits: the definitions.

Shapes: N tokens, D hidden, O vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position without loss."""


def linear_cross_entropy_reference(h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ over targets of −log softmax(h·headᵀ)[target], logits in float32 at least. A scalar SUM, not a mean."""
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype))
    logits_NO = logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32))
    return F.cross_entropy(logits_NO, targets_N, ignore_index=IGNORE, reduction="sum")


def linear_logprobs_reference(
    h_ND: Tensor, head_OD: Tensor, targets_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(h·headᵀ / temperature)[target] and the entropy −Σ p·log p of that softmax, in nats: (N) and (N).

    In float32 at least. Both are 0, without gradients, where the target is IGNORE.
    """
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype))
    log_p_NO = (logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32)) / temperature).log_softmax(1)
    ignored_N = targets_N == IGNORE
    logprobs_N = log_p_NO.gather(1, targets_N.masked_fill(ignored_N, 0).unsqueeze(1)).squeeze(1)
    entropies_N = -(log_p_NO.exp() * log_p_NO).sum(1)
    return logprobs_N.masked_fill(ignored_N, 0), entropies_N.masked_fill(ignored_N, 0)
