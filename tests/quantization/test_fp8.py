"""FP8 blocks by their definition: every number there is, ragged edges, extremes, and what memory is asked for."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.checkpoint.convert import convert
from fathom.checkpoint.hf.model import save_model
from fathom.checkpoint.hf.safetensors_io import StoredTensor
from fathom.checkpoint.hf.save import Storage
from fathom.checkpoint.hf.weights import row_chunks
from fathom.quantization import fp8
from tests.model.configs import lively_model, tiny

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_number_is_widened_to_its_value() -> None:
    finite = ALL[~ALL.float().isnan()][None]
    one = torch.ones(1, 2)
    assert torch.equal(fp8.dequantize(finite, one), finite.float())
    assert fp8.dequantize(ALL[None], one).isnan().sum() == 2, "NaN stays NaN"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(-60, 60), st.integers(0, 2**32 - 1))
def test_a_number_is_rounded_by_half_a_step_at_most(rows: int, columns: int, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Normal numbers over many magnitudes, in blocks of different ones.
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) ** 8
    weight = weight * 2.0**power
    numbers, scales = fp8.quantize(weight)
    assert numbers.dtype == torch.float8_e4m3fn and numbers.shape == weight.shape
    assert tuple(scales.shape) == fp8.scale_shape(rows, columns) == (math.ceil(rows / 128), math.ceil(columns / 128))
    found = fp8.dequantize(numbers, scales)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(found, numbers.float() * spread)
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
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.ones(3, 200)
    weight[1, 150] = value
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantize(weight)


@pytest.mark.parametrize("shape", [(1,), (5000,), (1, 1), (300, 70), (129_280, 7168), (128, 10**7), (3 * 10**6,)])
def test_bands_cover_a_tensor_and_end_between_blocks(shape: tuple[int, ...]) -> None:
    found = list(row_chunks(shape))
    assert found[0][0] == 0 and found[-1][1] == shape[0]
    for (_, end), (begin, _) in itertools.pairwise(found):
        assert begin == end and begin % 128 == 0
    width = shape[1] if len(shape) > 1 else 1
    assert max(last - first for first, last in found) * width <= max(1 << 20, 128 * width)


@pytest.mark.parametrize("to", ["fp8", "bf16"])
def test_conversion_never_asks_for_more_than_a_band(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Storage
) -> None:
    """An embedding of a million and a half numbers is read in two pieces, like everything larger."""
    save_model(lively_model(tiny(vocab_size=60_000)), tmp_path / "model")
    asked = []
    rows = StoredTensor.rows

    def noted(stored: StoredTensor, first: int, last: int) -> torch.Tensor:
        found = rows(stored, first, last)
        asked.append(found.numel())
        return found

    monkeypatch.setattr(StoredTensor, "rows", noted)
    convert(tmp_path / "model", tmp_path / "out", to, verify=True)
    assert 10**6 < max(asked) <= 1 << 20
