"""Singular values against numpy's own decomposition, ranks against spectra of known rank."""

import numpy as np
import pytest
import torch

from fathom.lab.inspector.spectrum import Spectrum, ranks


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tokens", [3, 50])
def test_singular_values_of_latents_that_come_in_pieces(tokens: int, centred: bool) -> None:
    c_NC = np.random.default_rng(tokens).normal(0.7, 1, (tokens, 9))
    spectrum = Spectrum(9)
    for piece_NC in np.array_split(c_NC, 3):
        spectrum.add(torch.from_numpy(piece_NC))
    whole_NC = c_NC - c_NC.mean(0) if centred else c_NC
    expected = np.zeros(9)
    found = np.linalg.svd(whole_NC, compute_uv=False)
    expected[: len(found)] = found
    np.testing.assert_allclose(spectrum.singular_values(centred), expected, atol=1e-6)


def test_equal_energies_count_as_their_number() -> None:
    found = ranks(np.array([2.0, 2.0, 2.0, 2.0, 0.0, 0.0]))
    assert (found.participation, found.entropy, found.dimensions_99) == (pytest.approx(4), pytest.approx(4), 4)


def test_dimensions_that_hold_99_percent() -> None:
    assert ranks(np.sqrt([98.0, 1.0, 1.0])).dimensions_99 == 2
    assert ranks(np.sqrt([98.0, 0.9, 0.9, 0.2])).dimensions_99 == 3
    assert ranks(np.sqrt([1.0])).dimensions_99 == 1
    assert ranks(np.sqrt([3.0, 1.0])).participation == pytest.approx(16 / 10)


def test_no_latents_use_no_dimension() -> None:
    assert ranks(Spectrum(4).singular_values()) == ranks(Spectrum(4).singular_values(centred=True))
    assert ranks(Spectrum(4).singular_values()).dimensions_99 == 0
