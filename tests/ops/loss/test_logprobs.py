"""Chunked log-probabilities and entropies against whole logits: values, gradients for any weights, and memory."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.ops import cpu, loss
from fathom.ops.loss import IGNORE, SamplingMask, linear_cross_entropy, linear_logprobs, linear_logprobs_reference
from tests.ops.errors import scale_free_error

WORDS, HIDDEN = 67, 24


def _inputs(tokens: int, dtype: torch.dtype, head_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    h_ND = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head_OD = torch.randn(WORDS, HIDDEN, generator=generator, dtype=torch.float64).to(head_dtype or dtype)
    targets_N = torch.randint(WORDS, (tokens,), generator=generator)
    targets_N[::5] = IGNORE
    return h_ND.requires_grad_(), head_OD.requires_grad_(), targets_N


def _values_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    temperature: float = 1.0,
    weighs: tuple[bool, bool] = (True, True),
    mask: SamplingMask | None = None,
) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of sums of them with a random weight for every token."""
    h_ND, head_OD, targets_N = inputs
    generator = torch.Generator().manual_seed(1)
    results = function(h_ND, head_OD, targets_N, temperature, mask)
    weights = [torch.randn(len(h_ND), generator=generator, dtype=torch.float64) for _ in results]
    used = [(w.to(r.dtype) * r).sum() for r, w, weighed in zip(results, weights, weighs, strict=True) if weighed]
    return [*(r.detach() for r in results), *torch.autograd.grad(sum(used), (h_ND, head_OD))]


@pytest.mark.parametrize("weighs", [(True, True), (True, False), (False, True)], ids=["both", "logprobs", "entropies"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 100])
def test_equals_the_reference_in_float64(
    tokens: int, temperature: float, weighs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 16)
    inputs = _inputs(tokens, torch.float64)
    found = _values_and_gradients(linear_logprobs, inputs, temperature, weighs)
    expected = _values_and_gradients(linear_logprobs_reference, inputs, temperature, weighs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_equals_the_reference_in_float32(tokens: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 16)
    inputs = _inputs(tokens, torch.float32)
    with nullcontext() if kernels else cpu.disabled():
        found = _values_and_gradients(linear_logprobs, inputs, 0.8)
    for one, other in zip(found, _values_and_gradients(linear_logprobs_reference, inputs, 0.8), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_close_to_float64_as_the_reference(
    head_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 64)
    inputs = _inputs(300, torch.bfloat16, head_dtype)
    wide = (*(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    found = _values_and_gradients(linear_logprobs, inputs)
    reference = _values_and_gradients(linear_logprobs_reference, inputs)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16, head_dtype]
    for x, y, z in zip(_values_and_gradients(linear_logprobs_reference, wide), found, reference, strict=True):
        assert scale_free_error(y, x) <= 1.2 * scale_free_error(z, x) + 1e-7


def test_the_reference_is_the_definition() -> None:
    h_ND, head_OD, targets_N = (t.detach() for t in _inputs(6, torch.float64))
    logprobs_N, entropies_N = linear_logprobs_reference(h_ND, head_OD, targets_N, 0.5)
    for n, target in enumerate(targets_N.tolist()):
        powers_O = (h_ND[n] @ head_OD.T / 0.5).exp()
        p_O = powers_O / powers_O.sum()
        expected = (0.0, 0.0) if target == IGNORE else (float(p_O[target].log()), float(-(p_O * p_O.log()).sum()))
        assert float(logprobs_N[n]) == pytest.approx(expected[0], abs=1e-12)
        assert float(entropies_N[n]) == pytest.approx(expected[1], abs=1e-12)


def test_the_sum_is_minus_the_cross_entropy() -> None:
    inputs = _inputs(100, torch.float64)
    total = -linear_logprobs(*inputs)[0].sum()
    torch.testing.assert_close(total, linear_cross_entropy(*inputs), rtol=1e-12, atol=1e-12)


def test_ignored_targets_give_zero_and_no_gradient() -> None:
    inputs = _inputs(41, torch.float64)
    logprobs_N, entropies_N, dh_ND, _ = _values_and_gradients(linear_logprobs, inputs)
    ignored_N = inputs[2] == IGNORE
    for found in (logprobs_N, entropies_N, dh_ND):
        assert (found[ignored_N] == 0).all() and (found[~ignored_N] != 0).all()


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 3)
    h_ND, head_OD, targets_N = _inputs(7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, head: linear_logprobs(h, head, targets_N, 0.7), (h_ND, head_OD))


@pytest.mark.parametrize("frozen", ["h_ND", "head_OD"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    h_ND, head_OD, targets_N = _inputs(9, torch.float64)
    expected = _values_and_gradients(linear_logprobs_reference, (h_ND, head_OD, targets_N), weighs=(True, False))[2:]
    kept, stopped, place = (head_OD, h_ND, 1) if frozen == "h_ND" else (h_ND, head_OD, 0)
    stopped.requires_grad_(False)
    weight_N = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (weight_N * linear_logprobs(h_ND, head_OD, targets_N)[0]).sum().backward()
    torch.testing.assert_close(kept.grad, expected[place])
    assert stopped.grad is None


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return out


def test_memory_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a chunk of logits, and none of that size is kept for the backward pass."""
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 64)
    inputs = _inputs(1000, torch.float32)
    saved: list[int] = []
    with _Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            logprobs_N, entropies_N = linear_logprobs(*inputs)
        (logprobs_N.sum() + entropies_N.sum()).backward()
    assert sum(saved) <= sum(t.numel() for t in inputs) + 1000
    assert max(1000 * HIDDEN, 64 * WORDS) >= largest.elements


def test_no_tokens_cost_nothing() -> None:
    h_ND, head_OD, targets_N = (
        torch.randn(0, 8, requires_grad=True),
        torch.randn(16, 8, requires_grad=True),
        torch.zeros(0).long(),
    )
    logprobs_N, entropies_N = linear_logprobs(h_ND, head_OD, targets_N)
    (logprobs_N.sum() + entropies_N.sum()).backward()
    assert logprobs_N.shape == entropies_N.shape == (0,) and head_OD.grad is not None and not head_OD.grad.any()


@pytest.mark.parametrize("target", [-1, WORDS, 10**6])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    h_ND, head_OD, targets_N = _inputs(7, torch.float64)
    targets_N[3] = target
    with pytest.raises(IndexError, match="vocabulary's 67 words"):
        linear_logprobs(h_ND, head_OD, targets_N)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        linear_logprobs(*_inputs(3, torch.float32), temperature)


def _mask(targets_N: Tensor) -> SamplingMask:
    """For some tokens a random set with the target in it, for others everything; never ids 3 and 5."""
    generator = torch.Generator().manual_seed(2)
    kept = []
    for n, target in enumerate(targets_N.tolist()):
        chosen = torch.randperm(WORDS, generator=generator)[: n % 7].tolist()
        kept.append(sorted({*chosen, target} - {IGNORE}) if n % 3 else [])
    offsets = [0, *torch.tensor([len(ids) for ids in kept]).cumsum(0).tolist()]
    flat = [token for ids in kept for token in ids]
    return SamplingMask(torch.tensor(flat, dtype=torch.int64), torch.tensor(offsets), torch.tensor([3, 5]))


@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_masked_ids_have_no_probability(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 16)
    h_ND, head_OD, targets_N = _inputs(tokens, torch.float64)
    targets_N = targets_N.masked_fill((targets_N == 3) | (targets_N == 5), 4)
    mask = _mask(targets_N)
    found = _values_and_gradients(linear_logprobs, (h_ND, head_OD, targets_N), 0.8, mask=mask)
    reference = _values_and_gradients(linear_logprobs_reference, (h_ND, head_OD, targets_N), 0.8, mask=mask)
    for one, other in zip(found, reference, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(other.abs().max()))
    for n, target in enumerate(targets_N.tolist()):
        if target == IGNORE:
            continue
        kept = mask.kept_P[mask.offsets_N[n] : mask.offsets_N[n + 1]].tolist() or list(range(WORDS))
        kept = [token for token in kept if token not in (3, 5)]
        log_p = (h_ND[n].detach() @ head_OD[kept].detach().T / 0.8).log_softmax(0)
        assert float(found[0][n]) == pytest.approx(float(log_p[kept.index(target)]), abs=1e-9)
        assert float(found[1][n]) == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-9)
