"""Attention in blocks against its definition, and latent attention against a loop over queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops.attention import causal_attention, causal_attention_reference, latent_attention

seeds = st.integers(0, 2**32 - 1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_gradients(function: object, *inputs: Tensor, scale: float) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out_BSHV = function(*leaves, scale)  # type: ignore[operator]
    return [
        out_BSHV.detach(),
        *torch.autograd.grad(out_BSHV, leaves, random(*out_BSHV.shape).to(out_BSHV.dtype)),
    ]


@pytest.mark.parametrize("widths", [(12, 12), (12, 7), (5, 9)], ids=["V = X", "V < X", "V > X"])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_equal_the_reference(length: int, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Outputs and gradients; the lengths straddle the size of a block."""
    x, v = widths
    inputs = [random(2, length, 3, width, seed=i, dtype=dtype) for i, width in enumerate((x, x, v))]
    found = with_gradients(causal_attention, *inputs, scale=0.3)
    expected = with_gradients(causal_attention_reference, *inputs, scale=0.3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        # At length 1 the softmax is constant, so the true gradients of q and k are zero.
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


def test_the_reference_is_the_definition() -> None:
    q_SX, k_SX, v_SV = random(5, 4), random(5, 4, seed=1), random(5, 3)
    found_SV = causal_attention_reference(*(t[None, :, None] for t in (q_SX, k_SX, v_SV)), 0.7)[0, :, 0]
    for i in range(5):
        weights = torch.exp(torch.stack([0.7 * q_SX[i] @ k_SX[j] for j in range(i + 1)]))
        expected_V = sum(weights[j] / weights.sum() * v_SV[j] for j in range(i + 1))
        assert torch.allclose(found_SV[i], expected_V, rtol=0, atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    q_BSHX = torch.full((1, 130, 1, 4), 1e3)
    out_BSHV = causal_attention(q_BSHX, q_BSHX, torch.ones(1, 130, 1, 2), 1.0)
    assert torch.allclose(out_BSHV, torch.ones_like(out_BSHV))


def test_bfloat16_softmax_is_taken_in_float32() -> None:
    """Averaging 300 equal values is exact to bfloat16's own rounding only with float32 statistics."""
    q_BSHX = torch.zeros(1, 300, 1, 4, dtype=torch.bfloat16)
    for function in (causal_attention, causal_attention_reference):
        out_BSHV = function(q_BSHX, q_BSHX, torch.ones(1, 300, 1, 2, dtype=torch.bfloat16), 1.0)
        assert out_BSHV.dtype == torch.bfloat16
        assert (out_BSHV.float() - 1).abs().max() <= 2**-8


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), slots=st.integers(1, 12), heads=st.integers(1, 4),
    latent=st.integers(1, 9), rope=st.integers(1, 6), data=st.data(), seed=seeds,
)  # fmt: skip
def test_latent_attention_equals_a_loop(
    batch: int, slots: int, heads: int, latent: int, rope: int, data: st.DataObject, seed: int
) -> None:
    """Each row at positions of its own; slots after a query's position hold huge numbers."""
    length = data.draw(st.integers(1, slots))
    starts = data.draw(st.lists(st.integers(0, slots - length), min_size=batch, max_size=batch))
    positions_BS = torch.tensor(starts)[:, None] + torch.arange(length)
    q_BSHW = random(batch, length, heads, latent + rope, seed=seed % 1000)
    cache_BTW = random(batch, slots, latent + rope, seed=seed % 1000)
    for row, start in enumerate(starts):
        cache_BTW[row, start + length :] = 1e6
    found_BSHC = latent_attention(q_BSHW, cache_BTW, positions_BS, latent, 0.4)
    for b in range(batch):
        for s in range(length):
            seen_TW = cache_BTW[b, : starts[b] + s + 1]
            for h in range(heads):
                expected_C = (seen_TW @ q_BSHW[b, s, h] * 0.4).softmax(0) @ seen_TW[:, :latent]
                assert torch.allclose(found_BSHC[b, s, h], expected_C, rtol=1e-12, atol=1e-12)
