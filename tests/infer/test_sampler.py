"""Filters against their slow definitions; draws hit each token in proportion, and nothing disturbs them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.infer.sampler import ACCEPT, DRAFT, TOKEN, SamplingParams, draw, probabilities, uniforms

logits = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=1, max_size=9)


def slow_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, one token at a time in Python floats."""
    weights = {token: math.exp(logit / params.temperature) for token, logit in enumerate(logits)}
    if params.top_k:
        ordered = sorted(weights.values(), reverse=True)
        worst = ordered[min(params.top_k, len(ordered)) - 1]
        weights = {token: weight for token, weight in weights.items() if weight >= worst}
    total, reached, kept = sum(weights.values()), 0.0, {}
    for token in sorted(weights, key=lambda token: (-weights[token], token)):
        # 1 means no limit, also where the last tokens are too unlikely to move the sum.
        if params.top_p == 1 or reached / total < params.top_p:
            kept[token] = weights[token]
        reached += weights[token]
    best = max(kept.values())
    kept = {token: weight for token, weight in kept.items() if weight >= params.min_p * best}
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))]


@settings(max_examples=300, deadline=None)
@given(
    logits,
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 10),
    # Numbers that no sum of probabilities hits, so that rounding decides nothing.
    st.sampled_from([0.0101, 0.31731, 0.90417, 1.0]),
    st.sampled_from([0.0, 0.05077, 0.73131]),
)
def test_filters_follow_their_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p)
    found_BO = probabilities(torch.tensor([logits, logits[::-1]]), params)
    assert found_BO.dtype == torch.float32
    for found_O, values in zip(found_BO, (logits, logits[::-1]), strict=True):
        expected = slow_probabilities(values, params)
        assert [p > 0 for p in found_O.tolist()] == [p > 0 for p in expected]
        assert found_O.tolist() == pytest.approx(expected, abs=1e-6)


@given(logits)
def test_greedy_takes_the_likeliest_whatever_the_filters_say(logits: list[float]) -> None:
    (found_O,) = probabilities(torch.tensor([logits]), SamplingParams(top_k=3, top_p=0.5, min_p=0.2))
    assert found_O.tolist() == [float(token == logits.index(max(logits))) for token in range(len(logits))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e30])
def test_extreme_logits_and_temperatures_stay_finite(dtype: torch.dtype, temperature: float) -> None:
    logits_BO = torch.tensor([[3e38, -3e38, 0.0], [-torch.inf, 5.0, -torch.inf]], dtype=dtype)
    found_BO = probabilities(logits_BO, SamplingParams(temperature, top_p=0.9))
    assert found_BO.isfinite().all()
    assert torch.allclose(found_BO.sum(-1), torch.ones(2))
    assert found_BO[1].tolist() == [0, 1, 0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any))
def test_draws_invert_the_cumulative_distribution(weights: list[int]) -> None:
    """A fine grid of numbers hits every token exactly in proportion to its weight; 1 itself is included."""
    cells = 8 * sum(weights)
    grid_B = torch.arange(1, cells + 1) / cells
    ids_B = draw(torch.tensor([weights]).float().expand(cells, -1), grid_B.double())
    # A number on the border of two cells may fall to either side by rounding.
    counts = ids_B.bincount(minlength=len(weights))
    assert all(abs(count - 8 * weight) <= 1 for count, weight in zip(counts.tolist(), weights, strict=True))
    assert all(weights[token] for token in ids_B.tolist())
    assert ids_B.tolist() == sorted(ids_B.tolist())


def test_the_smallest_and_largest_numbers_draw_possible_tokens() -> None:
    weights_BO = torch.tensor([[0.0, 0.3, 0.0, 0.1, 0.0]]).expand(2, -1)
    assert draw(weights_BO, torch.tensor([2.0**-53, 1.0], dtype=torch.float64)).tolist() == [1, 3]


def test_uniforms_depend_on_seed_sequence_position_and_purpose_alone() -> None:
    whole_BTU = uniforms(7, [0, 1, 2], [0, 0, 0], 20)
    assert whole_BTU.shape == (3, 20, 3)
    part_BTU = uniforms(7, [2, 0], [5, 11], 4)
    assert torch.equal(part_BTU[0], whole_BTU[2, 5:9]) and torch.equal(part_BTU[1], whole_BTU[0, 11:15])
    every = torch.cat((whole_BTU.flatten(), uniforms(8, [0], [0], 20).flatten()))
    assert every.unique().numel() == every.numel()
    assert {DRAFT, ACCEPT, TOKEN} == {0, 1, 2}


def test_uniforms_are_uniform_and_independent() -> None:
    u_NU: Tensor = uniforms(2**64 - 1, range(40), [0] * 40, 500).flatten(0, 1)
    assert u_NU.min() > 0 and u_NU.max() <= 1
    counts_U10 = torch.stack([(u_N * 10).ceil().long().bincount(minlength=11)[1:] for u_N in u_NU.T])
    # 20000 numbers, 10 cells: the 0.9999 quantile of chi-square with 9 degrees of freedom is 33.7.
    assert (((counts_U10 - 2000) ** 2 / 2000).sum(1) < 33.7).all()
    assert (torch.corrcoef(u_NU.T) - torch.eye(3)).abs().max() < 4 / 20000**0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_impossible_parameters_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value}; it must be "):
        SamplingParams(**{field: value})
