"""Drafts that agree are accepted, often enough; drafting stops where it loses."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.engine.sampling.sampler import draw, exponential_noise
from fathom.engine.speculative import DraftLength, accept


def distributions(size: int = 5) -> st.SearchStrategy[Tensor]:
    """Probabilities with zeros among them."""
    weights = st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any)
    return weights.map(lambda w: torch.tensor(w).float() / sum(w))


@settings(max_examples=25, deadline=None)
@given(distributions(), distributions(), st.integers(0, 99))
def test_drafter_and_model_mostly_draw_the_same(q_O: Tensor, p_O: Tensor, seed: int) -> None:
    """At least as often as the bound that the module's first lines give."""
    rows = 3000
    numbers_BO = torch.stack([exponential_noise(seed, 0, position, len(p_O)) for position in range(rows)])
    agreed = (draw(q_O.expand(rows, -1), numbers_BO) == draw(p_O.expand(rows, -1), numbers_BO)).float().mean().item()
    distance = (p_O - q_O).abs().sum().item() / 2
    assert agreed >= (1 - distance) / (1 + distance) - 4 * (0.25 / rows) ** 0.5
    assert agreed <= 1 - distance + 4 * (0.25 / rows) ** 0.5  # nothing can do better


@given(st.lists(st.integers(0, 1), max_size=4), st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_greedy_accepts_the_agreeing_beginning(drafts: list[int], likeliest: list[int]) -> None:
    count = accept(drafts, likeliest)
    assert drafts[:count] == likeliest[:count]
    assert count == len(drafts) or drafts[count] != likeliest[count]


class Workload:
    """Steps of known costs and acceptance, fed to a DraftLength; noise and the odd very slow step included."""

    def __init__(self, most: int, batch: int, seed: int) -> None:
        self.length, self.batch, self.random = DraftLength(most), batch, random.Random(seed)

    def run(self, steps: int, seconds: Sequence[float], chances: Sequence[float]) -> tuple[Counter[int], float]:
        """How often each length was chosen, and tokens per second as a share of the best length's."""
        chosen: Counter[int] = Counter()
        for _ in range(steps):
            drafts = self.length.choose(self.batch)
            chosen[drafts] += 1
            accepted_at = [0] * drafts
            for _ in range(self.batch):
                for place in range(drafts):
                    if self.random.random() >= chances[place]:
                        break
                    accepted_at[place] += 1
            slow = 20 if self.random.random() < 0.01 else 1
            took = seconds[drafts] * slow * (1 + 0.05 * abs(self.random.gauss(0, 1)))
            self.length.record(self.batch, accepted_at, took)
        tokens = list(accumulate(accumulate(chances, mul), initial=1.0))
        best = max(t / s for t, s in zip(tokens, seconds, strict=True))
        whole = sum(tokens[n] * count for n, count in chosen.items())
        return chosen, whole / sum(seconds[n] * count for n, count in chosen.items()) / best


@pytest.mark.parametrize("batch", [1, 6, 32])
@pytest.mark.parametrize(
    ("seconds", "chances", "best"),
    [
        ((1, 1.1, 1.2, 1.3), (0.85, 0.8, 0.75), 3),
        ((1, 1.15, 1.3, 2.2), (0.85, 0.75, 0.6), 2),
        ((1, 1.2, 1.6, 2.2), (0.8, 0.4, 0.3), 1),
        ((1, 1.5, 2.0, 2.5), (0.3, 0.3, 0.3), 0),
        ((1, 2.0, 3.0, 4.0), (0.0, 0.0, 0.0), 0),
        ((1, 1.9, 2.9, 3.9), (0.85, 0.8, 0.8), 0),
    ],
)
def test_the_best_length_is_found_at_little_cost(
    batch: int, seconds: Sequence[float], chances: Sequence[float], best: int
) -> None:
    chosen, efficiency = Workload(3, batch, seed=batch).run(2000, seconds, chances)
    assert chosen[best] > 0.9 * 2000
    assert efficiency > 0.985


def test_slow_first_steps_do_not_decide() -> None:
    """An engine's first steps find cold caches: plain ones then looked worse than drafting was ever going to be."""
    workload, chances = Workload(4, 1, seed=1), (0.85, 0.8, 0.75, 0.75)
    workload.run(3, (2.5,) * 5, chances)
    workload.run(200, (1, 1.9, 2.8, 3.7, 4.6), chances)
    chosen, efficiency = workload.run(400, (1, 1.9, 2.8, 3.7, 4.6), chances)
    assert chosen[0] > 0.9 * 400 and efficiency > 0.98


def test_each_batch_size_has_its_own_best_length() -> None:
    """Drafts are nearly free for one row and dear for many."""
    workload, chosen = Workload(2, 1, seed=0), {}
    for batch, seconds in [(1, (1, 1.05, 1.1)), (64, (1, 1.9, 2.8))] * 2:
        workload.batch = batch
        chosen[batch] = workload.run(500, seconds, (0.8, 0.7))[0].most_common(1)[0][0]
    assert chosen == {1: 2, 64: 0}


@pytest.mark.parametrize("batch", [1, 8])
def test_drafting_stops_and_returns_with_acceptance(batch: int) -> None:
    workload, seconds = Workload(2, batch, seed=4), (1, 1.3, 1.6)
    good, bad = (0.9, 0.85), (0.05, 0.05)
    assert workload.run(500, seconds, good)[0].most_common(1)[0][0] == 2
    workload.run(300, seconds, bad)
    chosen, efficiency = workload.run(4000, seconds, bad)
    assert chosen[0] > 0.97 * 4000 and efficiency > 0.99
    # The longest wait for a look is 1024 steps.
    workload.run(1200, seconds, good)
    chosen, efficiency = workload.run(1000, seconds, good)
    assert chosen[2] > 0.9 * 1000 and efficiency > 0.98


def test_only_costs_make_drafting_hopeless_and_only_after_long() -> None:
    dear = Workload(2, 1, seed=3)
    dear.run(50, (1.0, 2.4, 3.9), (0.9, 0.9))
    assert not dear.length.is_unprofitable(1)  # tried a few times
    dear.run(1500, (1.0, 2.4, 3.9), (0.9, 0.9))
    assert dear.length.is_unprofitable(1)
    rejected = Workload(2, 1, seed=3)
    rejected.run(1500, (1.0, 1.7, 2.6), (0.1, 0.1))
    assert not rejected.length.is_unprofitable(1)  # another text may be easier to draft
    dear.batch = 8
    dear.run(1500, (1.0, 1.3, 1.7), (0.8, 0.8))
    assert not dear.length.is_unprofitable(1)  # with eight rows it pays
    assert not DraftLength(0).is_unprofitable(1)


def test_costs_that_change_are_noticed() -> None:
    """Longer contexts: verification, once dear, is free beside attention; and back again."""
    workload, chances = Workload(1, 4, seed=9), (0.6,)
    dear, cheap = (1, 1.9), (2.0, 2.2)
    assert workload.run(1000, dear, chances)[0].most_common(1)[0][0] == 0
    workload.run(2000, cheap, chances)
    assert workload.run(500, cheap, chances)[0].most_common(1)[0][0] == 1
    workload.run(2000, dear, chances)
    assert workload.run(500, dear, chances)[0].most_common(1)[0][0] == 0


def test_choosing_changes_nothing_and_depends_on_the_records_alone() -> None:
    one, other = Workload(3, 2, seed=1), Workload(3, 2, seed=1)
    for _ in range(200):
        for _ in range(3):
            assert other.length.choose(2) == one.length.choose(2)
            other.length.choose(50)
        one.run(1, (1, 1.2, 1.5, 1.9), (0.7, 0.6, 0.5))
        other.run(1, (1, 1.2, 1.5, 1.9), (0.7, 0.6, 0.5))


def test_draft_lengths_stay_within_bounds() -> None:
    """Whatever is recorded, other lengths than the chosen and steps without drafts included."""
    for most in range(3):
        length, chance = DraftLength(most), random.Random(most)
        for _ in range(500):
            batch, drafts = chance.randint(1, 40), chance.randint(0, most)
            assert 0 <= length.choose(batch) <= most
            length.record(batch, [0] * drafts, chance.random() + 0.01)
