"""Statistics over seeds: means, paired differences with 95 % intervals, and the rule that turns them into a verdict.

Runs are paired by seed (same data order and, where shapes allow, same initial weights), so the noise that two variants
share cancels in their difference. Intervals are Student's t on those differences; they cover the choice of the seed,
not of the held-out text, which all runs share. There is no correction for multiple comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Expectation = Literal["lower", "higher", "close"]
"""lower: below the baseline; higher: above it; close: not above it by more than the margin."""

Verdict = Literal["holds", "does not hold at this scale", "undecided"]

RULE = (
    "A comparison is a paired difference, variant minus baseline, with its 95 % interval over the seeds. «Lower» holds "
    "when the whole interval lies below zero and does not hold when it lies above; «higher» is the mirror image; "
    "«below a margin» holds when the whole interval lies below that margin and does not hold when it lies above it. In "
    "every other case a comparison is undecided. A claim holds when all of its comparisons hold, does not hold at this "
    "scale when any of them does not, and is undecided otherwise."
)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; infinite bounds for a single value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's t interval. Raises ValueError for no values or one not finite."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values are {list(values)}; an interval needs at least one, all finite")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def paired_difference(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Variant minus baseline, seed by seed. Raises ValueError where their seeds differ."""
    if variant.keys() != baseline.keys():
        raise ValueError(f"seeds are {sorted(variant)} and {sorted(baseline)}; a paired difference needs the same ones")
    return interval([variant[seed] - baseline[seed] for seed in sorted(variant)])


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution. Raises ImportError without scipy."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("the ablations need scipy and matplotlib: pip install 'fathom-lm[ablations]'") from error
    return float(t.ppf(0.975, degrees))


def judge(difference: Interval, expectation: Expectation, margin: float = 0.0) -> Verdict:
    """The verdict on one comparison; `margin` applies to «close» only."""
    low, high = difference.low, difference.high
    if expectation == "higher":
        low, high = -high, -low
    bound = margin if expectation == "close" else 0.0
    if high < bound:
        return "holds"
    return "does not hold at this scale" if low > bound else "undecided"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim from those on its comparisons. Raises ValueError if there are none."""
    if not verdicts:
        raise ValueError("a claim needs at least one comparison")
    if all(verdict == "holds" for verdict in verdicts):
        return "holds"
    return "does not hold at this scale" if "does not hold at this scale" in verdicts else "undecided"
