"""The packed formats, judged by their definitions in numpy and by the smallest error that their steps allow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.quantization.integer import dequantize, quantize

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4).map(lambda groups: 32 * groups))


def some_matrices(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """With rows of zeros and of large numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[0, 0] = 0
    weight[-1, -1] *= 1000
    return weight


@given(shapes, st.integers(0, 1000))
def test_int8_is_the_nearest_of_255_steps_of_a_row(shape: tuple[int, int, int], seed: int) -> None:
    weight = some_matrices(shape, seed)
    numbers, scales = quantize(weight, "int8")
    assert numbers.dtype == torch.int8 and numbers.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == weight.shape[:-1]
    found = dequantize(numbers, scales, torch.float32)
    np.testing.assert_array_equal(found, numbers.numpy().astype(np.float32) * scales.numpy()[..., None])
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()


@given(shapes, st.integers(0, 1000))
def test_int4_is_half_bytes_of_four_words_and_a_scale(shape: tuple[int, int, int], seed: int) -> None:
    weight = some_matrices(shape, seed)
    words, scales = quantize(weight, "int4")
    assert words.dtype == torch.int32 and words.shape == (*shape[:2], shape[2] // 8)
    assert scales.dtype == torch.bfloat16 and scales.shape == (*shape[:2], shape[2] // 32)
    found = dequantize(words, scales, torch.float32)
    unsigned, factors = words.numpy().astype(np.uint32), scales.float().numpy()
    for matrix, row, column in np.ndindex(shape):
        group, k, word = column // 32, column % 32 // 4, column % 4
        half = int(unsigned[matrix, row, 4 * group + word] >> (4 * k)) & 15
        assert found[matrix, row, column] == np.float32(half - 8) * factors[matrix, row, group]
    # Half a step beside, and what rounding the step to bfloat16 moves; against the extreme's sign only 7 steps.
    groups = weight.unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 8
    error = (found - weight).unflatten(-1, (-1, 32)).abs()
    against = torch.from_numpy(-np.sign(factors))[..., None] * groups < -7.4 * step
    assert (error[~against.expand_as(error)] <= (0.54 * step).expand_as(error)[~against]).all()
    assert (error <= 1.04 * step).all() and (against.sum(-1) < 32).all()


def test_int4_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"multiple of 32.*has 40"):
        quantize(torch.ones(2, 40), "int4")
