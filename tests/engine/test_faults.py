"""What goes wrong for one request is reported for that one, and calls in any order lose nothing."""

import itertools
import random
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.engine import proposer
from fathom.engine.engine import Engine
from fathom.engine.generate import generate
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import SamplingState
from fathom.model.transformer import Model
from tests.engine.backends.make import every_backend, use
from tests.model.configs import lively_model, tiny

LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat é 日本語 " * 40], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "max_position_embeddings": 256}
    return lively_model(tiny(vocab_size=tokenizer.vocab_size, **changes), seed=3, std=0.2)


@pytest.mark.parametrize("speculative", [False, 2])
@pytest.mark.parametrize("stop", [(), ("no such text",)])
def test_streams_and_calls_may_be_interleaved(
    model: Model, tokenizer: Tokenizer, speculative: int, stop: tuple[str, ...]
) -> None:
    def streams(engine: Engine) -> Iterator[Iterator[str]]:
        for prompt, count in (("the cat", 30), ("sat on", 9), ("mat", 20)):
            yield engine.stream(prompt, SamplingParams(max_tokens=count, ignore_eos=True, stop=stop))

    whole = ["".join(stream) for stream in streams(Engine(model, tokenizer, speculative=speculative))]
    engine = Engine(model, tokenizer, speculative=speculative)
    pieces = list(itertools.zip_longest(*streams(engine), fillvalue=""))
    assert ["".join(own) for own in zip(*pieces, strict=True)] == whole
    first, *others = streams(engine)
    begun = next(first)
    [completion] = engine.generate(["the cat"], LONG)
    assert completion.text == whole[0] == begun + "".join(first)
    assert ["".join(stream) for stream in others] == whole[1:]
    assert not engine.has_work


def test_another_thread_is_refused_while_requests_are_not_finished(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    found: list[BaseException | None] = []

    def elsewhere(*calls) -> None:  # type: ignore[no-untyped-def]
        def run() -> None:
            for call in calls:
                try:
                    call()
                    found.append(None)
                except RuntimeError as error:
                    found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = engine.submit("the cat", LONG)
    engine.step()
    elsewhere(engine.step, lambda: engine.submit("sat"), lambda: engine.cancel(handle), lambda: engine.generate(["a"]))
    assert len(found) == 4 and all("unfinished requests of another thread" in str(error) for error in found)
    while engine.has_work:
        engine.step()
    [alone] = Engine(model, tokenizer).generate(["the cat"], LONG)
    assert handle.token_ids == alone.token_ids
    found.clear()
    elsewhere(lambda: engine.generate(["the cat"], LONG), lambda: engine.cancel(handle))
    assert found == [None, None], "an idle engine serves any thread"


def test_a_prompt_that_was_preempted_keeps_all_its_log_probabilities() -> None:
    model = lively_model(tiny(vocab_size=97, num_nextn_predict_layers=1, max_position_embeddings=400), seed=1)
    preempted = 0
    for seed in range(12):
        draw = random.Random(seed)

        def ids(count: int, draw: random.Random = draw) -> list[int]:
            return [draw.randrange(97) for _ in range(count)]

        engine = Engine(model, max_batch=4, page_size=8, cache_tokens=160, prefill_budget=draw.choice([5, 8, 13]))
        for _ in range(3):
            params = SamplingParams(max_tokens=draw.randint(30, 90), ignore_eos=True)
            engine.submit(Request(ids(10), params, priority=1))
        for _ in range(draw.randint(0, 20)):
            engine.step()
        prompt = ids(75)
        handle = engine.submit(prompt, SamplingParams(max_tokens=3, prompt_logprobs=1, ignore_eos=True))
        while not handle.finished:
            engine.step()
        preempted += engine.stats().preempted > 0
        [alone] = Engine(model).generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=1))
        assert handle.prompt_logprobs is not None and alone.prompt_logprobs is not None
        assert len(handle.prompt_logprobs) == len(prompt) - 1
        for own, expected in zip(handle.prompt_logprobs, alone.prompt_logprobs, strict=True):
            assert own.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert preempted > 3


@every_backend
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_where_no_token_can_be_sampled_the_request_ends_with_the_reason(
    name: str, temperature: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(monkeypatch, name)
    engine = Engine(place(model), speculative=2, max_batch=4)
    size = model.config.vocab_size
    every = SamplingParams(
        temperature, min_tokens=2, max_tokens=4, stop_ids=tuple(range(size)), logprobs=1, ignore_eos=True
    )
    usual = SamplingParams(temperature, max_tokens=4, ignore_eos=True)
    none, fine = engine.generate([[1, 2, 3], [1, 2, 3]], [every, usual])
    assert none.finish_reason == "error" and none.token_ids == none.logprobs == []
    assert "before min_tokens neither EOS nor stop_ids" in str(none.generation.error)
    assert fine.finish_reason == "length" and len(fine.token_ids) == 4
    assert not engine.has_work and engine.stats().pages_used == 0


@every_backend
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_not_numbers_end_a_request(
    name: str, temperature: float, model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(monkeypatch, name)
    damaged = Model(model.config)
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.embed_tokens.weight[5] = torch.nan
    engine = Engine(place(damaged).eval(), tokenizer, speculative=2)
    params = SamplingParams(temperature, max_tokens=3, ignore_eos=True)
    bad, good = engine.generate([[1, 5, 2], [1, 2, 3]], params)
    assert bad.finish_reason == "error" and bad.token_ids == []
    assert "not finite" in str(bad.generation.error)
    assert good.finish_reason == "length" or 5 in good.token_ids
    with pytest.raises(RuntimeError, match="not finite"):
        list(engine.stream([1, 5, 2], params))


@pytest.mark.parametrize("eager", [True, False])
def test_what_is_not_a_number_does_not_spread(eager: bool, model: Model) -> None:
    """Not to the next requests either, whose slots behind the last token are those of an earlier one."""
    damaged = Model(model.config)
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.embed_tokens.weight[5] = torch.nan
    params = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={5: -100})
    engine = Engine(damaged, speculative=1, page_size=2, cache_tokens=64, eager=eager)
    [alone] = Engine(damaged, speculative=1, eager=eager).generate([[1, 2]], params)
    for _ in range(6):
        bad, good = engine.generate([[5, 1, 2, 3, 4], [1, 2]], params)
        assert (bad.finish_reason, good.finish_reason) == ("error", "length")
        assert good.token_ids == alone.token_ids


def test_one_text_from_damaged_weights_is_an_error(model: Model, tokenizer: Tokenizer) -> None:
    damaged = Model(model.config)
    with torch.no_grad():
        damaged.norm.weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        generate(damaged, tokenizer, "the cat", 5)


def test_accepted_drafts_are_those_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a perfect drafter, a token that ends a request has accepted drafts behind it."""
    model = lively_model(tiny(vocab_size=7, num_nextn_predict_layers=1, max_position_embeddings=256), seed=1)
    [whole] = Engine(model, speculative=False).generate([[1, 2, 3]], SamplingParams(max_tokens=80, ignore_eos=True))

    def draft(logits_BO: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        return [whole.token_ids[len(row.tokens) - row.prompt_length + len(row.drafts)] for row in rows]

    monkeypatch.setattr(proposer, "draft", draft)
    engine, ends = Engine(model, speculative=4, max_batch=8), range(2, 30)
    params = [SamplingParams(max_tokens=end, ignore_eos=True) for end in ends]
    found = [completion.generation for completion in engine.generate([[1, 2, 3]] * len(ends), params)]
    assert all(own.token_ids == whole.token_ids[:end] for own, end in zip(found, ends, strict=True))
    assert [own.accepted for own in found] == [sum(own.accepted_mask) for own in found]
    # The first token comes without drafts, then every fifth is not a draft.
    assert [own.accepted for own in found] == [end - 1 - (end - 1) // 5 for end in ends]
    assert engine.stats().accepted == sum(own.accepted for own in found)


def test_half_of_a_surrogate_pair_is_no_text(model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"has '\\ud83d', half of a surrogate pair"):
        Engine(model, tokenizer).generate(["the \ud83d cat"])
