"""Attention in blocks against its definition, and latent attention against a loop over queries."""

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops import cpu
from fathom.ops.attention import (
    causal_attention_reference,
    cpu_kernel,
    expanded_attention,
    expanded_attention_reference,
    fused,
    fused_causal_attention,
    heads_reference,
    latent_attention,
)
from fathom.ops.rope import Rope
from tests.ops.errors import scale_free_error

seeds = st.integers(0, 2**32 - 1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Case:
    """Inputs of expanded attention: B, S, H and the widths P, R, V; each row at its own positions if `own_positions`;
    segments of these lengths, row after row."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, int, int],
        own_positions: bool = False,
        segments: tuple[int, ...] | None = None,
    ) -> None:
        (batch, length, heads), (nope, rotated, value) = shape, widths
        self.inputs = (
            random(batch, length, heads, nope + rotated),
            random(batch, length, heads, nope + value, seed=1),
            random(batch, length, rotated, seed=2),
        )
        angles = random(*([batch] if own_positions else []), length, rotated // 2, seed=3)
        self.rope = Rope(angles.cos().float(), angles.sin().float())
        self.upstream = random(batch, length, heads, value, seed=4)
        self.segments = segments
        self.cu_seqlens = None
        if segments is not None:
            self.cu_seqlens = torch.tensor([0, *accumulate(segments)], dtype=torch.int32)

    def run(self, function: Any, dtype: torch.dtype) -> list[Tensor]:
        """Output and all gradients."""
        leaves = [t.to(dtype).requires_grad_() for t in self.inputs]
        out_BSHV = function(*leaves, self.rope, 0.3, self.cu_seqlens)
        gradients = torch.autograd.grad(out_BSHV, leaves, self.upstream.to(dtype))
        assert all(g.shape == t.shape and g.dtype == dtype for g, t in zip(gradients, leaves, strict=True))
        return [out_BSHV.detach(), *gradients]

    def run_alone(self, function: Any, dtype: torch.dtype) -> list[Tensor]:
        """The same of each segment on its own, side by side again."""
        assert self.segments is not None
        batch, length = self.inputs[0].shape[:2]
        angles = [t.expand(batch, length, -1).flatten(0, 1).split(self.segments) for t in self.rope]
        tensors = [t.to(dtype).flatten(0, 1).split(self.segments) for t in (*self.inputs, self.upstream)]
        found = []
        for *inputs, upstream, cos, sin in zip(*tensors, *angles, strict=True):
            leaves = [t[None].clone().requires_grad_() for t in inputs]
            out_1SHV = function(*leaves, Rope(cos, sin), 0.3)
            found.append([out_1SHV.detach(), *torch.autograd.grad(out_1SHV, leaves, upstream[None])])
        return [torch.cat(parts, 1).unflatten(1, (batch, length))[0] for parts in zip(*found, strict=True)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # At length 1 the softmax is constant, so the true gradients of q and k are zero.
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("widths", [(8, 4, 12), (7, 6, 5), (3, 34, 17)])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_equals_the_reference(length: int, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Outputs and gradients; the lengths straddle the size of a block. float32 is the kernels', float64 plain torch."""
    case = Case((2, length, 3), widths)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_equal(case.run(expanded_attention, dtype), case.run(expanded_attention_reference, dtype), tolerance)


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (33, 33), (7, 40), (1, 40)])
def test_fused_attention_equals_the_reference(length: int, keys: int) -> None:
    """torch's fused kernel, here on the CPU: all keys new, and new queries after older keys."""
    shapes = ((2, length, 3, 12), (2, keys, 3, 12), (2, keys, 3, 5))
    inputs = [random(*shape, seed=place).requires_grad_() for place, shape in enumerate(shapes)]
    upstream = random(2, length, 3, 5, seed=9)
    found, expected = (
        [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
        for out in (f(*inputs, 0.3) for f in (fused_causal_attention, causal_attention_reference))
    )
    assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("length", [1, 257])
def test_plain_torch_equals_the_reference_too(length: int) -> None:
    case = Case((2, length, 3), (7, 6, 5))
    with cpu.disabled():
        found = case.run(expanded_attention, torch.float32)
    assert_equal(found, case.run(expanded_attention_reference, torch.float32), 1e-5)


def test_recomputed_probabilities_equal_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences do not keep them between the passes."""
    case = Case((2, 600, 3), (8, 4, 12))
    kept = case.run(expanded_attention, torch.bfloat16)
    monkeypatch.setattr(cpu_kernel, "_KEPT_LENGTH", 0)
    for one, other in zip(case.run(expanded_attention, torch.bfloat16), kept, strict=True):
        assert torch.equal(one, other)


def test_rows_may_have_positions_of_their_own() -> None:
    case = Case((3, 20, 2), (5, 8, 6), own_positions=True)
    found = case.run(expanded_attention, torch.float32)
    assert_equal(found, case.run(expanded_attention_reference, torch.float32), 1e-5)


@pytest.mark.parametrize("length", [3, 257, 600])
def test_bfloat16_is_as_exact_as_the_reference(length: int) -> None:
    case = Case((2, length, 2), (24, 8, 16))
    fast, plain, exact = (
        case.run(expanded_attention, torch.bfloat16),
        case.run(expanded_attention_reference, torch.bfloat16),
        case.run(expanded_attention_reference, torch.float64),
    )
    for found, reference, truth in zip(fast, plain, exact, strict=True):
        assert scale_free_error(found, truth) <= 1.2 * scale_free_error(reference, truth) + 1e-7


def test_the_reference_is_the_definition() -> None:
    q_SX, k_SX, v_SV = random(5, 4), random(5, 4, seed=1), random(5, 3)
    found_SV = causal_attention_reference(*(t[None, :, None] for t in (q_SX, k_SX, v_SV)), 0.7)[0, :, 0]
    for i in range(5):
        weights = torch.exp(torch.stack([0.7 * q_SX[i] @ k_SX[j] for j in range(i + 1)]))
        expected_V = sum(weights[j] / weights.sum() * v_SV[j] for j in range(i + 1))
        assert torch.allclose(found_SV[i], expected_V, rtol=0, atol=1e-12)


def attend(q_BSHX: Tensor, k_BSHX: Tensor, v_BSHV: Tensor) -> Tensor:
    """The fast path without rotation: two rotary elements, all zero."""
    shape = q_BSHX.shape[:2]
    nothing = q_BSHX.new_zeros(*shape, 2)
    rope = Rope(torch.ones(shape[1], 1), torch.zeros(shape[1], 1))
    q_BSHX = torch.cat((q_BSHX, nothing.unsqueeze(2).expand(-1, -1, q_BSHX.shape[2], -1)), dim=-1)
    return expanded_attention(q_BSHX, torch.cat((k_BSHX, v_BSHV), dim=-1), nothing, rope, 1.0)


def test_large_scores_do_not_overflow() -> None:
    q_BSHX = torch.full((1, 130, 1, 4), 1e3)
    out_BSHV = attend(q_BSHX, q_BSHX, torch.ones(1, 130, 1, 2))
    assert torch.allclose(out_BSHV, torch.ones_like(out_BSHV))


def test_nan_reaches_exactly_the_positions_that_see_it() -> None:
    """A NaN spreads to every position that sees it, and to no other."""
    q_BSHX, v_BSHV = torch.ones(1, 40, 1, 4), torch.ones(1, 40, 1, 2)
    k_BSHX = q_BSHX.clone()
    k_BSHX[0, 20] = float("nan")
    out_BSHV = attend(q_BSHX, k_BSHX, v_BSHV)
    assert out_BSHV[0, :20].isfinite().all() and out_BSHV[0, 20:].isnan().all()


def test_bfloat16_softmax_is_taken_in_float32() -> None:
    """Averaging 300 equal values is exact to bfloat16's own rounding only with float32 statistics."""
    q_BSHX = torch.zeros(1, 300, 1, 4, dtype=torch.bfloat16)
    out_BSHV = attend(q_BSHX, q_BSHX, torch.ones(1, 300, 1, 2, dtype=torch.bfloat16))
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
    """Each row at positions of its own; slots after a query's position hold huge values."""
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


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (7, 40), (300, 601), (5, 5)])
def test_queries_may_be_the_last_of_more_keys(queries: int, keys: int, kernel: bool) -> None:
    """As in chunked prefill: the same rows as if all had been queries."""
    heads, nope, rotated, value = 3, 6, 4, 5
    q_BTHX = random(2, keys, heads, nope + rotated, dtype=torch.float32)
    kv_BTHY = random(2, keys, heads, nope + value, dtype=torch.float32)
    k_rope_BTR = random(2, keys, rotated, dtype=torch.float32)
    angles_TJ = torch.arange(keys)[:, None] * torch.tensor([1.0, 0.1])
    whole, late = (Rope(a.cos(), a.sin()) for a in (angles_TJ, angles_TJ[-queries:]))
    expected_BSHV = expanded_attention_reference(q_BTHX, kv_BTHY, k_rope_BTR, whole, 0.3)[:, -queries:]
    inputs = (q_BTHX[:, -queries:], kv_BTHY, k_rope_BTR, late, 0.3)
    with nullcontext() if kernel else cpu.disabled():
        torch.testing.assert_close(expanded_attention(*inputs), expected_BSHV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expanded_attention_reference(*inputs), expected_BSHV, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpu.available(), reason="the kernels are not built here")
def test_gradients_with_fewer_queries_than_keys_are_refused() -> None:
    q_BSHX, kv_BTHY = random(1, 2, 1, 6, dtype=torch.float32), random(1, 5, 1, 7, dtype=torch.float32)
    rope = Rope(torch.ones(2, 1), torch.zeros(2, 1))
    out_BSHV = expanded_attention(q_BSHX.requires_grad_(), kv_BTHY, random(1, 5, 2, dtype=torch.float32), rope, 1.0)
    with pytest.raises(NotImplementedError, match="as many queries as keys"):
        out_BSHV.sum().backward()


SEGMENTS = {
    "one a row": ((2, 33, 3), (33, 33)),
    "of one token": ((2, 3, 2), (1, 1, 1, 1, 1, 1)),
    "odd ones": ((3, 300, 2), (1, 63, 64, 172, 300, 257, 42, 1)),
    "in several blocks": ((2, 700, 2), (600, 99, 1, 7, 693)),
}


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(("shape", "segments"), SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_segments_attend_by_themselves(
    shape: tuple[int, int, int], segments: tuple[int, ...], dtype: torch.dtype, own_positions: bool
) -> None:
    """Outputs and gradients: the masked reference's in float64, and those of every segment on its own."""
    case = Case(shape, (7, 6, 5), own_positions, segments)
    exact = case.run(expanded_attention_reference, torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for kernel in (True, False):
        with nullcontext() if kernel else cpu.disabled():
            found = case.run(expanded_attention, dtype)
        assert_equal([t.double() for t in found], exact, tolerance)
    assert_equal(found, case.run_alone(expanded_attention_reference, dtype), tolerance)


@pytest.mark.parametrize(("shape", "segments"), SEGMENTS.values(), ids=SEGMENTS.keys())
def test_segments_in_bfloat16_are_as_exact_as_the_reference(
    shape: tuple[int, int, int], segments: tuple[int, ...]
) -> None:
    case = Case(shape, (24, 8, 16), segments=segments)
    fast, plain, exact = (
        case.run(expanded_attention, torch.bfloat16),
        case.run(expanded_attention_reference, torch.bfloat16),
        case.run(expanded_attention_reference, torch.float64),
    )
    for found, reference, truth in zip(fast, plain, exact, strict=True):
        assert scale_free_error(found, truth) <= 1.2 * scale_free_error(reference, truth) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_probabilities_of_segments_equal_kept_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((2, 300, 3), (8, 4, 12), segments=(300, 1, 200, 99))
    kept = case.run(expanded_attention, dtype)
    monkeypatch.setattr(cpu_kernel, "_KEPT_LENGTH", 0)
    assert all(map(torch.equal, case.run(expanded_attention, dtype), kept))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_do_not_change_each_other(dtype: torch.dtype, kernel: bool) -> None:
    """Whatever one segment holds, the others' outputs and gradients have the same bits."""
    case = Case((2, 130, 2), (8, 4, 12), segments=(50, 70, 10, 130))
    with nullcontext() if kernel else cpu.disabled():
        before = case.run(expanded_attention, dtype)
        for tensor in (*case.inputs, case.upstream):
            tensor[0, 50:120] = 7 * tensor[0, 50:120].roll(1, 0) + 1
        after = case.run(expanded_attention, dtype)
    for one, other in zip(before, after, strict=True):
        assert not torch.equal(one[0, 50:120], other[0, 50:120])
        for row, here in ((0, slice(50)), (0, slice(120, None)), (1, slice(None))):
            assert torch.equal(one[row, here], other[row, here])


@pytest.mark.parametrize("flash", [True, False])
def test_fused_attention_on_segments_equals_the_reference(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused kernel with a mask, and the code around its flash kernel, which a loop replaces."""

    def each_alone(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], most: Any, scale: float
    ) -> Tensor:
        assert cu_seqlens[0] is cu_seqlens[1] and max(cu_seqlens[0].diff().tolist()) <= min(most)
        assert q.shape == k.shape == v.shape
        lengths = cu_seqlens[0].diff().tolist()
        each = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([causal_attention_reference(*(t[None] for t in one), scale)[0] for one in each])

    monkeypatch.setattr(fused, "flash", each_alone)
    attend = fused._flash_segments if flash else fused_causal_attention
    case = Case((3, 20, 2), (6, 4, 5), segments=(1, 12, 7, 20, 4, 16))

    def through(attend: Any) -> list[Tensor]:
        return case.run(lambda q, kv, k, rope, *rest: attend(*heads_reference(q, kv, k, rope), *rest), torch.float64)

    assert_equal(through(attend), through(causal_attention_reference), 1e-12)


@pytest.mark.parametrize(
    ("boundaries", "keys", "complaint"),
    [
        ([0, 4, 8], 9, "as many keys as queries"),
        ([0, 3, 8], 4, "must contain 4"),
        ([0, 4], 4, "strictly from 0 to the 8 tokens"),
        ([1, 4, 8], 4, "strictly from 0 to the 8 tokens"),
        ([0, 4, 3, 8], 4, "strictly from 0 to the 8 tokens"),
        ([], 4, "strictly from 0 to the 8 tokens"),
        ([[0, 4, 8]], 4, "must be int32 of shape"),
        ([0.0, 4.0, 8.0], 4, "must be int32 of shape"),
    ],
)
def test_invalid_cu_seqlens_are_refused(boundaries: list[Any], keys: int, complaint: str) -> None:
    inputs = random(2, 4, 1, 6), random(2, keys, 1, 7), random(2, keys, 2), Rope(torch.ones(4, 1), torch.zeros(4, 1))
    cu_seqlens = torch.tensor(boundaries)
    cu_seqlens = cu_seqlens if cu_seqlens.is_floating_point() and boundaries else cu_seqlens.int()
    with pytest.raises(ValueError, match=complaint):
        expanded_attention(*inputs, 1.0, cu_seqlens)
