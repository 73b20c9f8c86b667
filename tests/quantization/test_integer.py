"""int8 and int4 against their definitions in numpy, and their errors against the smallest that the steps allow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.quantization.integer import dequantize, quantize, quantized_bytes

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4).map(lambda groups: 32 * groups))


def some_matrices(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """With a row of zeros and a row of large values among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[0, 0] = 0
    weight[-1, -1] *= 1000
    return weight


@given(shapes, st.integers(0, 1000))
def test_int8_is_the_nearest_of_255_steps_of_a_row(shape: tuple[int, int, int], seed: int) -> None:
    weight = some_matrices(shape, seed)
    qweight, scales = quantize(weight, "int8")
    assert qweight.dtype == torch.int8 and qweight.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == weight.shape[:-1]
    assert quantized_bytes(shape, "int8") == qweight.nbytes + scales.nbytes
    found = dequantize(qweight, scales, torch.float32)
    np.testing.assert_array_equal(found, qweight.numpy().astype(np.float32) * scales.numpy()[..., None])
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * step).all()


@given(shapes, st.integers(0, 1000))
def test_int4_is_nibbles_of_four_words_and_a_scale(shape: tuple[int, int, int], seed: int) -> None:
    weight = some_matrices(shape, seed)
    words, scales = quantize(weight, "int4")
    assert words.dtype == torch.int32 and words.shape == (*shape[:2], shape[2] // 8)
    assert scales.dtype == torch.bfloat16 and scales.shape == (*shape[:2], shape[2] // 32)
    assert quantized_bytes(shape, "int4") == words.nbytes + scales.nbytes
    found = dequantize(words, scales, torch.float32)
    unsigned, factors = words.numpy().astype(np.uint32), scales.float().numpy()
    for matrix, row, column in np.ndindex(shape):
        group, k, word = column // 32, column % 32 // 4, column % 4
        nibble = int(unsigned[matrix, row, 4 * group + word] >> (4 * k)) & 15
        assert found[matrix, row, column] == np.float32(nibble - 8) * factors[matrix, row, group]
    # Half a step, plus the rounding of the step to bfloat16; only 7 steps on the side opposite to the extreme value.
    groups = weight.unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 8
    error = (found - weight).unflatten(-1, (-1, 32)).abs()
    opposite = torch.from_numpy(-np.sign(factors))[..., None] * groups < -7.4 * step
    assert (error[~opposite.expand_as(error)] <= (0.54 * step).expand_as(error)[~opposite]).all()
    assert (error <= 1.04 * step).all() and (opposite.sum(-1) < 32).all()


def test_int4_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"multiple of 32.*has 40"):
        quantize(torch.ones(2, 40), "int4")
    with pytest.raises(ValueError, match=r"multiple of 32.*has 40"):
        quantized_bytes((2, 40), "int4")
