"""The Triton kernels of training's backward pass against plain torch, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fathom.ops.linear import triton_accumulate as sums
from fathom.ops.swiglu import triton as swiglu
from fathom.ops.swiglu import weighted_swiglu_backward_reference
from tests.gpu import DEVICE
from tests.ops.errors import scale_free_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 64), (5, 67), (2, 200)])
def test_backward_through_the_activation(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "_BLOCK", 64)
    draw = torch.Generator().manual_seed(width)
    shapes = ((rows, 2 * width), (rows,), (rows, width))
    inputs = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    expected = weighted_swiglu_backward_reference(*(t.double() for t in inputs))
    found = swiglu.weighted_swiglu_backward(*(t.to(DEVICE) for t in inputs))
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert scale_free_error(mine.cpu().double(), right) < (1e-10 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_exact_and_where_they_should_be(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_BLOCK", 64)
    a, b = torch.randn(size, device=DEVICE).to(dtype), torch.randn(size, device=DEVICE).bfloat16()
    expected = a.float() + b.float()
    found = sums.sum_in_float32(a, b)
    assert torch.equal(found, expected) and (found is a) == (dtype == torch.float32)
