"""The engine: caching, paging, batching, preempting and drafting change no token.

Judges: the whole model run over every prefix, the drafting module run over the finished text, plain torch for the
compiled step.
"""

import copy
import math
import random
import statistics
from typing import Any

import pytest
import torch

from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.engine.backends.eager import Runner, SequenceChunk
from fathom.engine.core import Core
from fathom.engine.engine import Engine, IncrementalDetokenizer, Request, generate
from fathom.engine.outputs import Generation
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


def run(core: Core, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    found = [core.submit(prompt, params, stream=place) for place, prompt in enumerate(prompts)]
    while core.has_work:
        core.step()
    assert core.pool.available == core.pool.pages, "a page was leaked"
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
            core = Core(model, speculative, 5, 8, cache_tokens, prefill_budget=16, eager=eager)
            found = run(core, prompts, greedy(24))
            assert [generation.token_ids for generation in found] == expected
            assert all(generation.finish_reason == "length" for generation in found)
            assert core.pool.matched_tokens > 0, "equal beginnings must be found again"
            if cache_tokens:
                assert core.scheduler.preemptions > 0, "so small a cache must preempt"
            if speculative in (1, 3):
                accepted, drafted = sum(g.accepted for g in found), sum(g.drafted for g in found)
                assert 0 < accepted < drafted


@native
def test_ten_thousand_tokens_are_the_same_with_drafts() -> None:
    """Alone, among 32 and with any number of drafts, in float32."""
    model = lively_model(small_vocabulary(max_position_embeddings=512), seed=11, std=0.25)
    prompts = some_prompts(model.config, 32, seed=9)
    alone = [run(Core(model, False), [prompt], greedy(313))[0].token_ids for prompt in prompts]
    assert sum(map(len, alone)) > 10_000
    for speculative in (1, 2, True):
        found = run(Core(model, speculative, 32), prompts, greedy(313))
        assert [generation.token_ids for generation in found] == alone


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])
def test_drafts_are_those_of_the_module_run_over_the_whole_text(changes: dict[str, Any], eager: bool) -> None:
    """A wrong entry in the module's cache would show nowhere but in worse drafts."""
    model = lively_model(small_vocabulary(**changes), seed=4, std=0.25)
    prompts = some_prompts(model.config, 6, seed=8)
    core = Core(model, 1, 3, page_size=4, prefill_budget=16, eager=eager)
    for prompt, found in zip(prompts, run(core, prompts, greedy(40)), strict=True):
        assert found.accepted_mask == drafts_judged_afterwards(model, prompt, found.token_ids)
        assert found.accepted == sum(found.accepted_mask)
        assert found.acceptance == found.accepted / found.drafted
        assert found.tokens_per_forward == 39 / found.forwards


def test_what_piled_up_undrafted_is_caught_up() -> None:
    """Drafting that is switched on late drafts just as drafting that was on all along."""
    model = lively_model(small_vocabulary(), seed=4, std=0.25)
    prompt = some_prompts(model.config, 3, seed=1)[0]
    core = Core(model, 1, page_size=4)
    handle = core.submit(prompt, greedy(100))
    core._fixed_drafts = 0
    while len(handle.token_ids) < 80:
        core.step()
    core._fixed_drafts = 1
    while core.has_work:
        core.step()
    whole = drafts_judged_afterwards(model, prompt + handle.token_ids[:80], handle.token_ids[80:])
    assert handle.accepted_mask[81:] == whole[1:] and any(whole)


def test_hopeless_drafting_is_given_up_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the module sees nothing; the tokens are the same all along, and drafts of a later text are its own."""
    model = lively_model(small_vocabulary(), seed=4, std=0.25)
    prompts = some_prompts(model.config, 3, seed=1)
    plain = [run(Core(model, False, page_size=4), [prompt], greedy(40))[0].token_ids for prompt in prompts]
    core = Core(model, page_size=4)
    monkeypatch.setattr("fathom.engine.core._SLEEP_STEPS", 30)
    monkeypatch.setattr(DraftLength, "is_unprofitable", lambda self, batch: True)
    [first] = run(core, [prompts[0]], greedy(40))
    assert first.token_ids == plain[0] and 0 < first.drafted <= 4
    module_MW = core.runner.cache.latents_LMW[-1]
    seen = module_MW.clone()
    core.runner.cache.latents_LMW[-1].zero_()
    core._steps = core._asleep_since or 0  # as if it had just fallen asleep
    [second] = run(core, [prompts[1]], greedy(40))
    assert second.token_ids == plain[1] and second.drafted == 0
    assert seen.any() and not module_MW.any()
    [third] = run(core, [prompts[2]], greedy(40))
    assert third.token_ids == plain[2] and third.drafted > 0


@native
def test_a_token_is_the_same_bits_alone_and_in_company() -> None:
    model = lively_model(small_vocabulary(vocab_size=61), seed=2)
    rng = random.Random(0)
    chunks = [
        SequenceChunk([rng.randrange(61) for _ in range(length)], 0, [place])
        for place, length in enumerate((1, 7, 3, 8, 5))
    ]
    together = Runner(model, 8, 8, 64).main(chunks, range(24))
    first = 0
    for chunk in chunks:
        count = len(chunk.tokens)
        alone = Runner(model, 8, 8, 64).main([chunk], range(count))
        assert torch.equal(alone.logits_NO, together.logits_NO[first : first + count])
        assert torch.equal(alone.h_ND, together.h_ND[first : first + count])
        first += count


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_the_compiled_step_is_the_model(seed: int, dtype: torch.dtype) -> None:
    """Random chunks of random sequences, behind one another in scattered pages, through module and model, against
    plain torch in float32 with the same weights."""
    rng = random.Random(seed)
    changes = list(CONFIGS.values())[seed % 3]
    model = lively_model(tiny(**{"num_nextn_predict_layers": 1, **changes}), seed=seed).to(dtype)
    words, size = model.config.vocab_size, rng.choice([1, 3, 8, 200])
    runners = [Runner(model, 300, size, 400), Runner(copy.deepcopy(model).float(), 300, size, 400, eager=True)]
    pages, lengths = rng.sample(range(300), 300), [0, 0, 0]
    held = [pages[i * 100 : (i + 1) * 100] for i in range(3)]
    errors: list[float] = []
    for _ in range(8):
        chunks = []
        for row in range(3):
            count = min(rng.randint(1, 12), 99 - lengths[row])
            chunks.append(SequenceChunk([rng.randrange(words) for _ in range(count)], lengths[row], held[row]))
            lengths[row] += count
        logits_indices = rng.sample(range(sum(len(s.tokens) for s in chunks)), 2)
        ours, theirs = (runner.main(chunks, logits_indices) for runner in runners)
        errors += _token_errors(ours.h_ND, theirs.h_ND) + _token_errors(ours.logits_NO, theirs.logits_NO)
        later = [chunk._replace(start=chunk.start + 1) for chunk in chunks]
        ours, theirs = (runner.draft(later, theirs.h_ND, logits_indices) for runner in runners)
        errors += _token_errors(ours.h_ND, theirs.h_ND) + _token_errors(ours.logits_NO, theirs.logits_NO)
    if dtype == torch.float32:
        assert max(errors) <= 2e-5
    else:
        # A token whose routing is a near tie may take another expert; most do not.
        assert statistics.quantiles(errors, n=10)[-1] <= 0.02
        assert statistics.median(errors) <= 0.006


def _token_errors(found_ND: torch.Tensor, expected_ND: torch.Tensor) -> list[float]:
    """Of each token by itself, over its norm."""
    return ((found_ND - expected_ND).norm(dim=-1) / expected_ND.norm(dim=-1)).tolist()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "latent", "page_size"), [(3, 32, 256), (16, 48, 64), (21, 17, 7)])
def test_long_pasts_are_attended_in_parts(dtype: torch.dtype, heads: int, latent: int, page_size: int) -> None:
    """More parts than a token may have of the least size; more heads than a vector has lanes; odd widths."""
    length = 5000
    model = lively_model(tiny(num_attention_heads=heads, kv_lora_rank=latent), seed=5).to(dtype)
    runners = [Runner(model, length // page_size + 2, page_size, length + 1, eager) for eager in (False, True)]
    past_LMW = torch.randn(runners[0].cache.latents_LMW.shape, generator=torch.Generator().manual_seed(1))
    for runner in runners:
        runner.cache.latents_LMW.copy_(past_LMW)
    chunks = [SequenceChunk([1, 2, 3], length - 3, range(length // page_size + 1)), SequenceChunk([4], 130, range(200))]
    ours, theirs = (runner.main(chunks, range(4)) for runner in runners)
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    for found, expected in zip(ours[:2], theirs[:2], strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=native)])
def test_what_a_module_remembers_is_what_drafting_writes(eager: bool) -> None:
    model = lively_model(small_vocabulary(), seed=3)
    runners = [Runner(model, 40, 4, 100, eager) for _ in range(2)]
    chunks = [SequenceChunk([1, 2, 3, 2, 1], 1, range(5)), SequenceChunk([0, 3], 1, range(20, 25))]
    h_ND = torch.randn(7, model.config.hidden_size)
    runners[0].draft(chunks, h_ND, [4])
    runners[1].write_mtp_kv_cache(chunks, h_ND)
    drafted, remembered = (runner.cache.latents_LMW for runner in runners)
    assert remembered[-1].any() and not remembered[:-1].any()
    assert torch.equal(drafted, remembered)


def test_sampling_is_reproducible_in_any_company() -> None:
    model = lively_model(small_vocabulary(), seed=2, std=0.25)
    prompts = some_prompts(model.config, 5, seed=2)
    params = SamplingParams(0.9, top_p=0.95, seed=5, max_tokens=20)
    together = run(Core(model, False, 4, 8), prompts, params)
    assert len({len(found.token_ids) for found in together}) > 1, "rows must end at different times"
    for place, expected in enumerate(together):
        core = Core(model, False, 4, 8)
        handle = core.submit(prompts[place], params, stream=place)
        while core.has_work:
            core.step()
        assert handle.token_ids == expected.token_ids


def test_requests_end_where_they_should() -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    prompt = [1, 4, 1, 5, 0, 2]
    for speculative in (False, 2):
        core = Core(model, speculative)
        [whole] = run(core, [prompt], greedy(40))
        for stop in set(whole.token_ids):
            [found] = run(core, [prompt], greedy(40, stop_ids=(stop,)))
            assert found.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
            assert found.finish_reason == "stop" and len(found.accepted_mask) == len(found.token_ids)
        for count in range(1, 8):
            [found] = run(core, [prompt], greedy(count))
            assert (found.token_ids, found.finish_reason) == (whole.token_ids[:count], "length")
        [one] = run(core, [prompt], greedy(1))
        assert (one.forwards, one.drafted) == (0, 0) and math.isnan(one.tokens_per_forward)
        # The model's length ends what max_tokens would not.
        [long] = run(core, [prompt], greedy(1000))
        assert len(prompt) + len(long.token_ids) == 256 and long.finish_reason == "length"


def test_cancelling_frees_everything() -> None:
    model = lively_model(small_vocabulary())
    core = Core(model, 1, max_batch=2, page_size=4)
    handles = [core.submit([1, 2, 3] * 9, greedy(50)) for _ in range(4)]
    for _ in range(5):
        core.step()
    for handle in handles:
        core.cancel(handle)
        core.cancel(handle)
    assert not core.has_work and core.pool.available == core.pool.pages
    assert all(handle.finish_reason == "cancelled" for handle in handles)
    assert core.step() == []


def test_log_probabilities_are_the_models() -> None:
    model = lively_model(small_vocabulary(), seed=11, std=0.25)
    prompt = some_prompts(model.config, 3, seed=5)[2]
    core = Core(model, 1, page_size=4, prefill_budget=8)
    run(core, [prompt], greedy(4))
    [found] = run(core, [prompt], greedy(12, logprobs=3, prompt_logprobs=2))
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
    core = Core(model)
    for prompt, message in (([], "empty"), ([7], "token 7"), ([-1], "token -1"), ([1] * 256, "256 tokens")):
        with pytest.raises(ValueError, match=message):
            core.submit(prompt, greedy(3))
    with pytest.raises(ValueError, match="stop_ids names token 9"):
        core.submit([1], greedy(3, stop_ids=(9,)))
    assert not core.has_work
    for wrong in ({"speculative": 99}, {"max_batch": 0}, {"page_size": 0}, {"cache_tokens": 1}, {"prefill_budget": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Core(model, **wrong)


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
