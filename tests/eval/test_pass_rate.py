"""pass@k and maj@k against the enumeration of all subsets, intervals against scipy and all resamples."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.eval.pass_rate import bootstrap, maj_at_k, paired_bootstrap, pass_at_k, wilson


@given(st.integers(1, 9), st.data())
@settings(max_examples=80, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_is_exact() -> None:
    """Through the product of 1 − k / i, as in the paper's code, in float64."""
    expected = 1 - math.prod(1 - 100 / i for i in range(1000 - 3 + 1, 1001))
    assert pass_at_k(1000, 3, 100) == pytest.approx(expected, rel=1e-12)
    assert pass_at_k(20_000, 1, 10_000) == 0.5


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over n samples of a known rate is 1 − (1 − p)^k; that of 1 − (1 − c/n)^k is not."""
    p, n, k = 0.2, 6, 4
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    biased = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(biased - mean) > 0.02


def majority(answers: Sequence[str | None], truth: set[str]) -> float:
    """One subset's chance to be right, by definition."""
    counts = Counter(answer for answer in answers if answer is not None)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(answer in truth for answer in best) / len(best) if best else 0.0


@given(
    st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=8),
    st.sets(st.sampled_from("abcd")),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_maj_at_k_is_the_mean_over_subsets(answers: list[str | None], truth: set[str], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    subsets = list(itertools.combinations(answers, k))
    expected = sum(majority(subset, truth) for subset in subsets) / len(subsets)
    assert maj_at_k(answers, [answer in truth for answer in answers], k) == pytest.approx(expected, abs=1e-14)


def test_maj_at_k_of_one_sample_is_the_rate() -> None:
    answers = ["a"] * 3 + ["b"] * 5 + [None] * 2
    assert maj_at_k(answers, [answer == "a" for answer in answers], 1) == pytest.approx(0.3)
    assert maj_at_k(answers, [answer == "a" for answer in answers], 10) == 0.0
    assert maj_at_k(["a"] * 40 + ["b"] * 24, [True] * 40 + [False] * 24, 64) == 1.0


@pytest.mark.parametrize(("solved", "problems"), [(0, 7), (7, 7), (3, 11), (250, 500), (1, 500)])
def test_wilsons_interval_is_scipys(solved: int, problems: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(solved, problems).proportion_ci(0.95, method="wilson")
    found = wilson(solved, problems)
    assert (found.value, found.low, found.high) == pytest.approx((solved / problems, *expected), abs=1e-12)


def test_the_bootstrap_of_few_problems_is_that_of_all_resamples() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.125]
    means = [sum(resample) / 5 for resample in itertools.product(values, repeat=5)]
    found = bootstrap(values, seed=3)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.value == pytest.approx(sum(values) / 5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_the_bootstrap_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(1)
    values = [draw.choice([0, 0.125, 0.5, 1]) for _ in range(300)]
    expected = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=5).confidence_interval
    found = bootstrap(values)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.004)
    assert bootstrap(values) == found
    assert bootstrap(values, seed=1) != found


def test_pairs_are_compared_problem_by_problem() -> None:
    """Two models that differ a little on very different problems: the paired interval is far narrower."""
    draw = random.Random(2)
    baseline = [draw.random() for _ in range(200)]
    values = [value + 0.01 * draw.random() for value in baseline]
    paired = paired_bootstrap(values, baseline)
    assert 0 < paired.low < paired.value < paired.high < 0.01
    assert bootstrap(values).high - bootstrap(values).low > 20 * (paired.high - paired.low)
    swapped = paired_bootstrap(baseline, values)
    assert swapped.value == pytest.approx(-paired.value)
    with pytest.raises(ValueError, match="200 and 199 values"):
        paired_bootstrap(values, baseline[1:])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 draws of 100 problems with a known mean; percentile intervals cover a little less than 95 % (here 94.5 %)."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        found = bootstrap(generator.choice([0.0, 0.5, 1.0], size=100, p=[0.5, 0.3, 0.2]).tolist(), seed)
        covered += found.low <= 0.35 <= found.high
    assert abs(covered / 400 - 0.945) < 4 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, 5, 1), "5 of 4 samples"),
        (lambda: pass_at_k(4, 2, 5), "k is 5"),
        (lambda: pass_at_k(4, 2, 0), "k is 0"),
        (lambda: maj_at_k(["a", "b"], [True, False], 3), "k is 3"),
        (lambda: maj_at_k(["a", "a"], [True, False], 1), "'a' is right in one sample and wrong"),
        (lambda: wilson(3, 2), "3 of 2 problems"),
        (lambda: wilson(0, 0), "0 of 0 problems"),
        (lambda: bootstrap([]), "at least one"),
        (lambda: bootstrap([1.0, math.nan]), "all finite"),
    ],
)
def test_what_cannot_be_computed_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
