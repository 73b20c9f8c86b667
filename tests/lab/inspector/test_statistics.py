"""Lift, characteristic tokens and experts selected together: cases counted by hand, and simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.lab.inspector.statistics import PSEUDO_TOKENS, characteristic_tokens, class_lift, co_firing, taken


def took(rows: list[list[int]], experts: int) -> np.ndarray:
    return taken(np.array(rows, np.int16), experts)


def test_lift_of_a_class() -> None:
    # Four tokens, two of each class; expert 0 serves three of them.
    lifts_EG = class_lift(took([[0, 1], [0, 1], [0, 2], [1, 2]], 4), np.array([0, 0, 1, 1], np.uint8), 3)
    assert lifts_EG[0].tolist()[:2] == pytest.approx([1 / 0.75, 0.5 / 0.75])
    assert lifts_EG[2].tolist()[:2] == pytest.approx([0, 1 / 0.5])
    assert np.isnan(lifts_EG[3]).all(), "an expert that nobody took"
    assert np.isnan(lifts_EG[:, 2]).all(), "a class without tokens"


def test_characteristic_tokens_have_a_lift_above_1() -> None:
    # Token 7 always takes expert 0, token 8 never, token 9, seen twice, always.
    rows, tokens = [[0]] * 6 + [[1]] * 6 + [[0]] * 2, [7] * 6 + [8] * 6 + [9] * 2
    found = characteristic_tokens(took(rows, 3), np.array(tokens), most=5)
    rate, a = 8 / 14, PSEUDO_TOKENS
    assert [(t.token, t.seen, t.taken) for t in found[0]] == [(7, 6, 6)]
    assert found[0][0].lift == pytest.approx((6 + a * rate) / ((6 + a) * rate))
    assert [t.token for t in found[1]] == [8]
    assert found[2] == []
    assert [t.token for t in characteristic_tokens(took(rows, 3), np.array(tokens), most=5, least_seen=1)[0]] == [7, 9]
    assert [t.token for t in characteristic_tokens(took(rows, 3), np.array(tokens), most=1, least_seen=1)[0]] == [7]
    assert characteristic_tokens(np.zeros((0, 3), np.float32), np.array([], int), most=5) == [[], [], []]


def test_experts_that_are_always_selected_together() -> None:
    ratios_EE = co_firing(took([[0, 1], [2, 3]] * 5, 5))
    # Of the six pairs of four equally loaded experts two occur, each thrice as often as by chance.
    assert ratios_EE[0, 1] == ratios_EE[3, 2] == pytest.approx(3)
    assert ratios_EE[0, 2] == ratios_EE[1, 3] == 0
    assert np.isnan(ratios_EE[4]).all() and np.isnan(ratios_EE.diagonal()).all()


def test_one_expert_per_token_makes_no_pairs() -> None:
    assert np.isnan(co_firing(took([[0], [1], [1]], 2))).all()


def test_random_routing_selects_pairs_as_often_as_chance() -> None:
    generator = np.random.default_rng(0)
    rows = np.argsort(generator.random((40_000, 8)), axis=1)[:, :3].astype(np.int16)
    ratios_EE = co_firing(taken(rows, 8))
    assert np.nanmax(np.abs(ratios_EE - 1)) < 0.05


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_chance_has_as_many_pairs_as_there_were(experts: int, tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = np.argsort(generator.random((tokens, experts)) ** 3, axis=1)[:, :2].astype(np.int16)
    took_NE = taken(rows, experts)
    ratios_EE = co_firing(took_NE)
    np.testing.assert_array_equal(ratios_EE, ratios_EE.T)
    tokens_per_expert_E = took_NE.sum(0)
    chance_EE = np.where(np.isnan(ratios_EE), 0, np.outer(tokens_per_expert_E, tokens_per_expert_E))
    assert np.nansum(ratios_EE * chance_EE) == pytest.approx(chance_EE.sum())
