"""Generation: the cache changes nothing, drafting nothing but the number of forward passes.

Judges: the whole model run over every prefix, the module run over the finished text, exact enumeration.
"""

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.data.tokenizer import train_tokenizer
from fathom.infer import generate as room
from fathom.infer.generate import Generation, generate, generate_ids
from fathom.infer.sampler import SamplingParams, probabilities
from fathom.model.config import ModelConfig
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, tiny

PROMPTS = [[3], [1, 4, 1, 5, 0, 2], [2, 0], [6, 5, 3, 5]]
"""Of different lengths, one of a single token; ids fit a vocabulary of 7."""

CONFIGS: dict[str, dict[str, Any]] = {
    "one module": {},
    "two modules, no query rank": {"num_nextn_predict_layers": 2, "q_lora_rank": None},
    "dense layers, tied head": {"first_k_dense_replace": 3, "tie_word_embeddings": True},
}


def small_vocabulary(**changes: Any) -> ModelConfig:
    """Seven tokens, so that a module without training still guesses right now and then."""
    return tiny(**{"vocab_size": 7, "num_nextn_predict_layers": 1, **changes})


@torch.no_grad()
def greedy_without_cache(model: Model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits_BSO[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def drafts_judged_afterwards(model: Model, prompt: list[int], ids: list[int]) -> list[bool]:
    """Which of `ids` must be accepted drafts, by the module's guesses over the whole text at once."""
    tokens = prompt + ids
    out = model(torch.tensor([tokens]), mtp=True)
    assert out.mtp_logits is not None
    guesses = out.mtp_logits[0][0].argmax(-1).tolist()  # guesses[i] is for token i + 2
    mask, place = [False], len(prompt) + 1
    while place < len(tokens):
        right = guesses[place - 2] == tokens[place]
        mask += [True, False] if right else [False]
        place += 1 + right
    return mask[: len(ids)]


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_decoding_is_argmax_of_the_whole_model(changes: dict[str, Any]) -> None:
    model = lively_model(small_vocabulary(**changes), seed=11, std=0.25)
    plain = generate_ids(model, PROMPTS, 24, speculative=False)
    drafted = generate_ids(model, PROMPTS, 24)
    for prompt, one, two in zip(PROMPTS, plain, drafted, strict=True):
        assert one.ids == two.ids == greedy_without_cache(model, prompt, 24)
        assert one.finish_reason == two.finish_reason == "length"
        assert (one.forwards, one.drafted, one.accepted, one.tokens_per_forward) == (23, 0, 0, 1)
        assert math.isnan(one.acceptance)
        assert two.forwards == two.drafted
        # A pass decides one token, and one more after an accepted draft; the last may decide one too many.
        assert two.forwards + two.accepted - 23 in (0, 1)
    assert 0 < sum(g.accepted for g in drafted) < sum(g.drafted for g in drafted)
    assert len({token for g in plain for token in g.ids}) > 3, "continuations without variety prove little"


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_drafts_are_those_of_the_module_run_over_the_whole_text(changes: dict[str, Any]) -> None:
    """A wrong entry in the module's cache would show nowhere but in worse drafts."""
    model = lively_model(small_vocabulary(**changes), seed=4, std=0.25, dtype=torch.float64)
    for prompt, found in zip(PROMPTS, generate_ids(model, PROMPTS, 40), strict=True):
        assert found.accepted_mask == drafts_judged_afterwards(model, prompt, found.ids)
        assert found.accepted == sum(found.accepted_mask)
        assert found.acceptance == found.accepted / found.drafted
        assert found.tokens_per_forward == 39 / found.forwards


@settings(max_examples=12, deadline=None)
@given(model_configs(modules=(1, 2)), st.integers(0, 2**32 - 1))
def test_drafting_changes_no_greedy_token(config: ModelConfig, seed: int) -> None:
    model = lively_model(config, seed, std=0.25, dtype=torch.float64)
    prompts = [random_tokens(config, 1, length, seed)[0].tolist() for length in (1, 2, 9)]
    plain = generate_ids(model, prompts, 10, speculative=False)
    assert [g.ids for g in generate_ids(model, prompts, 10)] == [g.ids for g in plain]


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_rows(speculative: bool, temperature: float) -> None:
    """Rows that stop early and prompts of other lengths disturb no one; row r keeps its random numbers."""
    model = lively_model(small_vocabulary(), seed=2, std=0.25, dtype=torch.float64)
    params = SamplingParams(temperature, top_p=0.95, seed=5)
    together = generate_ids(model, PROMPTS, 20, params, speculative, stop_ids={4})
    assert len({len(g.ids) for g in together}) > 1, "rows must end at different times"
    for place, expected in enumerate(together):
        others: list[list[int]] = [[0, 6, 6]] * place + [PROMPTS[place]]
        assert generate_ids(model, others, 20, params, speculative, stop_ids={4})[place] == expected


def test_seeds_reproduce_and_differ() -> None:
    model = lively_model(small_vocabulary(), std=0.1)
    first, again, other = (
        [g.ids for g in generate_ids(model, [[1, 2]] * 2, 30, SamplingParams(1.0, seed=seed))] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert first[0] != first[1], "equal prompts in different rows draw from different numbers"


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_ends_at_a_stop_token_or_at_the_length(speculative: bool) -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    (whole,) = generate_ids(model, PROMPTS[1:2], 40, speculative=speculative)
    for stop in set(whole.ids):
        (found,) = generate_ids(model, PROMPTS[1:2], 40, speculative=speculative, stop_ids={stop})
        assert found.ids == whole.ids[: whole.ids.index(stop) + 1]
        assert found.accepted_mask == whole.accepted_mask[: len(found.ids)]
        assert found.finish_reason == "stop"
    for count in range(1, 8):
        (found,) = generate_ids(model, PROMPTS[1:2], count, speculative=speculative, stop_ids={99})
        assert (found.ids, found.finish_reason) == (whole.ids[:count], "length")
    (one,) = generate_ids(model, PROMPTS[1:2], 1, speculative=speculative)
    assert (one.forwards, one.drafted) == (0, 0) and math.isnan(one.tokens_per_forward)


def test_tokens_are_heard_as_they_are_decided() -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    heard: list[tuple[int, int]] = []
    found = generate_ids(model, PROMPTS, 9, on_token=lambda place, token: heard.append((place, token)))
    for place, generation in enumerate(found):
        assert [token for p, token in heard if p == place] == generation.ids
    assert [place for place, _ in heard[:4]] == [0, 1, 2, 3]


def test_a_model_without_modules_decodes_plainly() -> None:
    model = lively_model(small_vocabulary(num_nextn_predict_layers=0))
    assert generate_ids(model, PROMPTS, 9) == generate_ids(model, PROMPTS, 9, speculative=False)
    assert generate_ids(model, [], 9) == []


def test_prompts_are_expanded_and_decoding_is_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the shortest prompts, where a step's view is hardly longer than what it feeds."""
    model = lively_model(small_vocabulary())
    forms: list[tuple[str, int]] = []
    for form in ("expanded", "absorbed"):
        original = getattr(MultiHeadLatentAttention, form)

        def noted(self: Any, q_nope_BSHP: torch.Tensor, *rest: Any, form: str = form, original: Any = original) -> Any:
            forms.append((form, q_nope_BSHP.shape[1]))
            return original(self, q_nope_BSHP, *rest)

        monkeypatch.setattr(MultiHeadLatentAttention, form, noted)
    layers = model.config.num_hidden_layers
    for prompt in ([3], [3, 1], [3, 1, 4, 1, 5]):
        forms.clear()
        (found,) = generate_ids(model, [prompt], 12)
        prefill = [("expanded", len(prompt))] * (layers + 1)
        assert forms[: layers + 1] == prefill
        assert set(forms[layers + 1 :]) == {("absorbed", 2)}
        # The last pass needs no draft after it.
        assert len(forms) == (layers + 1) * (1 + found.forwards) - 1


def test_the_cache_has_the_weights_type_and_one_slot_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(room.LatentCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self.latents_LBTW)

    monkeypatch.setattr(room, "LatentCache", Noted)
    config = small_vocabulary()
    found = generate_ids(lively_model(config, dtype=torch.bfloat16), PROMPTS, 5)
    assert [len(g.ids) for g in found] == [5] * 4
    (latents_LBTW,) = made
    assert latents_LBTW.dtype == torch.bfloat16
    assert latents_LBTW.shape == (config.num_hidden_layers + 1, 4, 6 + 5, config.cache_width)


def test_training_goes_on_after_generating() -> None:
    """Nothing that generation computed without gradients may lie in the way of later ones."""
    model = lively_model(small_vocabulary(rope_theta=777.0))  # frequencies no test has computed before
    generate_ids(model, PROMPTS, 3)
    model(torch.tensor(PROMPTS[1:2]), mtp=True).logits_BSO.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


# ---------------------------------------------------------------------------------------------- distribution

CHAIN = 3
"""Tokens compared jointly: the prefill's, one that is drafted, and one that may follow an accepted draft."""

SETTINGS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_k=4, top_p=0.93, min_p=0.06, seed=2),
]


@torch.no_grad()
def exact_chances(model: Model, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The chance of every continuation of CHAIN tokens, from the whole model over every prefix."""
    every = list(product(range(model.config.vocab_size), repeat=CHAIN))
    logits_BSO = model(torch.tensor([[*prompt, *ids] for ids in every])).logits_BSO[:, len(prompt) - 1 : -1]
    probs_BSO = probabilities(logits_BSO.flatten(0, 1), params).unflatten(0, (-1, CHAIN)).double()
    chances_B = probs_BSO.gather(2, torch.tensor(every).unsqueeze(-1)).squeeze(-1).prod(-1)
    return dict(zip(every, chances_B.tolist(), strict=True))


def chi_square_excess(found: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its own 0.999 quantile (Wilson and Hilferty); rare outcomes share one cell."""
    total = sum(found.values())
    common = [ids for ids, chance in chances.items() if chance * total >= 5]
    cells = [(found[ids], chances[ids] * total) for ids in common]
    cells.append((total - sum(seen for seen, _ in cells), total - sum(due for _, due in cells)))
    cells = [(seen, due) for seen, due in cells if due > 1e-3]
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    freedom = len(cells) - 1
    assert freedom >= 15
    spread = 2 / (9 * freedom)
    return statistic / (freedom * (1 - spread + 3.0902 * spread**0.5) ** 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "speculative"),
    [(SETTINGS[1], False), (SETTINGS[0], True), (SETTINGS[1], True)],
    ids=["filtered", "drafted", "filtered and drafted"],
)
def test_samples_follow_the_main_models_distribution(params: SamplingParams, speculative: bool) -> None:
    config = small_vocabulary(vocab_size=5, num_hidden_layers=1, n_routed_experts=4, n_group=2)
    model, prompt, rows = lively_model(config, seed=8, std=0.14), [1, 3], 900
    generations = generate_ids(model, [prompt] * rows, CHAIN, params, speculative)
    chances = exact_chances(model, prompt, params)
    found = Counter(tuple(g.ids) for g in generations)
    assert all(chances[ids] > 0 for ids in found), "a filtered token was drawn"
    assert chi_square_excess(found, chances) < 1
    if speculative:
        # Both outcomes must be common, or the test says nothing about acceptance.
        assert 0.2 < sum(g.accepted for g in generations) / sum(g.drafted for g in generations) < 0.95
        # The statistic can tell: the accepted half alone is far from the distribution.
        biased = Counter(tuple(g.ids) for g in generations if g.accepted_mask[1])
        assert chi_square_excess(biased, chances) > 1.2


# ---------------------------------------------------------------------------------------------- text, errors


def test_text_in_text_out() -> None:
    text = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer([text * 3], 300)
    model = lively_model(small_vocabulary(vocab_size=tokenizer.vocab_size), seed=3)
    (expected,) = generate_ids(
        model,
        [[tokenizer.bos_id, *tokenizer.encode("the quick", bos=False)]],
        12,
        stop_ids=(tokenizer.eos_id,),
    )
    assert generate(model, tokenizer, "the quick", 12) == tokenizer.decode(expected.ids)
    sampled = [generate(model, tokenizer, "", 12, temperature=1.0, top_k=50, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty; it must hold at least one token"),
        ([[1, 7]], 4, r"prompt 0 holds token 7; ids must be below vocab_size \(7\)"),
        ([[-1]], 4, "prompt 0 holds token -1"),
        ([[1]], 0, "max_new_tokens is 0; it must be at least 1"),
        (
            [[1] * 120],
            9,
            r"prompt 0 has 120 tokens and max_new_tokens is 9; .* max_position_embeddings \(128\)",
        ),
    ],
)
def test_impossible_requests_are_named(prompts: list[list[int]], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(lively_model(small_vocabulary()), prompts, count)


def test_the_longest_request_fits() -> None:
    (found,) = generate_ids(lively_model(small_vocabulary()), [[1] * 120], 8)
    assert isinstance(found, Generation) and len(found.ids) == 8
