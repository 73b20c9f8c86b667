"""The acceptance rule returns exactly the target distribution, whatever the drafter's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.infer.sampler import draw
from fathom.infer.speculative import accept

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
    """A draft its own drafter gives no chance: taken where the target may say it, else replaced."""
    ids_BM, q_BMO = torch.tensor([[0], [0]]), torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    target_BTO = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    ones_BT = torch.ones(2, 2, dtype=torch.float64)
    counts_B, next_B = accept(ids_BM, q_BMO, target_BTO, ones_BT[:, :1], ones_BT)
    assert counts_B.tolist() == [1, 0]
    # In row 1 the rest p − q is empty: the token comes from p.
    assert next_B.tolist() == [1, 1]
