"""The experts of every token, against the whole model's: with drafts, preemptions and the prefix cache."""

import random
import threading
import warnings

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.routing import PageRouting, RoutingRecord
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.engine.backends.make import every_backend, use
from tests.model.configs import lively_model, tiny


def config() -> ModelConfig:
    return tiny(vocab_size=11, num_nextn_predict_layers=1)


def asking(prompt: list[int], params: SamplingParams, weights: bool = False) -> Request:
    return Request(prompt, params, return_routed_experts=True, return_routing_weights=weights)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    assert engine.stats().pages_used == 0


@torch.no_grad()
def check(model: Model, handle: Generation) -> None:
    """Its experts are those of the whole model over its tokens, the last of which is never fed."""
    tokens = handle.prompt_ids + handle.token_ids
    expected = model.forward_hidden(torch.tensor([tokens[:-1]])).router.topk_ids_LBSK
    found_LTK = handle.routed_experts
    assert found_LTK is not None and found_LTK.dtype == torch.int16
    expected_LTK = torch.stack([layer[0] for layer in expected]).cpu()
    assert torch.equal(found_LTK.sort().values.long(), expected_LTK.sort().values)


@every_backend
def test_routing_is_that_of_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after rejected drafts, and of a prompt found in the prefix cache."""
    place = use(monkeypatch, name)
    model = place(lively_model(tiny(vocab_size=11, num_hidden_layers=2, num_nextn_predict_layers=1), seed=2, std=0.3))
    engine = Engine(model, speculative=2, page_size=4)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first = engine.submit(asking(prompt, params))
    finish(engine)
    second = engine.submit(asking([*prompt, *first.token_ids[:2]], params))
    finish(engine)
    assert second.cached_tokens == 8 and first.accepted < first.drafted
    for handle in (first, second):
        check(model, handle)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("speculative", [False, 2])
@pytest.mark.parametrize("cache_tokens", [None, 40])
def test_routing_survives_preemptions_and_endings(
    eager: bool, speculative: bool | int, cache_tokens: int | None
) -> None:
    """A stop token may cut accepted drafts off; weights are those of the experts, and sum to their scale."""
    model = lively_model(config(), seed=2, std=0.3)
    rng = random.Random(1)
    engine = Engine(model, speculative=speculative, max_batch=3, page_size=4, cache_tokens=cache_tokens,
                    prefill_budget=8, eager=eager)  # fmt: skip
    handles: list[Generation] = []
    for count in (1, 5, 14, 20):
        prompt = [rng.randrange(11) for _ in range(count)]
        stops = (4,) if count < 6 else ()
        params = SamplingParams(max_tokens=21, stop_ids=stops, ignore_eos=True, temperature=1.0, seed=count)
        handles.append(engine.submit(asking(prompt, params, weights=True)))
    plain = engine.submit([1, 2], SamplingParams(max_tokens=3))
    finish(engine)
    assert plain.routed_experts is None and plain.routing_weights is None
    if cache_tokens:
        assert engine.stats().preempted > 0
    scale = torch.tensor(model.config.routed_scaling_factor)
    for handle in handles:
        check(model, handle)
        assert handle.routed_experts is not None and handle.routing_weights is not None
        assert handle.routing_weights.shape == handle.routed_experts.shape
        assert torch.allclose(handle.routing_weights.sum(-1), scale, rtol=1e-5), "none was found in the cache"


def test_pages_without_routing_are_not_matched_by_requests_that_return_it() -> None:
    model = lively_model(config(), seed=2)
    engine = Engine(model, max_batch=1, page_size=4)
    prompt, params = [1, 2, 3, 4, 5, 6, 7, 8, 9], SamplingParams(max_tokens=4, ignore_eos=True)
    plain = engine.submit(prompt, params)
    first = engine.submit(asking(prompt, params))
    second = engine.submit(asking(prompt, params, weights=True))
    again = engine.submit(prompt, params)
    finish(engine)
    assert [handle.cached_tokens for handle in (plain, first, second, again)] == [0, 0, 8, 8]
    for handle in (first, second):
        check(model, handle)
    assert second.routing_weights is not None
    unknown_T = second.routing_weights.isnan().all(-1).all(0)
    # Of the prefix's last token the hidden state is computed again, for the MTP module.
    assert unknown_T.tolist() == [place < 7 for place in range(12)]
    assert not second.routing_weights[:, 7:].isnan().any()


def test_pages_that_are_reused_keep_no_old_routing() -> None:
    """Random requests over a small pool of pages, with a reset in between."""
    model = lively_model(config(), seed=2, std=0.3)
    engine = Engine(model, max_batch=2, page_size=4, cache_tokens=60, speculative=1)
    rng = random.Random(4)
    found = 0
    for turn in range(30):
        if turn == 15:
            engine.reset_prefix_cache()
        stem = [[1, 2, 3, 4] * 3, [5, 6, 7, 8] * 3, [9, 0] * 6][rng.randrange(3)]
        prompt = [*stem[: rng.randint(1, 12)], rng.randrange(11)]
        params = SamplingParams(max_tokens=rng.randint(2, 9), ignore_eos=True, seed=turn, temperature=1.0)
        handle = engine.submit(asking(prompt, params) if rng.random() < 0.7 else Request(prompt, params))
        finish(engine)
        if handle.routed_experts is not None:
            check(model, handle)
            found += handle.cached_tokens
    assert found > 0 and engine.pool.evictions > 0


def test_routing_can_be_read_while_the_engine_steps() -> None:
    """By another thread: a token's routing is there or not there yet."""
    engine = Engine(lively_model(config(), seed=2), max_batch=1)
    handle = engine.submit(asking([1, 2, 3], SamplingParams(max_tokens=124, ignore_eos=True)))
    reads: list[torch.Tensor] = []

    def read() -> None:
        while not handle.finished:
            assert handle.routed_experts is not None
            reads.append(handle.routed_experts.clone())

    reading = threading.Thread(target=read)
    reading.start()
    finish(engine)
    reading.join()
    final = handle.routed_experts
    assert handle.finish_reason == "length" and final is not None and reads
    assert final.shape[1] == len(handle.prompt_ids) + len(handle.token_ids) - 1
    assert all(torch.equal(read, final[:, : read.shape[1]]) for read in reads)


def test_a_record_grows_and_is_cut() -> None:
    experts_LNK = torch.arange(2 * 5 * 3).view(2, 5, 3)
    record = RoutingRecord(2, 3, weights=True)
    record.add(0, experts_LNK[:, :2], experts_LNK[:, :2].float())
    record.add(2, experts_LNK[:, 2:], experts_LNK[:, 2:].float())
    assert torch.equal(record.experts(), experts_LNK.short())
    record.truncate(3)
    weights_LTK = record.weights()
    assert record.experts().shape == (2, 3, 3) and weights_LTK is not None
    assert torch.equal(weights_LTK, experts_LNK[:, :3].float())
    pages = PageRouting()
    pages.save(record, [7, 5], 0, 1, 2)
    other = RoutingRecord(2, 3, weights=False)
    pages.load(other, [7])
    assert torch.equal(other.experts(), experts_LNK[:, :2].short()) and other.weights() is None


def test_old_and_wrong_names() -> None:
    with pytest.warns(DeprecationWarning, match="trace"):
        assert Request([1], trace=True).return_routed_experts  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine(lively_model(config()))
        with pytest.raises(ValueError, match="return_routed_experts must then be True"):
            engine.submit(Request([1], return_routing_weights=True))
