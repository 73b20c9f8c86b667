"""Batches of unlike requests: each gets what plain decoding with its own parameters would give it.

Shapes: B rows, N positions, O vocabulary, S prompt positions.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import SampledTokens, SamplingState, draft, prompt_logprobs, verify

SIZE = 5


@dataclass
class Chain:
    """A toy model: the next logits depend on the last token alone."""

    logits_OO: Tensor

    def after(self, tokens: list[int]) -> Tensor:
        return self.logits_OO[tokens]


def chains(seed: int, noise: float = 1.0) -> tuple[Chain, Chain]:
    """A model and a drafter that more or less resembles it."""
    generator = torch.Generator().manual_seed(seed)
    model_OO = torch.randn(SIZE, SIZE, generator=generator) * 1.5
    return Chain(model_OO), Chain(model_OO + noise * torch.randn(SIZE, SIZE, generator=generator))


def slow_distribution(logits: list[float], row: SamplingState, tokens: list[int]) -> list[float]:
    """What plain decoding draws from after `tokens`: every step of the definition, in Python floats."""
    params, output, values = row.params, tokens[row.prompt_length :], list(logits)
    for token in range(len(values)):
        values[token] += params.logit_bias.get(token, 0)
        if token in tokens:
            values[token] *= 1 / params.repetition_penalty if values[token] > 0 else params.repetition_penalty
        values[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        if token in row.banned_until_min and len(output) < params.min_tokens:
            values[token] = -math.inf
    if params.temperature == 0:
        return [float(token == values.index(max(values))) for token in range(len(values))]
    weights = [math.exp(value / params.temperature) for value in values]
    if params.top_k:
        weights = [weight if weight >= sorted(weights)[-params.top_k] else 0 for weight in weights]
    total = sum(weights)
    if params.top_p < 1:
        likelier = [sum(other for other in weights if other > weight) / total for weight in weights]
        weights = [weight if before < params.top_p else 0 for weight, before in zip(weights, likelier, strict=True)]
    weights = [weight if weight >= params.min_p * max(weights) else 0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def continuations(model: Chain, row: SamplingState, length: int) -> dict[tuple[int, ...], float]:
    """Every continuation that plain decoding may say, with its chance."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for said, chance in found.items():
            tokens = [*row.tokens, *said]
            after = slow_distribution(model.after(tokens[-1:])[0].tolist(), row, tokens)
            longer.update({(*said, token): chance * p for token, p in enumerate(after) if p > 0})
        found = longer
    return found


def add_draft(drafter: Chain, rows: list[SamplingState]) -> None:
    """One more draft for each of the rows."""
    ids = draft(drafter.after([[*row.tokens, *row.drafts][-1] for row in rows]), rows)
    for row, token in zip(rows, ids, strict=True):
        row.drafts.append(token)


def continue_rows(model: Chain, drafter: Chain | None, rows: list[SamplingState], length: int) -> list[tuple[int, ...]]:
    """`length` tokens for every row, with 0, 1 or 2 drafts per step, as many as its stream and the step say."""
    said: list[list[int]] = [[] for _ in rows]
    for step in range(length):
        going = [r for r in range(len(rows)) if len(said[r]) < length]
        now = {r: replace(rows[r], tokens=[*rows[r].tokens, *said[r]], drafts=[]) for r in going}
        for count in (1, 2):
            if drafter and (drafting := [row for row in now.values() if (row.stream + step) % 3 >= count]):
                add_draft(drafter, drafting)
        fed = [token for row in now.values() for token in [row.tokens[-1], *row.drafts]]
        if fed:
            for r, decision in zip(going, verify(model.after(fed), list(now.values())), strict=True):
                assert decision.tokens[: decision.accepted] == now[r].drafts[: decision.accepted]
                said[r] += decision.tokens
    return [tuple(tokens[:length]) for tokens in said]


def surprise(found: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Chi-square as standard deviations of a normal number (Wilson and Hilferty); rare outcomes share a cell."""
    total, rare = found.total(), [outcome for outcome, chance in chances.items() if chance * found.total() < 5]
    cells = [(found[outcome], chances[outcome] * total) for outcome in chances if outcome not in rare]
    if rare:
        cells.append((sum(found[outcome] for outcome in rare), sum(chances[outcome] for outcome in rare) * total))
    statistic, freedom = sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


SAMPLED = [
    SamplingParams(1.0),
    SamplingParams(0.8, top_k=4, min_p=0.06, repetition_penalty=1.5),
    SamplingParams(1.3, top_p=0.87, presence_penalty=1.2, frequency_penalty=0.9),
    SamplingParams(1.1, logit_bias={2: 0.9, 0: -0.7}, frequency_penalty=-0.8, min_tokens=2),
    SamplingParams(0.7, top_p=0.95, min_p=0.02, repetition_penalty=0.7, presence_penalty=-0.9, min_tokens=1),
]


def test_sampled_continuations_follow_plain_sampling_whatever_is_drafted() -> None:
    """Unlike requests in one batch, their drafts ragged: every outcome as often as enumeration says."""
    model, drafter = chains(3)
    copies = 800
    rows = [
        SamplingState(replace(params, seed=7), stream, [1, 3], 2, (4,))
        for stream, params in enumerate(params for _ in range(copies) for params in SAMPLED)
    ]
    said = continue_rows(model, drafter, rows, 3)
    assert said == continue_rows(model, None, rows, 3)
    for case, params in enumerate(SAMPLED):
        chances = continuations(model, rows[case], 3)
        found = Counter(said[case :: len(SAMPLED)])
        assert set(found) <= set(chances), params
        assert abs(surprise(found, chances)) < 3.3, params


numbers = st.sampled_from
requests = st.builds(
    SamplingParams,
    temperature=numbers([0.0, 0.0, 0.9]),
    top_k=numbers([0, 3]),
    top_p=numbers([1.0, 0.8]),
    min_p=numbers([0.0, 0.1]),
    repetition_penalty=numbers([1.0, 1.3]),
    presence_penalty=numbers([0.0, 0.4]),
    frequency_penalty=numbers([0.0, 0.7]),
    logit_bias=numbers([{}, {}, {1: 2.5}]),
    min_tokens=numbers([0, 0, 2]),
    seed=st.integers(0, 9),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_gets_the_same_tokens_alone_and_among_others(requests: list[SamplingParams], seed: int) -> None:
    """And greedy rows those of plain greedy decoding."""
    model, drafter = chains(seed)
    rows = [SamplingState(params, 3 * r + seed, [r % SIZE, 2], 1, (4, 0)) for r, params in enumerate(requests)]
    together = continue_rows(model, drafter, rows, 5)
    for row, said in zip(rows, together, strict=True):
        assert continue_rows(model, drafter, [row], 5) == [said]
        if row.params.temperature == 0:
            assert {said: 1.0} == continuations(model, row, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_drafts_stay_up_to_the_first_that_differs(dtype: torch.dtype) -> None:
    logits_NO = torch.nn.functional.one_hot(torch.tensor([4, 2, 3, 0, 1, 1]), SIZE).to(dtype)
    before_NO = logits_NO.clone()
    plain = SamplingParams()
    rows = [
        SamplingState(plain, 0, [0], 1, drafts=[4, 1]),  # says 4, then 2
        SamplingState(plain, 1, [0], 1),  # says 0
        SamplingState(plain, 2, [0], 1, drafts=[1]),  # says 1, then 1
    ]
    assert verify(logits_NO, rows) == [
        SampledTokens([4, 2], 1, None),
        SampledTokens([0], 0, None),
        SampledTokens([1, 1], 1, None),
    ]
    rows[1].params = SamplingParams(logit_bias={0: -1.0, 3: 0.5})
    assert verify(logits_NO, rows)[1] == SampledTokens([3], 0, None)
    assert torch.equal(logits_NO, before_NO)
    assert verify(logits_NO[:0], []) == []


def test_drafts_of_a_perfect_drafter_are_accepted() -> None:
    """With the model itself for a drafter no draft is refused, sampled or not, whatever else is in force."""
    model, _ = chains(11)
    params = [*SAMPLED, SamplingParams(), SamplingParams(repetition_penalty=1.7, min_tokens=3)]
    rows = [SamplingState(p, stream, [2, 2, 0], 2, (4,)) for stream, p in enumerate(params * 20)]
    for _ in range(3):
        add_draft(model, rows)
    fed = [token for row in rows for token in [row.tokens[-1], *row.drafts]]
    assert [decision.accepted for decision in verify(model.after(fed), rows)] == [3] * len(rows)


def test_drafts_differ_from_position_to_position_and_stream_to_stream() -> None:
    """A thousand draws from a flat distribution that were the same draw would be one token."""
    flat = Chain(torch.zeros(SIZE, SIZE))
    rows = [SamplingState(SamplingParams(1.0), stream, [0] * (1 + stream % 10), 1) for stream in range(500)]
    for _ in range(2):
        add_draft(flat, rows)
    pairs = Counter(tuple(row.drafts) for row in rows)
    assert abs(surprise(pairs, {(a, b): 1 / SIZE**2 for a in range(SIZE) for b in range(SIZE)})) < 3.3


def test_log_probabilities_are_the_models_own() -> None:
    """Before any processing, for as many likeliest tokens as each row asks for."""
    generator = torch.Generator().manual_seed(5)
    logits_NO = torch.randn(7, 40, generator=generator)
    best = logits_NO.argmax(-1).tolist()
    rows = [
        SamplingState(SamplingParams(logprobs=2), 0, [0], 1, drafts=[best[0], best[1]]),
        SamplingState(SamplingParams(), 1, [0], 1),
        SamplingState(SamplingParams(1.0, logit_bias={7: 100.0}, logprobs=0), 2, [0], 1),
        SamplingState(SamplingParams(logit_bias={7: 100.0}, logprobs=20), 3, [0], 1, drafts=[8]),
    ]
    decisions = verify(logits_NO, rows)
    assert [decision.tokens for decision in decisions] == [best[:3], best[3:4], [7], [7]]
    assert decisions[1].logprobs is None
    expected_NO = logits_NO.double().log_softmax(-1)
    for row, decision, first in zip(rows, decisions, (0, 3, 4, 5), strict=True):
        for place, (token, fact) in enumerate(zip(decision.tokens, decision.logprobs or [], strict=False), first):
            assert fact.logprob == pytest.approx(expected_NO[place, token].item(), abs=1e-5)
            ordered = expected_NO[place].argsort(descending=True).tolist()
            assert fact.rank == ordered.index(token) + 1
            assert [i for i, _ in fact.top] == ordered[: row.params.logprobs]
            assert [p for _, p in fact.top] == pytest.approx(expected_NO[place, ordered[: len(fact.top)]].tolist())
    assert [len(decision.logprobs or []) for decision in decisions] == [3, 0, 1, 1]


@pytest.mark.parametrize("length", [0, 1, 256, 700])
def test_prompt_log_probabilities_of_any_length(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    logits_SO = torch.randn(length, 9, generator=generator)
    following_S = torch.randint(9, (length,), generator=generator)
    found = prompt_logprobs(logits_SO, following_S, 20)
    assert len(found) == length
    for logits_O, token, fact in zip(logits_SO, following_S.tolist(), found, strict=True):
        expected = logits_O.log_softmax(-1).tolist()
        assert fact.logprob == pytest.approx(expected[token], abs=1e-6)
        assert fact.rank == 1 + sum(value > expected[token] for value in expected)
        assert [i for i, _ in fact.top] == sorted(range(9), key=lambda i: -expected[i])


def test_what_does_not_fit_together_is_refused() -> None:
    rows = [SamplingState(SamplingParams(1.0), 0, [0], 1, drafts=[1])]
    with pytest.raises(ValueError, match=r"logits_NO has 3 positions; the requests with their drafts need 2"):
        verify(torch.zeros(3, SIZE), rows)


def test_the_statistic_notices_a_wrong_distribution() -> None:
    """The judge above is worth something: slightly wrong chances fail where right ones pass."""
    chances = {(token,): chance for token, chance in enumerate((0.1, 0.2, 0.3, 0.4))}
    right = Counter((token,) for token in random.Random(0).choices(range(4), (0.1, 0.2, 0.3, 0.4), k=3000))
    wrong = Counter((token,) for token in random.Random(0).choices(range(4), (0.13, 0.2, 0.3, 0.37), k=3000))
    assert abs(surprise(right, chances)) < 3.3 < surprise(wrong, chances)
