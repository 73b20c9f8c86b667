"""Distillation in chunks against whole logits: every divergence, its gradient, and what the formulas promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops import loss
from fathom.ops.loss.distillation import linear_distillation
from fathom.ops.loss.reference import linear_distillation_reference

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def _inputs(tokens: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Hidden states and head of the student, then of a wider teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 7), (13, 7), (tokens, 11), (13, 11)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_equal_whole_logits(
    beta: float, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda words, device: chunk)
    h_ND, head_OD, *teacher = _inputs(10, torch.float64)
    upstream_N = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for operation in (linear_distillation, linear_distillation_reference):
        student = [t.clone().requires_grad_() for t in (h_ND, head_OD)]
        value_N = operation(*student, *teacher, beta, temperature)
        found.append([value_N.detach(), *torch.autograd.grad(value_N, student, upstream_N)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_values_are_the_definition(beta: float) -> None:
    h_ND, head_OD, teacher_h_NU, teacher_head_OU = _inputs(6, torch.float64)
    s_NO, t_NO = F.linear(h_ND, head_OD).softmax(1), F.linear(teacher_h_NU, teacher_head_OU).softmax(1)

    def kl(p_NO: Tensor, q_NO: Tensor) -> Tensor:
        return (p_NO * (p_NO / q_NO).log()).sum(1)

    m_NO = beta * t_NO + (1 - beta) * s_NO
    expected = {0.0: kl(t_NO, s_NO), 1.0: kl(s_NO, t_NO)}.get(beta, beta * kl(t_NO, m_NO) + (1 - beta) * kl(s_NO, m_NO))
    found_N = linear_distillation(h_ND, head_OD, teacher_h_NU, teacher_head_OU, beta)
    torch.testing.assert_close(found_N, expected, atol=1e-12, rtol=1e-9)
    assert (found_N > 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(beta: float) -> None:
    h_ND, head_OD, *_ = _inputs(6, torch.float32)
    h_ND.requires_grad_()
    value_N = linear_distillation(h_ND, head_OD, h_ND, head_OD, beta)
    [gradient_ND] = torch.autograd.grad(value_N.sum(), h_ND)
    assert value_N.abs().max() < 1e-6 and gradient_ND.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_stay_finite(beta: float) -> None:
    inputs = [200 * t for t in _inputs(6, torch.float32)]
    inputs[0].requires_grad_()
    value_N = linear_distillation(*inputs, beta)
    value_N.sum().backward()
    assert value_N.isfinite().all() and inputs[0].grad is not None and inputs[0].grad.isfinite().all()


def test_a_generalised_divergence_is_bounded() -> None:
    """JSD at β = 1/2 is at most log 2, however far apart the two are."""
    inputs = [200 * t for t in _inputs(50, torch.float64)]
    assert (linear_distillation(*inputs, 0.5) <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_is_as_exact_as_the_reference(beta: float) -> None:
    exact = linear_distillation_reference(*_inputs(300, torch.float64), beta)
    fast, slow = (
        operation(*_inputs(300, torch.bfloat16), beta)
        for operation in (linear_distillation, linear_distillation_reference)
    )
    assert fast.dtype == torch.float32
    assert (fast - exact).square().mean() < 1.5 * (slow - exact).square().mean() + 1e-6


def test_what_cannot_be_compared_is_refused() -> None:
    h_ND, head_OD, teacher_h_NU, teacher_head_OU = _inputs(4, torch.float32)
    with pytest.raises(ValueError, match="vocabulary has 13 ids, the teacher's 12"):
        linear_distillation(h_ND, head_OD, teacher_h_NU, teacher_head_OU[:12])
    with pytest.raises(ValueError, match=r"beta must be from 0 to 1, not 1\.5"):
        linear_distillation(h_ND, head_OD, teacher_h_NU, teacher_head_OU, beta=1.5)
    with pytest.raises(ValueError, match="temperature must be above 0, not 0"):
        linear_distillation(h_ND, head_OD, teacher_h_NU, teacher_head_OU, temperature=0)
