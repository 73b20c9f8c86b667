"""RMSNorm, SwiGLU and the moving of rows: the CPU's kernels against plain torch, at sizes that fill no vector."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops import cpu
from fathom.ops.moe import combine
from fathom.ops.norm import rms_norm, rms_norm_reference
from fathom.ops.swiglu import swiglu
from tests.ops.errors import scale_free_error

rows = st.integers(1, 9)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 384]))
seeds = st.integers(0, 2**32 - 1)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and all gradients, given a fixed gradient from above."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    upstream = random(*out.shape, seed=7, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max())


@settings(max_examples=40, deadline=None)
@given(rows, sizes, seeds)
def test_rms_norm_equals_the_reference(count: int, size: int, seed: int) -> None:
    inputs = random(2, count, size, seed=seed), random(size, seed=seed + 1)
    found = with_gradients(lambda x, w: rms_norm(x, w, 1e-6), *inputs)
    assert_near(found, with_gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), *inputs))


def test_rms_norm_reads_a_slice_of_wider_rows() -> None:
    """The latent is normalised where it lies, beside the rotated key."""
    wide, weight = random(3, 5, 40, seed=1), random(24, seed=2)
    found = with_gradients(lambda x, w: rms_norm(x[..., :24], w, 1e-6), wide, weight)
    assert_near(found, with_gradients(lambda x, w: rms_norm_reference(x[..., :24], w, 1e-6), wide, weight))
    found = with_gradients(lambda x, w: rms_norm(x.transpose(0, 2)[:24].transpose(0, 2), w, 1e-6), wide, weight)
    assert_near(found[:1], [rms_norm_reference(wide[..., :24], weight, 1e-6)])


@settings(max_examples=40, deadline=None)
@given(rows, sizes, seeds)
def test_swiglu_equals_torch(count: int, size: int, seed: int) -> None:
    inputs = 4 * random(count, size, seed=seed), random(count, size, seed=seed + 1)
    assert_near(with_gradients(swiglu, *inputs), with_gradients(lambda g, u: F.silu(g) * u, *inputs))


@pytest.mark.parametrize("case", ["norm", "swiglu"])
def test_bfloat16_is_as_exact_as_plain_torch(case: str) -> None:
    functions: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "norm": (
            lambda x, w: rms_norm(x, w, 1e-6),
            lambda x, w: rms_norm_reference(x, w, 1e-6),
            (random(50, 90, seed=1, dtype=torch.float64), random(90, seed=2, dtype=torch.float64)),
        ),
        "swiglu": (
            swiglu,
            lambda g, u: F.silu(g) * u,
            (random(50, 90, seed=1, dtype=torch.float64), random(50, 90, seed=2, dtype=torch.float64)),
        ),
    }
    fast, plain, inputs = functions[case]
    bf16_inputs = [t.bfloat16() for t in inputs]
    exact = with_gradients(plain, *(t.double() for t in bf16_inputs))
    for found, reference, truth in zip(
        with_gradients(fast, *bf16_inputs), with_gradients(plain, *bf16_inputs), exact, strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert scale_free_error(found, truth) <= 1.2 * scale_free_error(reference, truth) + 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 45])
def test_combine_adds_up_rows(size: int, dtype: torch.dtype) -> None:
    """By the kernel, by plain torch and compiled; −1 adds nothing, whatever rows there are."""
    y_RD, inverse_indices_NK = random(7, size, seed=3, dtype=dtype), torch.tensor([[0, 2, 4], [6, 0, 3], [-1, 5, -1]])
    y_RD[1] = float("nan")
    expected_ND = torch.stack([y_RD.double()[[i for i in row if i >= 0]].sum(0) for row in inverse_indices_NK.tolist()])
    assert torch.allclose(combine(y_RD, inverse_indices_NK).double(), expected_ND, rtol=2**-8, atol=1e-6)
    for plain in (combine, torch.compile(combine, backend="eager")):
        with cpu.disabled():
            found_ND = plain(y_RD, inverse_indices_NK)
        assert torch.allclose(found_ND.double(), expected_ND, rtol=2**-7, atol=1e-2)


def test_extreme_and_non_finite_values() -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, float("nan"), float("inf")]])
    found, expected = swiglu(gate, torch.ones_like(gate)), F.silu(gate)
    assert torch.allclose(found[:, :7], expected[:, :7], rtol=1e-5, atol=1e-30)
    assert found[0, 7].isnan() and not found[0, 8].isfinite()
    assert rms_norm(gate, torch.ones(9), 1e-6).isnan().any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(2**-100, 2**100, width=32)] * 2), min_size=1, max_size=40))
def test_rounding_to_bfloat16_is_torchs(pairs: list[tuple[float, float]]) -> None:
    """Sums of two values are exact enough in float32 that only the last rounding is seen."""
    x = torch.tensor(pairs).bfloat16().T.contiguous()
    assert torch.equal(combine(x, torch.tensor([[0, 1]]))[0], (x[0].float() + x[1].float()).bfloat16())
