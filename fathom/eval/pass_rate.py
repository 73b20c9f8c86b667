"""Statistics of problems that are solved or not: pass@k, maj@k, and intervals.

- pass@k: the probability that at least one of k samples is right, unbiased from n ≥ k: 1 − C(n−c, k) / C(n, k) with c
  right ones (Chen et al., arXiv 2107.03374, section 2.1).
- maj@k: the probability that the most frequent answer of k samples is right (self-consistency, arXiv 2203.11171), ties
  broken at random; here over all subsets of k, as for pass@k.
- Wilson's interval for a rate of independent problems, each solved or not.
- Bootstrap intervals over problems: the samples of a problem depend on each other, so whole problems are drawn. Two
  models on the same problems are compared problem by problem, and the noise that they share cancels.

All intervals cover the choice of the problems, not that of the training run.

Shapes: P problems, R resamples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95
_RESAMPLES = 10_000
_CHUNK = 500
"""Resamples that are in memory at one time."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k of these samples, drawn without replacement, is right.

    Raises ValueError unless 0 ≤ right ≤ samples and 1 ≤ k ≤ samples.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} samples are right; it must be from 0 to all of them")
    _check_k(k, samples)
    return float(1 - Fraction(math.comb(samples - right, k), math.comb(samples, k)))


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """The probability that the most frequent answer of k of these samples is right, ties broken at random.

    None is a sample without an answer, which does not vote; without any vote nothing is right. Raises ValueError where
    the same answer is right in one sample and wrong in another, or unless 1 ≤ k ≤ samples.
    """
    _check_k(k, len(answers))
    verdicts = {answer: verdict for answer, verdict in zip(answers, right, strict=True) if answer is not None}
    for answer, verdict in zip(answers, right, strict=True):
        if answer is not None and verdict != verdicts[answer]:
            raise ValueError(f"the answer {answer!r} is right in one sample and wrong in another")
    counts = Counter(answer for answer in answers if answer is not None)
    silent = len(answers) - counts.total()
    ways = Fraction(0)
    for winner in (answer for answer, verdict in verdicts.items() if verdict):
        others = [count for answer, count in counts.items() if answer != winner]
        for votes in range(1, min(counts[winner], k) + 1):
            won = _ways_to_win(others, silent, votes, k - votes)
            ways += math.comb(counts[winner], votes) * won
    return float(ways / math.comb(len(answers), k))


def _ways_to_win(others: Sequence[int], silent: int, votes: int, rest: int) -> Fraction:
    """In how many ways `rest` further samples give no other answer more than `votes`.

    A way in which t others have as many counts 1 / (1 + t). Samples without an answer may be chosen in any number.
    """
    ways = {(0, 0): 1}  # of the answers so far: by samples chosen, and answers that tie
    for count in others:
        extended: dict[tuple[int, int], int] = Counter()
        for (chosen, ties), number in ways.items():
            for own in range(min(count, votes, rest - chosen) + 1):
                extended[chosen + own, ties + (own == votes)] += number * math.comb(count, own)
        ways = extended
    parts = (
        Fraction(number * math.comb(silent, rest - chosen), 1 + ties)
        for (chosen, ties), number in ways.items()
    )  # fmt: skip
    return sum(parts, Fraction(0))


def wilson(solved: int, problems: int) -> Interval:
    """The rate of solved problems with Wilson's score interval. Raises ValueError unless 0 ≤ solved ≤ problems > 0."""
    if not 0 <= solved <= problems or problems < 1:
        raise ValueError(f"{solved} of {problems} problems are solved; it must be from 0 to all of at least one")
    z, rate = NormalDist().inv_cdf((1 + _LEVEL) / 2), solved / problems
    center = (rate + z * z / (2 * problems)) / (1 + z * z / problems)
    half = z / (1 + z * z / problems) * math.sqrt(rate * (1 - rate) / problems + z * z / (4 * problems * problems))
    return Interval(rate, max(0.0, center - half), min(1.0, center + half))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of a value per problem, with the percentile interval over resampled problems.

    Where all values are equal, the interval has no width: the bootstrap sees no other problem. Raises ValueError for
    no values or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values are {list(values)}; there must be at least one, all finite")
    values_P = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(_resampled_means(values_P, seed), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(values_P.mean()), float(low), float(high))


def paired_bootstrap(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Interval:
    """The mean difference, `values` minus `baseline`, of two models on the same problems, as by `bootstrap`.

    Raises ValueError where their numbers differ.
    """
    if len(values) != len(baseline):
        raise ValueError(f"there are {len(values)} and {len(baseline)} values; a pair needs both on each problem")
    return bootstrap([own - other for own, other in zip(values, baseline, strict=True)], seed)


def _resampled_means(values_P: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means (R) of as many problems, drawn with replacement."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    shape = (_CHUNK, len(values_P))
    means = [values_P[generator.integers(len(values_P), size=shape)].mean(-1) for _ in range(_RESAMPLES // _CHUNK)]
    return np.concatenate(means)


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; it must be from 1 to the number of samples, {samples}")
