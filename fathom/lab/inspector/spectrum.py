"""How much of the latent's width is used: the singular values of all cached latents, computed incrementally.

Only the sum and the C × C Gram matrix of a layer's N latents are kept, in float64: the singular values of the N × C
matrix are the square roots of the Gram matrix's eigenvalues.

Shapes: N latents, C latent rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Spectrum:
    """The Gram matrix of one layer's latents."""

    def __init__(self, rank: int) -> None:
        self._gram_CC = np.zeros((rank, rank))
        self._sum_C = np.zeros(rank)
        self._count = 0

    def add(self, c_NC: Tensor) -> None:
        """Add N latents."""
        wide_NC = c_NC.to("cpu", torch.float64).numpy()
        self._gram_CC += wide_NC.T @ wide_NC
        self._sum_C += wide_NC.sum(0)
        self._count += len(wide_NC)

    def singular_values(self, centred: bool = False) -> NDArray[np.float64]:
        """All C of them, largest first; `centred`: after subtracting the mean latent."""
        gram_CC = self._gram_CC
        if centred and self._count:
            gram_CC = gram_CC - np.outer(self._sum_C, self._sum_C) / self._count
        # Rounding can make an eigenvalue that is zero a little negative.
        return np.sqrt(np.linalg.eigvalsh(gram_CC).clip(0))[::-1]


@dataclass(frozen=True)
class Ranks:
    """The effective number of dimensions of a spectrum, by three measures; energy is the square of a singular value."""

    participation: float
    """(Σ energy)² / Σ energy²: equal energies in n dimensions give n."""
    entropy: float
    """exp of the entropy of the energies' shares."""
    dimensions_99: int
    """The fewest dimensions that hold 99 % of the energy."""


def ranks(singular_values: NDArray[np.float64]) -> Ranks:
    """Of a spectrum, largest value first; 0 without any energy."""
    energies = np.square(singular_values)
    if not energies.sum():
        return Ranks(0.0, 0.0, 0)
    shares = energies / energies.sum()
    present = shares[shares > 0]
    return Ranks(
        participation=float(1 / np.square(shares).sum()),
        entropy=float(np.exp(-(present * np.log(present)).sum())),
        # Just below 0.99, so that a sum that rounds down to it does not need one dimension more.
        dimensions_99=int(np.searchsorted(np.cumsum(shares), 0.99 - 1e-12)) + 1,
    )
