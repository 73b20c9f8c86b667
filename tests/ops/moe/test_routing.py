"""Choosing experts in one pass against the definition: the same sets, whatever the grouping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops.moe import select_experts, select_experts_reference


def scores(tokens: int, experts: int, seed: int) -> Tensor:
    """Distinct scores, negative ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)]).float() - experts / 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(2, 9), st.data(), st.integers(0, 2**32 - 1))
def test_one_pass_equals_the_reference(tokens: int, groups: int, members: int, data: st.DataObject, seed: int) -> None:
    topk_group = data.draw(st.integers(1, groups))
    choices = data.draw(st.integers(1, topk_group * members))
    scores_NE = scores(tokens, groups * members, seed)
    found = select_experts(scores_NE, choices, groups, topk_group).sort(-1).values
    expected = select_experts_reference(scores_NE, choices, groups, topk_group).sort(-1).values
    if len({float(v) for v in _group_scores(scores_NE, groups)}) == tokens * groups:  # groups without ties
        assert torch.equal(found, expected)
    assert all(len(set(row)) == choices and min(row) >= 0 for row in found.tolist())


def _group_scores(scores_NE: Tensor, groups: int) -> Tensor:
    sums_NG = scores_NE.unflatten(1, (groups, -1)).topk(2).values.sum(-1)
    return (sums_NG + 1e4 * torch.arange(len(sums_NG))[:, None]).flatten()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_still_give_valid_experts(poison: float) -> None:
    """The loss turns non-finite and the step is skipped; until then every id must be valid."""
    scores_NE = scores(6, 8, 0)
    scores_NE[::2] = poison
    scores_NE[1, 3] = poison
    for groups, topk_group in ((1, 1), (4, 2), (2, 2)):
        ids_NK = select_experts(scores_NE, 3, groups, topk_group)
        assert ((ids_NK >= 0) & (ids_NK < 8)).all()
        assert all(len(set(row)) == 3 for row in ids_NK.tolist())
