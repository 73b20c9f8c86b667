"""The FP8 format against its definition: every E4M3 value, partial blocks, extremes, and chunks of rows."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.quantization import fp8

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_e4m3_value_dequantizes_exactly() -> None:
    finite = ALL[~ALL.float().isnan()][None]
    one = torch.ones(1, 2)
    assert torch.equal(fp8.dequantize(finite, one), finite.float())
    assert fp8.dequantize(ALL[None], one).isnan().sum() == 2, "NaN stays NaN"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(-60, 60), st.integers(0, 2**32 - 1))
def test_rounding_errors_are_half_a_step_at_most(rows: int, columns: int, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Normally distributed rows of very different magnitudes.
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) ** 8
    weight = weight * 2.0**power
    qweight, scales = fp8.quantize(weight)
    assert qweight.dtype == torch.float8_e4m3fn and qweight.shape == weight.shape
    assert tuple(scales.shape) == fp8.scale_shape(rows, columns) == (math.ceil(rows / 128), math.ceil(columns / 128))
    found = fp8.dequantize(qweight, scales)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(found, qweight.float() * spread)
    bound = fp8.rounding_bound(weight, scales)
    assert torch.equal(bound, torch.maximum(weight.abs() / 16, spread / 1024))
    assert ((found - weight).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    weight = torch.full((130, 5), value)
    weight[0, 0] = -value
    found = fp8.dequantize(*fp8.quantize(weight))
    assert found.isfinite().all()
    assert (found - weight).abs().max() <= max(value / 16, 1e-38)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.ones(3, 200)
    weight[1, 150] = value
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantize(weight)


@pytest.mark.parametrize("shape", [(1,), (5000,), (1, 1), (300, 70), (129_280, 7168), (128, 10**7), (3 * 10**6,)])
def test_row_chunks_cover_a_tensor_and_end_at_block_boundaries(shape: tuple[int, ...]) -> None:
    found = list(fp8.row_chunks(shape))
    assert found[0][0] == 0 and found[-1][1] == shape[0]
    for (_, end), (begin, _) in itertools.pairwise(found):
        assert begin == end and begin % 128 == 0
    width = shape[1] if len(shape) > 1 else 1
    assert max(last - first for first, last in found) * width <= max(1 << 20, 128 * width)
