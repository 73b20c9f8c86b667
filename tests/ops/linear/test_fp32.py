"""Float32 matmuls from bfloat16 ones: as exact as float32's own, forward and backward."""

import pytest
import torch

from fathom.ops.linear.fp32 import FP32Linear, fp32_linear, fp32_linear_reference
from tests.ops.errors import scale_free_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (5, 16, 3), (67, 130, 48)])
def test_as_exact_as_float32(rows: int, inputs: int, outputs: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    x_NI = torch.randn(rows, inputs, generator=draw).bfloat16()
    weight_OI, dy_NO = torch.randn(outputs, inputs, generator=draw), torch.randn(rows, outputs, generator=draw)
    expected = _results(fp32_linear_reference, x_NI.double(), weight_OI.double(), dy_NO.double())
    found = _results(FP32Linear.apply, *(t.to(DEVICE) for t in (x_NI, weight_OI, dy_NO)))
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    for name, mine, right, limit in zip("yxw", found, expected, (1e-13, 1e-5, 1e-13), strict=True):
        assert scale_free_error(mine.cpu().double(), right) < limit, name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU's way")
def test_elsewhere_the_reference() -> None:
    x_NI, weight_OI = torch.randn(7, 8).bfloat16(), torch.randn(3, 8)
    assert torch.equal(fp32_linear(x_NI, weight_OI), fp32_linear_reference(x_NI, weight_OI))
    assert fp32_linear(x_NI.double(), weight_OI).dtype == torch.float64


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_compiling_keeps_the_digits(size: float) -> None:
    x_NI, weight_OI = torch.ones(2, 8, device=DEVICE).bfloat16(), size * (1 + torch.rand(4, 8, device=DEVICE))
    compiled = torch.compile(lambda x, w: FP32Linear.apply(x, w), backend="aot_eager")
    right = fp32_linear_reference(x_NI.double(), weight_OI.double())
    torch.testing.assert_close(compiled(x_NI, weight_OI).double(), right, rtol=1e-6, atol=0)


def _results(function, x_NI, weight_OI, dy_NO):  # type: ignore[no-untyped-def]
    x_NI, weight_OI = x_NI.detach().requires_grad_(), weight_OI.detach().requires_grad_()
    y_NO = function(x_NI, weight_OI)
    return y_NO.detach(), *torch.autograd.grad(y_NO, (x_NI, weight_OI), dy_NO)
