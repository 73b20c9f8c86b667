"""Statistics of routing: the classes and tokens that are routed to each expert, and experts selected together.

Pure functions of a router's top-k ids. The lift of an expert for some tokens is how often these are routed to it, over
how often all tokens are: 1 is average, 2 twice as often.

Shapes: N tokens, K experts per token, E experts, G classes, V distinct tokens.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PSEUDO_TOKENS = 8.0
"""Pseudocount: average tokens added to the occurrences of a token, so that rare tokens have no large lift by chance."""


class Characteristic(NamedTuple):
    """A token that is routed to an expert more often than the average token."""

    token: int
    seen: int
    """How often it occurs in the text."""
    taken: int
    """How often it was routed to the expert."""
    lift: float
    """Smoothed."""


def taken(experts_NK: NDArray[np.int16], experts: int) -> NDArray[np.float32]:
    """1 where a token was routed to an expert, (N, E)."""
    took_NE = np.zeros((len(experts_NK), experts), np.float32)
    np.put_along_axis(took_NE, experts_NK.astype(np.int64), 1.0, axis=1)
    return took_NE


def class_lift(took_NE: NDArray[np.float32], classes_N: NDArray[np.uint8], classes: int) -> Floats:
    """(E, G): the lift of each expert for each class; NaN for a class or an expert without tokens."""
    rate_E = _rates(took_NE)
    lifts_EG = np.full((took_NE.shape[1], classes), np.nan)
    for kind in np.unique(classes_N):
        rate_of_class_E = _rates(took_NE[classes_N == kind])
        np.divide(rate_of_class_E, rate_E, out=lifts_EG[:, kind], where=rate_E > 0)
    return lifts_EG


def characteristic_tokens(
    took_NE: NDArray[np.float32], tokens_N: NDArray[np.int64], most: int, least_seen: int = 3
) -> list[list[Characteristic]]:
    """For each expert the tokens of highest lift above 1, at most `most`, among those seen `least_seen` times.

    A token seen n times and routed m times to expert e has the lift (m + a·r) / ((n + a)·r), r being the expert's
    rate over all tokens and a = `PSEUDO_TOKENS`.
    """
    if not len(tokens_N):
        return [[] for _ in range(took_NE.shape[1])]
    order_N = np.argsort(tokens_N, kind="stable")
    ids_V, firsts_V, seen_V = np.unique(tokens_N[order_N], return_index=True, return_counts=True)
    taken_VE = np.add.reduceat(took_NE[order_N], firsts_V, axis=0)
    rate_E = _rates(took_NE)
    found: list[list[Characteristic]] = []
    for expert, rate in enumerate(rate_E):
        if rate == 0:
            found.append([])
            continue
        lift_V = (taken_VE[:, expert] + PSEUDO_TOKENS * rate) / ((seen_V + PSEUDO_TOKENS) * rate)
        lift_V[seen_V < least_seen] = 0.0
        best = np.argsort(-lift_V, kind="stable")[:most]
        found.append(
            [
                Characteristic(int(ids_V[v]), int(seen_V[v]), int(taken_VE[v, expert]), float(lift_V[v]))
                for v in best
                if lift_V[v] > 1
            ]
        )
    return found


def co_firing(took_NE: NDArray[np.float32]) -> Floats:
    """(E, E): how often two experts are selected for the same token, relative to chance; NaN on the diagonal.

    Chance draws the same number of pairs in proportion to the product of both experts' loads. NaN also where an expert
    was never selected, and everywhere for one expert per token.
    """
    together_EE = (took_NE.T @ took_NE).astype(np.float64)
    tokens_per_expert_E = together_EE.diagonal().copy()
    chance_EE = np.outer(tokens_per_expert_E, tokens_per_expert_E)
    np.fill_diagonal(together_EE, 0.0)
    np.fill_diagonal(chance_EE, 0.0)
    pairs = together_EE.sum()
    if not pairs:
        return np.full_like(chance_EE, np.nan)
    chance_EE *= pairs / chance_EE.sum()
    return np.divide(together_EE, chance_EE, out=np.full_like(chance_EE, np.nan), where=chance_EE > 0)


def _rates(took_NE: NDArray[np.float32]) -> Floats:
    """The share of the tokens routed to each expert; 0 without tokens."""
    return took_NE.sum(0, dtype=np.float64) / max(1, len(took_NE))
