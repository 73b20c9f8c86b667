"""Losses and log-probabilities from whole logits: the definitions.

Shapes: N tokens, D hidden, U the hidden of a teacher, O vocabulary, P kept ids of all tokens, X ids.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position without loss."""
REMOVED = -1e4
"""Logit of an id that is masked: exp gives exactly 0, and every product with it stays finite."""


class SamplingMask(NamedTuple):
    """The ids that each token was sampled from: probabilities are those of a softmax over these alone."""

    kept_P: Tensor
    """int64: one token's ids after another's."""
    offsets_N: Tensor
    """int64, (N + 1): token n kept kept_P[offsets_N[n] : offsets_N[n + 1]]; none stands for all."""
    absent_X: Tensor | None = None
    """int64: ids that are never sampled."""

    def to(self, device: torch.device) -> "SamplingMask":
        """The mask on a device."""
        absent_X = None if self.absent_X is None else self.absent_X.to(device)
        return SamplingMask(self.kept_P.to(device), self.offsets_N.to(device), absent_X)

    def removed(self, first: int, last: int, vocabulary: int) -> Tensor:
        """Which ids tokens `first` to `last` - 1 were not sampled from, (last - first, O) bool."""
        begin, end = int(self.offsets_N[first]), int(self.offsets_N[last])
        counts_M = self.offsets_N[first : last + 1].diff()
        removed_MO = (counts_M > 0)[:, None].expand(-1, vocabulary).contiguous()
        rows_P = torch.arange(last - first, device=counts_M.device).repeat_interleave(counts_M)
        removed_MO[rows_P, self.kept_P[begin:end]] = False
        return removed_MO if self.absent_X is None else removed_MO.index_fill_(1, self.absent_X, True)


def linear_cross_entropy_reference(h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ over targets of −log softmax(h·headᵀ)[target], logits in float32 at least. A scalar SUM, not a mean."""
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype))
    logits_NO = logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32))
    return F.cross_entropy(logits_NO, targets_N, ignore_index=IGNORE, reduction="sum")


def linear_logprobs_reference(
    h_ND: Tensor,
    head_OD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    mask: SamplingMask | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(h·headᵀ / temperature)[target] and the entropy −Σ p·log p of that softmax, in nats: (N) and (N).

    In float32 at least. Both are 0, without gradients, where the target is IGNORE. With `mask` the softmax is over the
    ids that it keeps, which the targets must be among.
    """
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype))
    logits_NO = logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32)) / temperature
    if mask is not None:
        logits_NO = logits_NO.masked_fill(mask.removed(0, *logits_NO.shape), REMOVED)
    log_p_NO = logits_NO.log_softmax(1)
    ignored_N = targets_N == IGNORE
    logprobs_N = log_p_NO.gather(1, targets_N.masked_fill(ignored_N, 0).unsqueeze(1)).squeeze(1)
    entropies_N = -(log_p_NO.exp() * log_p_NO).sum(1)
    return logprobs_N.masked_fill(ignored_N, 0), entropies_N.masked_fill(ignored_N, 0)


def linear_distillation_reference(
    h_ND: Tensor,
    head_OD: Tensor,
    teacher_h_NU: Tensor,
    teacher_head_OU: Tensor,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """How far the student's distribution S of the next token is from the teacher's T, over all O, in nats: (N).

    beta 0: KL(T‖S), which covers all that the teacher may say. beta 1: KL(S‖T), which stays within it. Between them the
    generalised Jensen-Shannon divergence β·KL(T‖M) + (1 − β)·KL(S‖M) with M = β·T + (1 − β)·S (GKD, arXiv 2306.13649).
    Both are softmaxes of logits / temperature, in float32 at least. Gradients reach the student alone.
    """
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype)).to(wide)
    teacher_NO = F.linear(teacher_h_NU, teacher_head_OU.to(teacher_h_NU.dtype)).detach().to(wide)
    s_NO, t_NO = ((each_NO / temperature).log_softmax(1) for each_NO in (logits_NO, teacher_NO))
    if beta == 0:
        return kl_divergence(t_NO, s_NO)
    if beta == 1:
        return kl_divergence(s_NO, t_NO)
    m_NO = torch.logaddexp(t_NO + math.log(beta), s_NO + math.log1p(-beta))
    return beta * kl_divergence(t_NO, m_NO) + (1 - beta) * kl_divergence(s_NO, m_NO)


def kl_divergence(p_NO: Tensor, q_NO: Tensor) -> Tensor:
    """KL(P‖Q) of distributions given by their logarithms (N)."""
    return (p_NO.exp() * (p_NO - q_NO)).sum(1)
