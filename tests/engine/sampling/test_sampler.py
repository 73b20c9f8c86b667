"""Penalties and filters against their slow definitions; draws hit each token in proportion, undisturbed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.engine.sampling import sampler
from fathom.engine.sampling.sampler import (
    SamplingParams,
    apply_logits_processors,
    check_against,
    draw,
    exponential_noise,
    probabilities,
)

logits = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=1, max_size=9)


def slow_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, one token at a time in Python floats."""
    weights = {token: math.exp(logit / params.temperature) for token, logit in enumerate(logits)}
    if params.top_k:
        ordered = sorted(weights.values(), reverse=True)
        worst = ordered[min(params.top_k, len(ordered)) - 1]
        weights = {token: weight for token, weight in weights.items() if weight >= worst}
    total, kept = sum(weights.values()), {}
    for token, weight in weights.items():
        likelier = sum(other for other in weights.values() if other > weight)
        # 1 means no limit, also where the last tokens are too unlikely to move the sum.
        if params.top_p == 1 or likelier / total < params.top_p:
            kept[token] = weight
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


@pytest.mark.parametrize("candidates", [1, 3, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1 - 1e-9])
def test_top_p_is_the_same_with_few_candidates_and_with_the_sorted_vocabulary(
    monkeypatch: pytest.MonkeyPatch, candidates: int, top_p: float
) -> None:
    """Coarse logits tie in masses; sharp and flat rows stand in one batch."""
    generator = torch.Generator().manual_seed(candidates)
    spread_B1 = torch.tensor([[8.0], [0.3], [2.0], [0.0], [30.0]])
    logits_BO = (torch.randn(5, 300, generator=generator) * spread_B1).round(decimals=1).bfloat16()
    params = SamplingParams(1.0, top_p=top_p)
    monkeypatch.setattr(sampler, "_CANDIDATES", 300)
    expected_BO = probabilities(logits_BO, params)
    monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
    assert torch.equal(probabilities(logits_BO, params), expected_BO)
    for logits_O, expected_O in zip(logits_BO, expected_BO, strict=True):
        assert torch.equal(probabilities(logits_O[None], params)[0], expected_O)


ids = st.integers(0, 5)
processing = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.6, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.35, -0.8]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32)),
    min_tokens=st.integers(0, 6),
)


def slow_adjust(logits: list[float], params: SamplingParams, tokens: list[int], prompt: int, banned: set[int]) -> Any:
    """The definition, one token at a time in Python floats."""
    output, found = tokens[prompt:], []
    for token, value in enumerate(logits):
        value += params.logit_bias.get(token, 0.0)
        if token in tokens:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        found.append(-math.inf if token in banned and len(output) < params.min_tokens else value)
    return found


@settings(max_examples=200, deadline=None)
@given(processing, st.lists(ids, max_size=6), st.integers(0, 6), st.lists(ids, max_size=3), st.sets(ids), st.data())
def test_each_position_counts_the_drafts_before_it(
    params: SamplingParams, tokens: list[int], prompt: int, drafts: list[int], banned: set[int], data: st.DataObject
) -> None:
    prompt = min(prompt, len(tokens))
    row = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=6, max_size=6)
    logits = data.draw(st.lists(row, min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    logits_TO = torch.tensor(logits)
    found_TO = apply_logits_processors(logits_TO, params, tokens, prompt, drafts, tuple(banned))
    assert logits_TO.tolist() == logits
    for place, values in enumerate(logits):
        history = tokens + drafts[:place]
        expected = slow_adjust(values, params, history, prompt, banned)
        assert found_TO[place].tolist() == pytest.approx(expected, abs=1e-4)
        # To the last bit what plain decoding computes at that place, and what a drafter computes there.
        plain_1O = apply_logits_processors(logits_TO[place : place + 1], params, history, prompt, [], tuple(banned))
        drafter_1O = apply_logits_processors(
            logits_TO[place : place + 1], params, tokens, prompt, drafts[:place], tuple(banned)
        )
        assert torch.equal(found_TO[place], plain_1O[0]) and torch.equal(found_TO[place], drafter_1O[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adjusted_logits_are_at_least_float32(dtype: torch.dtype) -> None:
    found_TO = apply_logits_processors(
        torch.ones(1, 3, dtype=dtype), SamplingParams(repetition_penalty=3.0), [1], 1, [], ()
    )
    assert found_TO.dtype == torch.promote_types(dtype, torch.float32)
    assert found_TO.tolist()[0] == pytest.approx([1, 1 / 3, 1])


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(4))
def test_processing_agrees_with_transformers(seed: int) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)
    logits_BO = torch.randn(6, 2000, generator=generator) * torch.tensor([1.0, 2, 3, 5, 8, 13])[:, None]
    ids_BS = torch.randint(2000, (6, 300), generator=generator)
    temperature, top_k, top_p, min_p, repetition = [
        (0.7, 50, 0.8, 0.01, 1.3),
        (1.0, 0, 0.95, 0.0, 0.8),
        (1.6, 400, 0.31, 0.1, 1.0),
        (1.2, 1999, 1.0, 0.003, 2.0),
    ][seed]
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(repetition),
        processors.TemperatureLogitsWarper(temperature),
        *([processors.TopKLogitsWarper(top_k)] if top_k else []),
        processors.TopPLogitsWarper(top_p),
        processors.MinPLogitsWarper(min_p),
    ]
    theirs_BO = logits_BO
    for processor in chain:
        theirs_BO = processor(ids_BS, theirs_BO)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition)
    parts = zip(logits_BO.split(1), ids_BS.tolist(), strict=True)
    ours_BO = probabilities(
        torch.cat([apply_logits_processors(part, params, tokens, 100, [], ()) for part, tokens in parts]), params
    )
    assert torch.equal(ours_BO > 0, theirs_BO.softmax(-1) > 0)
    assert torch.allclose(ours_BO, theirs_BO.softmax(-1), atol=1e-7, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any), st.integers(0, 2**64 - 1))
def test_draws_follow_the_weights(weights: list[int], seed: int) -> None:
    """As often as each weight says, by chi-square; what has none is never drawn."""
    draws = 4000
    numbers_NO = torch.stack([exponential_noise(seed, 3, position, len(weights)) for position in range(draws)])
    ids_N = draw(torch.tensor(weights).float().expand(draws, -1), numbers_NO)
    counts = ids_N.bincount(minlength=len(weights)).tolist()
    due = [draws * weight / sum(weights) for weight in weights]
    assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)
    statistic = sum((count - each) ** 2 / each for count, each in zip(counts, due, strict=True) if each)
    # The 0.99999 quantile of chi-square with 7 degrees of freedom, 6 or fewer are below it.
    assert statistic < 34.1


def test_a_race_depends_on_seed_sequence_and_position_alone() -> None:
    every = [
        exponential_noise(seed, sequence, position, 50)
        for seed in (7, 8)
        for sequence in (0, 1)
        for position in (0, 1, 9)
    ]
    assert torch.stack(every).unique().numel() == 50 * len(every)
    assert torch.equal(exponential_noise(7, 1, 9, 50), every[5])
    # A longer vocabulary gives the tokens that it shares the same numbers.
    assert torch.equal(exponential_noise(7, 1, 9, 80)[:50], every[5])


def test_what_hardly_ever_wins_does_not_win() -> None:
    """Of 40 million races of tokens with a chance of 1e-13 each against one of the rest."""
    probs_NO = torch.full((1, 1 << 20), 1e-13)
    probs_NO[0, 0] = 1
    assert all(draw(probs_NO, exponential_noise(5, 0, position, 1 << 20)[None]).item() == 0 for position in range(40))


def test_races_are_exponential_and_independent() -> None:
    numbers_NO = torch.stack(
        [exponential_noise(2**64 - 1, sequence, at, 4) for sequence in range(40) for at in range(500)]
    )
    shares_NO = 1 - (-numbers_NO).exp()
    counts_O10 = torch.stack([(u_N * 10).floor().long().bincount(minlength=10) for u_N in shares_NO.T])
    # 20000 numbers, 10 cells: the 0.9999 quantile of chi-square with 9 degrees of freedom is 33.7.
    assert (((counts_O10 - 2000) ** 2 / 2000).sum(1) < 33.7).all()
    assert (torch.corrcoef(shares_NO.T) - torch.eye(4)).abs().max() < 4.5 / 20000**0.5


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
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.01),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"3": 0.0}),
        ("seed", -1),
        ("seed", 2**64),
        ("stop_ids", (-1,)),
        ("stop_ids", [1]),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 1.0),
    ],
)
def test_impossible_parameters_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}; it must be ")


def test_ids_are_checked_against_the_vocabulary() -> None:
    params = SamplingParams(logit_bias={9: 1.0}, stop_ids=(8,))
    check_against(params, 10)
    with pytest.raises(ValueError, match=r"^logit_bias names token 9; ids must be below vocab_size \(9\)"):
        check_against(params, 9)
    with pytest.raises(ValueError, match=r"^stop_ids names token 8; .*vocab_size \(8\)"):
        check_against(replace(params, logit_bias={}), 8)


def test_parameters_are_values_and_flags() -> None:
    params = SamplingParams(0.5, logit_bias={4: -1.5, 7: 2.0}, stop_ids=(1, 2), logprobs=0, ignore_eos=True)
    assert {params: 1}[replace(params)] == 1 and replace(params, logit_bias={}) != params
    words = "--temperature 0.5 --logit-bias 4 -1.5 7 2 --stop-ids 1 2 --logprobs 0 --ignore-eos"
    assert tyro.cli(SamplingParams, args=words.split()) == params
    assert tyro.cli(SamplingParams, args=[]) == SamplingParams()
