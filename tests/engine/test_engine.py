"""The engine: caching, paging, batching, preempting and drafting change no token.

Judges: the whole model run over every prefix, the drafting module run over the finished text, plain torch for the
compiled step.
"""

import math
import random
from typing import Any

import pytest
import torch

from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.engine.config import EngineConfig
from fathom.engine.detokenizer import IncrementalDetokenizer
from fathom.engine.engine import Engine
from fathom.engine.generate import generate
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.speculative import DraftLength
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.ops import cpu
from tests.model.configs import lively_model, tiny

native = pytest.mark.skipif(not cpu.available(), reason=f"the kernels are not built: {cpu.missing()}")
CONFIGS: dict[str, dict[str, Any]] = {
    "one module": {},
    "two modules, no query rank": {"num_nextn_predict_layers": 2, "q_lora_rank": None},
    "dense layers, tied head": {"first_k_dense_replace": 3, "tie_word_embeddings": True},
}


def small_vocabulary(**changes: Any) -> ModelConfig:
    """Seven tokens, so that a module without training still guesses right now and then."""
    return tiny(**{"vocab_size": 7, "num_nextn_predict_layers": 1, "max_position_embeddings": 256, **changes})


def some_prompts(config: ModelConfig, count: int, seed: int) -> list[list[int]]:
    """Ragged ones; two begin alike and two are the same."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(rng.randint(1, 50))] for _ in range(count - 2)]
    return [*prompts, prompts[0] * 2 + [1, 2], prompts[0] * 2 + [1, 2]]


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


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    found = [engine.submit(Request(prompt, params, stream=place)) for place, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert engine.pool.available == engine.pool.pages, "a page was leaked"
    return found


def greedy(count: int, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **others)


@pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_decoding_is_argmax_of_the_whole_model(changes: dict[str, Any], eager: bool) -> None:
    model = lively_model(small_vocabulary(**changes), seed=11, std=0.25)
    prompts = some_prompts(model.config, 7, seed=3)
    expected = [greedy_without_cache(model, prompt, 24) for prompt in prompts]
    assert len({token for ids in expected for token in ids}) > 3, "continuations without variety prove little"
    for speculative in (False, 1, 3, True):
        for cache_tokens in (None, 176):
            engine = Engine(
                model,
                speculative=speculative,
                max_batch=5,
                page_size=8,
                cache_tokens=cache_tokens,
                prefill_budget=16,
                eager=eager,
            )
            found = run(engine, prompts, greedy(24))
            assert [generation.token_ids for generation in found] == expected
            assert all(generation.finish_reason == "length" for generation in found)
            assert engine.pool.matched_tokens > 0, "equal beginnings must be found again"
            if cache_tokens:
                assert engine.scheduler.preemptions > 0, "so small a cache must preempt"
            if speculative in (1, 3):
                accepted, drafted = sum(g.accepted for g in found), sum(g.drafted for g in found)
                assert 0 < accepted < drafted


@native
def test_ten_thousand_tokens_are_the_same_with_drafts() -> None:
    """Alone, among 32 and with any number of drafts, in float32."""
    model = lively_model(small_vocabulary(max_position_embeddings=512), seed=11, std=0.25)
    prompts = some_prompts(model.config, 32, seed=9)
    alone = [run(Engine(model, speculative=False), [prompt], greedy(313))[0].token_ids for prompt in prompts]
    assert sum(map(len, alone)) > 10_000
    for speculative in (1, 2, True):
        found = run(Engine(model, speculative=speculative, max_batch=32), prompts, greedy(313))
        assert [generation.token_ids for generation in found] == alone


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])
def test_drafts_are_those_of_the_module_run_over_the_whole_text(changes: dict[str, Any], eager: bool) -> None:
    """A wrong entry in the module's cache would show nowhere but in worse drafts."""
    model = lively_model(small_vocabulary(**changes), seed=4, std=0.25)
    prompts = some_prompts(model.config, 6, seed=8)
    engine = Engine(model, speculative=1, max_batch=3, page_size=4, prefill_budget=16, eager=eager)
    for prompt, found in zip(prompts, run(engine, prompts, greedy(40)), strict=True):
        assert found.accepted_mask == drafts_judged_afterwards(model, prompt, found.token_ids)
        assert found.accepted == sum(found.accepted_mask)
        assert found.acceptance == found.accepted / found.drafted
        assert found.tokens_per_forward == 39 / found.forwards


def test_what_piled_up_undrafted_is_caught_up() -> None:
    """Drafting that is switched on late drafts just as drafting that was on all along."""
    model = lively_model(small_vocabulary(), seed=4, std=0.25)
    prompt = some_prompts(model.config, 3, seed=1)[0]
    engine = Engine(model, speculative=1, page_size=4)
    handle = engine.submit(prompt, greedy(100))
    engine._proposer.fixed_drafts = 0
    while len(handle.token_ids) < 80:
        engine.step()
    engine._proposer.fixed_drafts = 1
    while engine.has_work:
        engine.step()
    whole = drafts_judged_afterwards(model, prompt + handle.token_ids[:80], handle.token_ids[80:])
    assert handle.accepted_mask[81:] == whole[1:] and any(whole)


def test_hopeless_drafting_is_given_up_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the module sees nothing; the tokens are the same all along, and drafts of a later text are its own."""
    model = lively_model(small_vocabulary(), seed=4, std=0.25)
    prompts = some_prompts(model.config, 3, seed=1)
    plain = [
        run(Engine(model, speculative=False, page_size=4), [prompt], greedy(40))[0].token_ids for prompt in prompts
    ]
    engine = Engine(model, page_size=4)
    monkeypatch.setattr("fathom.engine.proposer._RETRY_STEPS", 30)
    monkeypatch.setattr(DraftLength, "is_unprofitable", lambda self, batch: True)
    [first] = run(engine, [prompts[0]], greedy(40))
    assert first.token_ids == plain[0] and 0 < first.drafted <= 4
    module_MW = engine.backend.cache.latents_LMW[-1]
    seen = module_MW.clone()
    engine.backend.cache.latents_LMW[-1].zero_()
    engine._steps = engine._proposer.paused_at or 0  # as if it had just been paused
    [second] = run(engine, [prompts[1]], greedy(40))
    assert second.token_ids == plain[1] and second.drafted == 0
    assert seen.any() and not module_MW.any()
    [third] = run(engine, [prompts[2]], greedy(40))
    assert third.token_ids == plain[2] and third.drafted > 0


def test_sampling_is_reproducible_in_any_company() -> None:
    model = lively_model(small_vocabulary(), seed=2, std=0.25)
    prompts = some_prompts(model.config, 5, seed=2)
    params = SamplingParams(0.9, top_p=0.95, seed=5, max_tokens=20)
    together = run(Engine(model, speculative=False, max_batch=4, page_size=8), prompts, params)
    assert len({len(found.token_ids) for found in together}) > 1, "rows must end at different times"
    for place, expected in enumerate(together):
        engine = Engine(model, speculative=False, max_batch=4, page_size=8)
        handle = engine.submit(Request(prompts[place], params, stream=place))
        while engine.has_work:
            engine.step()
        assert handle.token_ids == expected.token_ids


def test_requests_end_where_they_should() -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    prompt = [1, 4, 1, 5, 0, 2]
    for speculative in (False, 2):
        engine = Engine(model, speculative=speculative)
        [whole] = run(engine, [prompt], greedy(40))
        for stop in set(whole.token_ids):
            [found] = run(engine, [prompt], greedy(40, stop_ids=(stop,)))
            assert found.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
            assert found.finish_reason == "stop" and len(found.accepted_mask) == len(found.token_ids)
        for count in range(1, 8):
            [found] = run(engine, [prompt], greedy(count))
            assert (found.token_ids, found.finish_reason) == (whole.token_ids[:count], "length")
        [one] = run(engine, [prompt], greedy(1))
        assert (one.forwards, one.drafted) == (0, 0) and math.isnan(one.tokens_per_forward)
        # The model's length ends what max_tokens would not.
        [long] = run(engine, [prompt], greedy(1000))
        assert len(prompt) + len(long.token_ids) == 256 and long.finish_reason == "length"


def test_cancelling_frees_everything() -> None:
    model = lively_model(small_vocabulary())
    engine = Engine(model, speculative=1, max_batch=2, page_size=4)
    handles = [engine.submit([1, 2, 3] * 9, greedy(50)) for _ in range(4)]
    for _ in range(5):
        engine.step()
    for handle in handles:
        engine.cancel(handle)
        engine.cancel(handle)
    assert not engine.has_work and engine.pool.available == engine.pool.pages
    assert all(handle.finish_reason == "cancelled" for handle in handles)
    assert engine.step() == []


def test_log_probabilities_are_the_models() -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    prompt = some_prompts(model.config, 3, seed=5)[2]
    engine = Engine(model, speculative=1, page_size=4, prefill_budget=8)
    run(engine, [prompt], greedy(4))
    [found] = run(engine, [prompt], greedy(12, logprobs=3, prompt_logprobs=2))
    assert found.cached_tokens == 0, "a prompt's log-probabilities need all of it to be read"
    with torch.no_grad():
        logits_SO = model(torch.tensor([prompt + found.token_ids])).logits_BSO[0]
    logprobs_SO = logits_SO.log_softmax(-1)
    assert found.prompt_logprobs is not None and found.logprobs is not None
    reported = [*found.prompt_logprobs, *found.logprobs]
    assert len(reported) == len(prompt) - 1 + 12
    for place, (token, fact) in enumerate(zip([*prompt[1:], *found.token_ids], reported, strict=True)):
        assert fact.logprob == pytest.approx(float(logprobs_SO[place, token]), abs=1e-4)
        assert len(fact.top) == (2 if place < len(prompt) - 1 else 3)
    assert all(fact.rank == 1 for fact in found.logprobs)


def test_bad_requests_are_named() -> None:
    model = lively_model(small_vocabulary())
    engine = Engine(model)
    for prompt, message in (([], "empty"), ([7], "token 7"), ([-1], "token -1"), ([1] * 256, "256 tokens")):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, greedy(3))
    with pytest.raises(ValueError, match="stop_ids names token 9"):
        engine.submit([1], greedy(3, stop_ids=(9,)))
    assert not engine.has_work
    for wrong in (
        {"speculative": 99},
        {"max_batch": 0},
        {"max_waiting": 0},
        {"eager": 1},
        {"page_size": 0},
        {"cache_tokens": 1},
        {"prefill_budget": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(model, **wrong)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat é 日本語 " * 40], 300)


def text_model(tokenizer: Tokenizer) -> Model:
    config = tiny(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1, max_position_embeddings=256)
    return lively_model(config, seed=3, std=0.2)


def test_text_goes_in_and_comes_out(tokenizer: Tokenizer) -> None:
    model = text_model(tokenizer)
    engine = Engine(model, tokenizer)
    params = [SamplingParams(max_tokens=20), SamplingParams(1.0, seed=1, max_tokens=9)]
    answers = engine.generate(["the cat", "日本"], params)
    assert [len(answer.token_ids) <= limit for answer, limit in zip(answers, (20, 9), strict=True)] == [True, True]
    for answer in answers:
        assert answer.text == tokenizer.decode(answer.token_ids)
    assert "".join(engine.stream("the cat", params[0])) == answers[0].text
    assert generate(model, tokenizer, "the cat", 20) == answers[0].text
    ids = engine.generate([tokenizer.encode("the cat")], params[0])
    assert ids[0].token_ids == answers[0].token_ids


def test_streams_hold_back_half_characters(tokenizer: Tokenizer) -> None:
    for text in ("the cat é日本語 sat", "🙂é", "plain"):
        ids, stream = tokenizer.encode(text, bos=False), IncrementalDetokenizer(tokenizer)
        sub_batches = [stream.add([token]) for token in ids]
        assert "".join(sub_batches) == text and not any("\ufffd" in piece for piece in sub_batches)
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.add(tokenizer.encode("🙂", bos=False)[:1]) == "" and stream.rest() == "\ufffd"


def test_streams_come_to_the_text_however_the_tokens_are_cut(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 40))]
        stream, sub_batches, left = IncrementalDetokenizer(tokenizer), [], list(ids)
        while left:
            count = rng.randint(1, 5)
            sub_batches.append(stream.add(left[:count]))
            left = left[count:]
        assert "".join(sub_batches) + stream.rest() == tokenizer.decode(ids)


def test_what_decoding_brings_does_not_wait_for_prompts(tokenizer: Tokenizer) -> None:
    engine = Engine(text_model(tokenizer), tokenizer, speculative=False)
    first = engine.submit(Request("the cat", SamplingParams(max_tokens=8, ignore_eos=True)))
    engine.step()
    second = engine.submit(Request("sat on the mat", SamplingParams(max_tokens=8, ignore_eos=True)))
    parts = engine.step_phases()
    assert [update.generation for update in next(parts)] == [first] and not second.token_ids
    assert [update.generation for update in next(parts)] == [second] and len(second.token_ids) == 1
    assert next(parts, None) is None


def test_old_names_work_for_one_release() -> None:
    engine = Engine(lively_model(small_vocabulary()))
    with pytest.warns(DeprecationWarning, match="its own methods"):
        assert engine.core is engine
    with pytest.warns(DeprecationWarning, match="warm_up"):
        engine.prepare()
    with pytest.warns(DeprecationWarning, match="step_phases"):
        assert list(engine.parts()) == []


def test_settings_may_be_one_config() -> None:
    model = lively_model(small_vocabulary())
    engine = Engine(model, config=EngineConfig(max_batch=3, page_size=8), page_size=4)
    assert engine.config == EngineConfig(max_batch=3, page_size=4) and engine.stats().page_size == 4
    with pytest.raises(ValueError, match=r"max_bach is not a setting of the engine; there are speculative, max_batch"):
        Engine(model, max_bach=3)
    with pytest.raises(ValueError, match="config is False; it must be an EngineConfig"):
        Engine(model, None, False)  # type: ignore[arg-type]


def test_wrong_calls_are_explained(tokenizer: Tokenizer) -> None:
    model = text_model(tokenizer)
    with pytest.raises(ValueError, match="must be a list"):
        Engine(model, tokenizer).generate("the cat")
    with pytest.raises(ValueError, match="no tokenizer"):
        Engine(model).generate(["the cat"])
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        Engine(model, tokenizer).generate(["a"], [SamplingParams(), SamplingParams()])
    engine = Engine(model, tokenizer, max_waiting=1)
    with pytest.raises(RuntimeError, match="max_waiting is 1"):
        engine.generate(["a", "b", "c"])
    assert not engine.has_work, "what was submitted before the error must not linger"
    handle = engine.submit(Request("a", SamplingParams(max_tokens=3)))
    while engine.has_work:
        engine.step()
    assert engine.completion(handle).finish_reason in ("length", "stop")
