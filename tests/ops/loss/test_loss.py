"""The chunked loss against plain logits and cross-entropy: value and both gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fathom.ops import cpu, loss
from fathom.ops.loss import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.errors import scale_free_error


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    h_ND = torch.randn(tokens, 24, generator=generator).to(dtype)
    head_OD = torch.randn(67, 24, generator=generator)
    head_OD = head_OD if dtype == torch.bfloat16 else head_OD.to(dtype)
    targets_N = torch.randint(67, (tokens,), generator=generator)
    targets_N[::5] = IGNORE
    return h_ND.requires_grad_(), head_OD.requires_grad_(), targets_N


def _value_and_gradients(function, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    h_ND, head_OD, targets_N = _inputs(tokens, dtype)
    value = function(h_ND, head_OD, targets_N)
    (value * 0.37).backward()
    return [value.detach(), h_ND.grad, head_OD.grad]


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 100])
def test_equals_the_reference_in_float64(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 16)
    ours = _value_and_gradients(linear_cross_entropy, tokens, torch.float64)
    reference = _value_and_gradients(linear_cross_entropy_reference, tokens, torch.float64)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_equals_the_reference_in_float32(tokens: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 16)
    with nullcontext() if kernels else cpu.disabled():
        ours = _value_and_gradients(linear_cross_entropy, tokens, torch.float32)
    reference = _value_and_gradients(linear_cross_entropy_reference, tokens, torch.float32)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("target", [-1, 67, 10**6])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    h_ND, head_OD, targets_N = _inputs(7, torch.float32)
    targets_N[3] = target
    with pytest.raises(IndexError):
        linear_cross_entropy(h_ND, head_OD, targets_N)


def test_what_is_not_finite_is_not_hidden() -> None:
    """An overflowing head must reach the loss: the training loop skips such steps."""
    h_ND, head_OD, targets_N = _inputs(7, torch.float32)
    for poison in (float("nan"), float("inf")):
        broken_ND = h_ND.detach().clone()
        broken_ND[3, 2] = poison
        assert not linear_cross_entropy(broken_ND, head_OD, targets_N).isfinite()


def test_bfloat16_is_as_close_to_float64_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 64)
    exact = _value_and_gradients(linear_cross_entropy_reference, 300, torch.float64)
    ours = _value_and_gradients(linear_cross_entropy, 300, torch.bfloat16)
    reference = _value_and_gradients(linear_cross_entropy_reference, 300, torch.bfloat16)
    for x, y, z in zip(exact, ours, reference, strict=True):
        assert scale_free_error(y, x) <= 1.2 * scale_free_error(z, x) + 1e-7


def test_only_ignored_targets_give_zero() -> None:
    h_ND, head_OD, targets_N = _inputs(7, torch.float32)
    value = linear_cross_entropy(h_ND, head_OD, torch.full_like(targets_N, IGNORE))
    value.backward()
    assert value == 0
    assert h_ND.grad.abs().max() == 0
    assert head_OD.grad.abs().max() == 0


def test_no_tokens_cost_nothing() -> None:
    h, head = torch.randn(0, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(h, head, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and head.grad is not None and not head.grad.any()


def test_a_frozen_head_is_allowed() -> None:
    h_ND, head_OD, targets_N = _inputs(7, torch.float64)
    linear_cross_entropy(h_ND, head_OD.detach(), targets_N).backward()
    (expected,) = torch.autograd.grad(linear_cross_entropy_reference(h_ND, head_OD, targets_N), h_ND)
    torch.testing.assert_close(h_ND.grad, expected)
