"""The formulas for bubbles against schedules run event by event."""

from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.lab.planner.layout import Layout
from fathom.lab.planner.schedule import Chunks, bubble, busy, pairs, stages
from tests.lab.planner.pipelines import dualpipe, interleaved, makespan, one_forward_one_backward, zero_bubble

durations = st.builds(
    lambda forward, inputs, weights: Chunks(forward, inputs + weights, weights, forward + inputs + weights),
    *[st.floats(0.5, 2.0)] * 3,
)


def seconds(chunks: Chunks, share: float = 1.0) -> dict[str, float]:
    inputs = chunks.backward - chunks.weights
    parts = {"F": chunks.forward, "B": chunks.backward, "I": inputs, "W": chunks.weights, "FB": chunks.pair}
    return {name: share * value for name, value in parts.items()}


def step(layout: Layout, chunks: Chunks, micro_batches: int) -> float:
    return busy(layout, chunks, micro_batches) + bubble(layout, chunks)


@given(durations, st.integers(1, 8), st.integers(0, 12))
def test_1f1b(chunks: Chunks, ranks: int, more: int) -> None:
    count = ranks + more
    layout = Layout(pipeline=ranks)
    simulated = makespan(one_forward_one_backward(ranks, count), seconds(chunks), ranks)
    assert step(layout, chunks, count) == pytest.approx(simulated)


@given(durations, st.integers(2, 6), st.integers(2, 3), st.integers(1, 3))
def test_interleaved(chunks: Chunks, ranks: int, pieces: int, rounds: int) -> None:
    layout = Layout(pipeline=ranks, schedule="interleaved", chunks=pieces)
    orders = interleaved(ranks, pieces, rounds * ranks)
    simulated = makespan(orders, seconds(chunks, 1 / pieces), ranks * pieces)
    assert step(layout, chunks, rounds * ranks) == pytest.approx(simulated)


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 9), (8, 20), (16, 64)])
def test_zero_bubble(ranks: int, count: int) -> None:
    chunks = Chunks(1.0, 2.0, 1.0, 3.0)  # the halves of equal length, for which the schedule was made
    layout = Layout(pipeline=ranks, schedule="zb1p")
    assert step(layout, chunks, count) == makespan(zero_bubble(ranks, count), seconds(chunks), ranks)


@pytest.mark.parametrize(("ranks", "count"), [(4, 8), (4, 16), (8, 20), (16, 120)])
def test_dualpipe(ranks: int, count: int) -> None:
    layout = Layout(pipeline=ranks, schedule="dualpipe")
    orders = dualpipe(ranks, count)
    for order in orders:  # the simulated schedule is whole
        done = Counter(part[0] for operation in order for part in operation)
        assert done["F"] == done["B"] + done["I"] == count
        assert done["I"] == done["W"]
    assert pairs(layout, count) == min(sum(len(operation) == 2 for operation in order) for order in orders)
    even = Chunks(1.0, 2.0, 1.0, 3.0)
    assert step(layout, even, count) == makespan(orders, seconds(even), ranks)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.7, 1.0), st.floats(0.8, 1.2))
def test_dualpipe_with_overlap(hidden: float, weights: float) -> None:
    """If a pair takes less than its two chunks separately, the formula of the report is within 3 % of a step."""
    chunks = Chunks(1.1, 2.2, weights, 3.3 * hidden)
    layout = Layout(pipeline=16, schedule="dualpipe")
    simulated = makespan(dualpipe(16, 120), seconds(chunks), 16)
    assert step(layout, chunks, 120) == pytest.approx(simulated, rel=0.03)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_stages_minimise_the_most_expensive_one(costs: list[int], count: int) -> None:
    found = stages(tuple(map(float, costs)), count)
    assert [place for run in found for place in run] == list(range(len(costs)))
    assert len(found) == count
    # Brute force: every way to place the cuts.
    ways = combinations(range(len(costs) + count - 1), count - 1)
    best = min(max(sum(costs[a:b]) for a, b in _pieces(cuts, len(costs))) for cuts in ways)
    assert max(sum(costs[place] for place in run) for run in found) == best


def _pieces(cuts: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    bounds = [0, *(cut - index for index, cut in enumerate(cuts)), size]
    return list(pairwise(bounds))
