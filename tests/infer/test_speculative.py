"""Accepted tokens follow exactly the target, whatever the drafter's distribution; drafting stops where it loses."""

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

from fathom.infer.sampler import draw
from fathom.infer.speculative import DraftLength, accept, accept_greedy

GRID = 48


def distributions(size: int = 5) -> st.SearchStrategy[Tensor]:
    """Probabilities with zeros among them."""
    weights = st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any)
    return weights.map(lambda w: torch.tensor(w).float() / sum(w))


@settings(max_examples=40, deadline=None)
@given(distributions(), distributions())
def test_tokens_follow_the_target(q_O: Tensor, p_O: Tensor) -> None:
    """Summed over every draft with its probability and a grid of both random numbers."""
    size = len(q_O)
    grid_G = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    draft_B, judge_B, token_B = torch.cartesian_prod(torch.arange(size).double(), grid_G, grid_G).T
    rows, ids_B1 = len(draft_B), draft_B.long()[:, None]
    target_BTO = p_O.expand(rows, 2, -1)
    uniforms_BT = torch.stack((token_B, token_B), dim=1)
    found = accept(ids_B1, q_O.expand(rows, 1, -1), target_BTO, judge_B[:, None], uniforms_BT)
    first_B = torch.where(found.counts_B == 1, ids_B1[:, 0], found.next_ids_B)
    weight_B = q_O[ids_B1[:, 0]].double() / GRID**2
    found_O = torch.zeros(size, dtype=torch.float64).index_add(0, first_B, weight_B)
    assert (found_O - p_O).abs().max() <= 2 / GRID
    assert not found_O[p_O == 0].any()


def test_several_drafts_leave_the_joint_distribution_alone() -> None:
    """Three tokens of a chain whose next distribution depends on the last token, drafted by another chain.

    Where a step decides fewer than three, the rest is drawn plainly, so all 64 outcomes have known chances.
    """
    rows, size = 40000, 4
    generator = torch.Generator().manual_seed(1)
    p_OO, q_OO = (torch.rand(size, size, generator=generator).pow(2) for _ in range(2))
    p_OO[:, 1] *= torch.tensor([0, 1, 1, 1])
    p_OO, q_OO = p_OO / p_OO.sum(1, keepdim=True), q_OO / q_OO.sum(1, keepdim=True)
    uniforms_BU = 1 - torch.rand(rows, 10, generator=generator, dtype=torch.float64)

    first_B = draw(q_OO[0].expand(rows, -1), uniforms_BU[:, 0])
    second_B = draw(q_OO[first_B], uniforms_BU[:, 1])
    drafts_BM = torch.stack((first_B, second_B), dim=1)
    draft_BMO = torch.stack((q_OO[0].expand(rows, -1), q_OO[first_B]), dim=1)
    target_BTO = torch.stack((p_OO[0].expand(rows, -1), p_OO[first_B], p_OO[second_B]), dim=1)
    counts_B, next_B = accept(drafts_BM, draft_BMO, target_BTO, uniforms_BU[:, 2:4], uniforms_BU[:, 4:7])
    assert counts_B.unique().tolist() == [0, 1, 2]

    tokens_B3 = torch.cat((drafts_BM, next_B[:, None]), dim=1).scatter(1, counts_B[:, None], next_B[:, None])
    for place in (1, 2):
        plain_B = draw(p_OO[tokens_B3[:, place - 1]], uniforms_BU[:, 7 + place])
        tokens_B3[:, place] = torch.where(counts_B < place, plain_B, tokens_B3[:, place])
    found_C = (tokens_B3 @ torch.tensor([16, 4, 1])).bincount(minlength=64)
    chances_C = (p_OO[0][:, None, None] * p_OO[:, :, None] * p_OO[None]).flatten()
    assert not found_C[chances_C == 0].any()
    possible_C = chances_C > 0
    expected_C = chances_C[possible_C] * rows
    statistic = ((found_C[possible_C] - expected_C) ** 2 / expected_C).sum()
    # At most 63 degrees of freedom: the 0.999 quantile of chi-square is 103.4.
    assert statistic < 103.4


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 7), min_size=1, max_size=6))
def test_one_hot_distributions_are_greedy_decoding(rows: list[tuple[int, ...]]) -> None:
    """Three drafts, four targets: the drafts that agree, then the next target, whatever the numbers."""
    ids_B7 = torch.tensor(rows)
    hot_B7O = torch.nn.functional.one_hot(ids_B7, 4).float()
    for u in (2.0**-53, 0.5, 1.0):
        judge_BM, token_BT = (torch.full((len(rows), n), u, dtype=torch.float64) for n in (3, 4))
        counts_B, next_B = accept(ids_B7[:, :3], hot_B7O[:, :3], hot_B7O[:, 3:], judge_BM, token_BT)
        for row, count, token in zip(rows, counts_B.tolist(), next_B.tolist(), strict=True):
            drafts, targets = row[:3], row[3:]
            agreeing = [*(d == t for d, t in zip(drafts, targets, strict=False)), False].index(False)
            assert (count, token) == (agreeing, targets[agreeing])


def test_without_drafts_it_is_plain_sampling() -> None:
    probs_BTO = torch.rand(50, 1, 6)
    uniforms_BT = 1 - torch.rand(50, 1, dtype=torch.float64)
    none_BM = torch.zeros(50, 0, dtype=torch.int64)
    found = accept(none_BM, torch.zeros(50, 0, 6), probs_BTO, uniforms_BT[:, :0], uniforms_BT)
    assert not found.counts_B.any()
    assert torch.equal(found.next_ids_B, draw(probs_BTO[:, 0], uniforms_BT[:, 0]))


def test_broken_drafts_do_no_harm() -> None:
    """A draft that its own drafter gives no chance is none: the token comes from what else the target may say."""
    ids_BM, q_BMO = torch.tensor([[0], [0]]), torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    target_BTO = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    ones_BT = torch.ones(2, 2, dtype=torch.float64)
    counts_B, next_B = accept(ids_BM, q_BMO, target_BTO, ones_BT[:, :1], ones_BT)
    assert counts_B.tolist() == [0, 0]
    # In row 1 the rest p − q is empty: the token comes from p.
    assert next_B.tolist() == [0, 1]


@given(st.lists(st.integers(0, 1), max_size=4), st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_greedy_accepts_the_agreeing_beginning(drafts: list[int], likeliest: list[int]) -> None:
    count = accept_greedy(drafts, likeliest)
    assert drafts[:count] == likeliest[:count]
    assert count == len(drafts) or drafts[count] != likeliest[count]


def test_rows_with_fewer_drafts_fill_up_with_zeros() -> None:
    """Padded, every row decides what it decides by itself."""
    rows, most, size = 300, 3, 4
    generator = torch.Generator().manual_seed(2)
    p_BTO = torch.rand(rows, most + 1, size, generator=generator).pow(2)
    q_BMO = torch.rand(rows, most, size, generator=generator)
    p_BTO, q_BMO = p_BTO / p_BTO.sum(-1, keepdim=True), q_BMO / q_BMO.sum(-1, keepdim=True)
    ids_BM = torch.randint(size, (rows, most), generator=generator)
    judge_BM, token_BT = (1 - torch.rand(rows, n, generator=generator, dtype=torch.float64) for n in (most, most + 1))
    lengths = [b % (most + 1) for b in range(rows)]
    padded = [part.clone() for part in (ids_BM, q_BMO, p_BTO)]
    for b, length in enumerate(lengths):
        padded[0][b, length:], padded[1][b, length:], padded[2][b, length + 1 :] = 0, 0, 0
    counts_B, next_B = accept(*padded, judge_BM, token_BT)
    assert (counts_B == torch.tensor(lengths)).any() and (counts_B < torch.tensor(lengths)).any()
    for b, n in enumerate(lengths):
        own = slice(b, b + 1)
        alone = accept(ids_BM[own, :n], q_BMO[own, :n], p_BTO[own, : n + 1], judge_BM[own, :n], token_BT[own, : n + 1])
        assert (alone.counts_B.item(), alone.next_ids_B.item()) == (counts_B[b].item(), next_B[b].item())


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
            self.length.record(self.batch, drafts, self.batch, accepted_at, took)
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
    """Whatever is recorded, other lengths than the chosen and steps without drafting rows included."""
    for most in range(3):
        length, chance = DraftLength(most), random.Random(most)
        for _ in range(500):
            batch, drafts = chance.randint(1, 40), chance.randint(0, most)
            assert 0 <= length.choose(batch) <= most
            length.record(batch, drafts, 0, [0] * drafts, chance.random() + 0.01)
    with pytest.raises(ValueError, match="most is -1; it must be at least 0"):
        DraftLength(-1)
    with pytest.raises(ValueError, match="accepted_at has 1 numbers for 2 drafts"):
        DraftLength(2).record(1, 2, 1, [1], 0.1)
    with pytest.raises(ValueError, match=r"accepted_at has 2 numbers for 2 drafts.* at most 1"):
        DraftLength(1).record(1, 2, 1, [1, 0], 0.1)
