"""Speculative decoding's acceptance rule (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

A draft x, drawn from q, is accepted with probability min(1, p(x)/q(x)), p being the model's own distribution.
At the first rejection the token is drawn from max(p − q, 0), normalised; after M accepted drafts one more is
drawn from p. Either way every token follows exactly p. Where p and q are one-hot, this is greedy decoding.

Shapes: B rows, M drafts, T = M + 1 positions, O vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fathom.infer.sampler import draw


class Accepted(NamedTuple):
    """What one step decided: in row b, the first counts_B[b] drafts and then next_ids_B[b]."""

    counts_B: Tensor
    """Drafts accepted, 0 to M."""
    next_ids_B: Tensor
    """The token after them."""


def accept(
    draft_ids_BM: Tensor,
    draft_probs_BMO: Tensor,
    target_probs_BTO: Tensor,
    accept_uniforms_BM: Tensor,
    token_uniforms_BT: Tensor,
) -> Accepted:
    """Judge M drafts against the model's distributions at their places and at the place after them.

    Uniforms are numbers in (0, 1]: one to judge each draft, and one per place for the token drawn there.
    With M = 0 this is plain sampling.
    """
    rows, drafts = draft_ids_BM.shape
    ids_BM1 = draft_ids_BM.unsqueeze(-1)
    p_BM = target_probs_BTO[:, :drafts].gather(2, ids_BM1).squeeze(2)
    q_BM = draft_probs_BMO.gather(2, ids_BM1).squeeze(2)
    # u ≤ p/q, without the division. What the model would never say is refused even if q underflowed to 0.
    taken_BM = (accept_uniforms_BM * q_BM <= p_BM) & (p_BM > 0)
    counts_B = taken_BM.long().cumprod(1).sum(1)

    row_B = torch.arange(rows, device=counts_B.device)
    p_BO = target_probs_BTO[row_B, counts_B]
    # After the last draft there is nothing to subtract: q = 0 there makes the rest p itself.
    q_BTO = torch.cat((draft_probs_BMO, torch.zeros_like(target_probs_BTO[:, :1])), dim=1)
    rest_BO = (p_BO - q_BTO[row_B, counts_B]).clamp_min(0)
    # Where p = q no draft is rejected but by rounding; p is then as good as the empty rest is not.
    empty_B1 = rest_BO.sum(-1, keepdim=True) == 0
    next_ids_B = draw(torch.where(empty_B1, p_BO, rest_BO), token_uniforms_BT[row_B, counts_B])
    return Accepted(counts_B, next_ids_B)
