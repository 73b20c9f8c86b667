"""The linear layer against its reference: every fprop, both types of weights, sizes that fill no tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops import cpu
from fathom.ops.linear import dgrad, fprop, has_kernel, linear, linear_reference, wgrad
from tests.ops.errors import scale_free_error

OWN = cpu.has_bf16_gemm(torch.bfloat16)
own = pytest.mark.skipif(not OWN, reason="this processor does not multiply pairs of bfloat16 (or has AMX)")


def random_matrices(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(x: Tensor, weight_OI: Tensor, dy: Tensor, fast: bool) -> list[Tensor]:
    x, weight_OI = x.clone().requires_grad_(), weight_OI.clone().requires_grad_()
    y = (linear if fast else linear_reference)(x, weight_OI)
    return [y.detach(), *torch.autograd.grad(y, (x, weight_OI), dy)]


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(64, 48, 40), (33, 31, 29), (200, 96, 17), (1200, 130, 70), (70, 1500, 90)]
)
def test_bfloat16_is_as_exact_as_the_reference(rows: int, inner: int, outer: int, masters: torch.dtype) -> None:
    x, weight_OI, dy = random_matrices(0, (rows, inner), (outer, inner), (rows, outer))
    bf16_inputs = x.bfloat16(), weight_OI.to(masters), dy.bfloat16()
    truth = run(bf16_inputs[0].double(), bf16_inputs[1].bfloat16().double(), bf16_inputs[2].double(), fast=False)
    fast, plain = run(*bf16_inputs, fast=True), run(*bf16_inputs, fast=False)
    assert [t.dtype for t in fast] == [t.dtype for t in plain]
    for found, reference, exact in zip(fast, plain, truth, strict=True):
        assert scale_free_error(found, exact) <= 1.05 * scale_free_error(reference, exact) + 1e-9


@own
def test_gradients_of_float32_weights_are_not_rounded() -> None:
    x, weight_OI, dy = random_matrices(1, (300, 64), (96, 64), (300, 96))
    bf16_inputs = x.bfloat16(), weight_OI.float(), dy.bfloat16()
    _, _, found_OI = run(*bf16_inputs, fast=True)
    exact_OI = bf16_inputs[2].double().t() @ bf16_inputs[0].double()
    assert scale_free_error(found_OI, exact_OI) < 1e-11


@own
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 90),
    inner=st.integers(1, 90),
    outer=st.integers(1, 90),
    masters=st.sampled_from([torch.float32, torch.bfloat16]),
    adds=st.booleans(),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_size(
    rows: int, inner: int, outer: int, masters: torch.dtype, adds: bool, threads: int, seed: int
) -> None:
    """Small integers multiply exactly, so every sum must be exact; memory around the result stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    x_NI, weight_OI, dy_NO = (
        torch.randint(-2, 3, shape, generator=generator).to(dtype)
        for shape, dtype in (
            ((rows, inner), torch.bfloat16),
            ((outer, inner), masters),
            ((rows, outer), torch.bfloat16),
        )
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, dx, dw = guarded(rows, outer), guarded(rows, inner), guarded(outer, inner, torch.float32)
        dw.fill_(3)
        assert has_kernel(x_NI, weight_OI)
        fprop(x_NI, weight_OI, y)
        dgrad(dy_NO, weight_OI, dx)
        wgrad(dy_NO, x_NI, dw, adds)
    finally:
        torch.set_num_threads(before)
    wide_NI, wide_OI, wide_NO = x_NI.double(), weight_OI.double(), dy_NO.double()
    for found, exact in (
        (y, wide_NI @ wide_OI.t()),
        (dx, wide_NO @ wide_OI),
        (dw, wide_NO.t() @ wide_NI + (3 if adds else 0)),
    ):
        # Sums beyond 256 are rounded where they are kept in bfloat16.
        assert torch.equal(found, exact.to(found.dtype))
        around = found.untyped_storage().nbytes() // found.element_size()
        whole = torch.empty(0, dtype=found.dtype).set_(found.untyped_storage(), 0, (around,))
        assert (whole[:_GUARD] == _MARK).all() and (whole[-_GUARD:] == _MARK).all()


_GUARD, _MARK = 64, 77.0


def guarded(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix with sentinel values before and after it."""
    return torch.full((rows * columns + 2 * _GUARD,), _MARK, dtype=dtype)[_GUARD:-_GUARD].view(rows, columns)


@own
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1300, 700, 600), (40, 300, 2100)])
def test_large_gradients_and_deep_sums(rows: int, inner: int, outer: int) -> None:
    """Beyond what a thread sums for itself, and beyond what is summed at once."""
    x_NI, weight_OI, dy_NO = (t.bfloat16() for t in random_matrices(2, (rows, inner), (outer, inner), (rows, outer)))
    dx_NI, dw_OI = torch.empty_like(x_NI), torch.ones(outer, inner)
    dgrad(dy_NO, weight_OI, dx_NI)
    wgrad(dy_NO, x_NI, dw_OI, adds=True)
    assert scale_free_error(dx_NI, dy_NO.double() @ weight_OI.double()) < 3e-6
    assert scale_free_error(dw_OI - 1, dy_NO.double().t() @ x_NI.double()) < 1e-11


@own
def test_one_row_does_not_depend_on_the_others() -> None:
    x_NI, weight_OI = (t.bfloat16() for t in random_matrices(3, (50, 64), (80, 64)))
    whole = linear(x_NI, weight_OI)
    assert torch.equal(linear(x_NI[:33], weight_OI), whole[:33])


def test_few_rows_and_other_types_are_torch_s() -> None:
    x, weight_OI, dy = random_matrices(4, (5, 24), (16, 24), (5, 16))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = x.to(dtype), weight_OI.to(dtype), dy.to(dtype)
        for found, expected in zip(run(*given, fast=True), run(*given, fast=False), strict=True):
            assert torch.equal(found, expected)
