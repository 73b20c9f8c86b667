"""Distillation over the whole vocabulary, from the hidden states of both models: no (N, O) logits ever exist whole.

The teacher's hidden states are kept, its head is applied chunk by chunk, in the forward pass and again in the backward
pass; so memory is a few chunks of logits, whatever the vocabulary.

Shapes: N tokens, D the student's hidden, U the teacher's, O vocabulary, M tokens in a chunk.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import linear
from fathom.ops.loss import log_softmax_chunks
from fathom.ops.loss.reference import kl_divergence


def linear_distillation(
    h_ND: Tensor,
    head_OD: Tensor,
    teacher_h_NU: Tensor,
    teacher_head_OU: Tensor,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """As the reference, in chunks, with gradients to `h_ND` and `head_OD`.

    Raises ValueError for vocabularies of two sizes, for a beta outside 0 to 1 and a temperature that is not above 0.
    """
    if len(head_OD) != len(teacher_head_OU):
        raise ValueError(f"the student's vocabulary has {len(head_OD)} ids, the teacher's {len(teacher_head_OU)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 to 1, not {beta}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    teacher = teacher_h_NU.detach(), teacher_head_OU.detach()
    divergence_N: Tensor = _LinearDistillation.apply(h_ND, head_OD, *teacher, beta, temperature)
    return divergence_N


class _LinearDistillation(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        h_ND, head_OD, teacher_h_NU, teacher_head_OU, beta, temperature = inputs
        h_ND, teacher_h_NU = h_ND.contiguous(), teacher_h_NU.contiguous()
        divergence_N = h_ND.new_empty(len(h_ND), dtype=torch.promote_types(h_ND.dtype, torch.float32))
        for chunk, s_MO, t_MO, _ in _both(h_ND, head_OD, teacher_h_NU, teacher_head_OU, temperature):
            divergence_N[chunk] = _divergence(s_MO, t_MO, beta)
        ctx.save_for_backward(h_ND, head_OD, teacher_h_NU, teacher_head_OU)
        ctx.settings = beta, temperature
        return divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddivergence_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_ND, head_OD, teacher_h_NU, teacher_head_OU = ctx.saved_tensors
        beta, temperature = ctx.settings
        h_needs_grad, head_needs_grad, *_ = ctx.needs_input_grad
        dh_ND = torch.empty_like(h_ND) if h_needs_grad else None
        dhead_OD = torch.zeros_like(head_OD, dtype=ddivergence_N.dtype) if head_needs_grad else None
        for chunk, s_MO, t_MO, weight_OD in _both(h_ND, head_OD, teacher_h_NU, teacher_head_OU, temperature):
            dlogits_MO = _logits_gradient(s_MO, t_MO, beta)
            dlogits_MO = dlogits_MO.mul_(ddivergence_N[chunk, None] / temperature).to(h_ND.dtype)
            if dh_ND is not None:
                linear.dgrad(dlogits_MO, weight_OD, dh_ND[chunk])
            if dhead_OD is not None:
                linear.wgrad(dlogits_MO, h_ND[chunk], dhead_OD, adds=chunk.start > 0)
        return dh_ND, None if dhead_OD is None else dhead_OD.to(head_OD.dtype), None, None, None, None


def _both(
    h_ND: Tensor, head_OD: Tensor, teacher_h_NU: Tensor, teacher_head_OU: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Which tokens, log S and log T (M, O) in the student's type, float32 at least, and the student's head."""
    student = log_softmax_chunks(h_ND, head_OD, temperature, None)
    teacher = log_softmax_chunks(teacher_h_NU, teacher_head_OU, temperature, None)
    for (chunk, s_MO, weight_OD), (_, t_MO, _) in zip(student, teacher, strict=True):
        yield chunk, s_MO, t_MO.to(s_MO.dtype), weight_OD


def _mixture(s_MO: Tensor, t_MO: Tensor, beta: float) -> Tensor:
    """log M = log(β·T + (1 − β)·S)."""
    return torch.logaddexp(t_MO + math.log(beta), s_MO + math.log1p(-beta))


def _divergence(s_MO: Tensor, t_MO: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl_divergence(t_MO, s_MO)
    if beta == 1:
        return kl_divergence(s_MO, t_MO)
    m_MO = _mixture(s_MO, t_MO, beta)
    return beta * kl_divergence(t_MO, m_MO) + (1 - beta) * kl_divergence(s_MO, m_MO)


def _logits_gradient(s_MO: Tensor, t_MO: Tensor, beta: float) -> Tensor:
    """The divergence's gradient with respect to z = logits / temperature of the student.

    For beta 0 it is S − T. Otherwise ∂/∂S is g = log S − log T (beta 1), or (1 − β)·(log S − log M), up to a constant
    that the softmax removes: ∂/∂z = S·(g − Σ S·g).
    """
    p_MO = s_MO.exp()
    if beta == 0:
        return p_MO.sub_(t_MO.exp())
    g_MO = s_MO - t_MO if beta == 1 else (s_MO - _mixture(s_MO, t_MO, beta)).mul_(1 - beta)
    mean_M1 = (p_MO * g_MO).sum(1, keepdim=True)
    return g_MO.sub_(mean_M1).mul_(p_MO)
