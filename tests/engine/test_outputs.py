"""What the engine tells besides tokens: routing, counts; and what it is told: constraints."""

import random
import threading

import pytest
import torch
from torch import Tensor

from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from fathom.ops import cpu
from tests.model.configs import lively_model, tiny

ways = pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])


def config() -> ModelConfig:
    return tiny(vocab_size=11, num_nextn_predict_layers=1)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    assert engine.pool.available == engine.pool.pages


@ways
@pytest.mark.parametrize("speculative", [False, 2])
@pytest.mark.parametrize("cache_tokens", [None, 40])
def test_routing_is_that_of_the_whole_model(eager: bool, speculative: bool | int, cache_tokens: int | None) -> None:
    """Also after preemptions and rejected drafts, and where a stop token cuts accepted drafts off."""
    if not eager and not cpu.available():
        pytest.skip(f"the kernels are not built: {cpu.missing()}")
    model = lively_model(config(), seed=2, std=0.3)
    rng = random.Random(1)
    engine = Engine(
        model,
        speculative=speculative,
        max_batch=3,
        page_size=4,
        cache_tokens=cache_tokens,
        prefill_budget=8,
        eager=eager,
    )
    handles: list[Generation] = []
    for count in (1, 5, 14, 20):
        prompt = [rng.randrange(11) for _ in range(count)]
        stops = (4,) if count < 6 else ()
        params = SamplingParams(max_tokens=21, stop_ids=stops, ignore_eos=True, temperature=1.0, seed=count)
        handles.append(engine.submit(Request(prompt, params, trace=True)))
    plain = engine.submit([1, 2], SamplingParams(max_tokens=3))
    finish(engine)
    assert plain.routing is None
    if cache_tokens:
        assert engine.stats().preempted > 0
    for handle in handles:
        tokens = handle.prompt_ids + handle.token_ids
        assert handle.routing is not None and len(handle.routing) == len(tokens) - 1
        with torch.no_grad():
            expected = model.forward_hidden(torch.tensor([tokens])).router.topk_ids_LBSK
        for place, found in enumerate(handle.routing):
            assert found is not None, "nothing was found in the cache"
            assert [sorted(ids) for ids in found.experts] == [sorted(layer[0, place].tolist()) for layer in expected]
            for weights in found.weights:
                assert sum(weights) == pytest.approx(model.config.routed_scaling_factor, rel=1e-5)


def test_cached_tokens_have_no_routing() -> None:
    engine = Engine(lively_model(config(), seed=2), max_batch=1, page_size=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first = engine.submit(Request(prompt, SamplingParams(max_tokens=4, ignore_eos=True), trace=True))
    second = engine.submit(Request(prompt, SamplingParams(max_tokens=4, ignore_eos=True), trace=True))
    finish(engine)
    assert second.cached_tokens == 8 and first.routing is not None and second.routing is not None
    assert [facts is None for facts in second.routing] == [place < 7 for place in range(12)], (
        "of the last one the state is read again"
    )
    assert second.routing[8:] == first.routing[8:]


def test_routing_can_be_read_while_the_engine_steps() -> None:
    """By a server's thread: a token's routing is there or not there yet, never empty."""
    engine = Engine(lively_model(config(), seed=2), max_batch=1)
    handle = engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=124, ignore_eos=True), trace=True))
    stepping = threading.Thread(target=finish, args=(engine,))
    stepping.start()
    reads = gaps = 0
    while stepping.is_alive():
        assert handle.routing is not None
        gaps += None in list(handle.routing)
        reads += 1
    assert reads and not gaps
    assert handle.finish_reason == "length" and handle.routing is not None, "the other thread did not get to its end"
    assert len(handle.routing) == len(handle.prompt_ids) + len(handle.token_ids) - 1


@ways
def test_counts_add_up(eager: bool) -> None:
    model = lively_model(config(), seed=3, std=0.3)
    engine = Engine(model, speculative=1, max_batch=4, page_size=4, eager=eager)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    found = [engine.submit([1, 2, 3, place], params) for place in range(4)]
    engine.step()
    during = engine.stats()
    assert during.running == 4 and during.waiting == 0 and during.pages_used > 0
    finish(engine)
    stats = engine.stats()
    assert stats.generated_tokens == sum(len(handle.token_ids) for handle in found) == 40
    assert stats.prompt_tokens == 16 and stats.cached_prompt_tokens == 0
    assert stats.drafted == sum(handle.drafted for handle in found)
    assert stats.accepted == sum(handle.accepted for handle in found)
    read = 16 + stats.drafted + sum(handle.forwards for handle in found)
    assert (stats.tokens_per_expert_LE.sum(1) == read * model.config.num_experts_per_tok).all() and len(
        stats.tokens_per_expert_LE
    ) == 2
    assert stats.pages_used == 0 and stats.pages_reusable > 0 and stats.running == stats.waiting == 0
    cfg = model.config
    assert stats.bytes_per_token == (cfg.num_hidden_layers + 1) * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * 4


class Alternating:
    """Even and odd ids take turns; remembers what it was told."""

    def __init__(self, words: int) -> None:
        self.words, self.told, self.asked = words, list[int](), list[list[int]]()

    def allowed(self, drafts: list[int]) -> Tensor:
        self.asked.append(list(drafts))
        history = [*self.told[-1:], *drafts] if self.told else [1, *drafts]
        ids = torch.arange(self.words)
        return torch.stack([ids % 2 != last % 2 for last in history])

    def take(self, tokens: list[int]) -> None:
        self.told += tokens


@ways
@pytest.mark.parametrize("speculative", [False, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_holds_with_drafts_and_beside_free_requests(
    eager: bool, speculative: bool | int, temperature: float
) -> None:
    engine = Engine(
        lively_model(config(), seed=4, std=0.3), speculative=speculative, max_batch=4, page_size=4, eager=eager
    )
    params = SamplingParams(temperature=temperature, max_tokens=30, ignore_eos=True)
    rules = [Alternating(11) for _ in range(2)]
    bound = [engine.submit(Request([1, 2, place], params, constraint=rule)) for place, rule in enumerate(rules)]
    free = engine.submit([1, 2, 7], params)
    finish(engine)
    for handle, rule in zip(bound, rules, strict=True):
        assert rule.told == handle.token_ids and len(handle.token_ids) == 30
        assert [token % 2 for token in handle.token_ids] == [0, 1] * 15
        if speculative:
            assert 0 < handle.accepted < handle.drafted
            assert max(map(len, rule.asked)) == 3
    alone = Engine(
        lively_model(config(), seed=4, std=0.3), speculative=speculative, max_batch=4, page_size=4, eager=eager
    )
    again = alone.submit([1, 2, 7], params)
    finish(alone)
    assert again.token_ids == free.token_ids
    assert {token % 2 for token in free.token_ids} == {0, 1}
    assert [token % 2 for token in free.token_ids] != [0, 1] * 15


class Failing(Alternating):
    def __init__(self, words: int, when: str) -> None:
        super().__init__(words)
        self.when = when

    def allowed(self, drafts: list[int]) -> Tensor:
        if self.when == "allowed" and len(self.told) > 4:
            raise RuntimeError("no grammar")
        found = super().allowed(drafts)
        return found & (self.when != "nothing" or len(self.told) < 4)

    def take(self, tokens: list[int]) -> None:
        super().take(tokens)
        if self.when == "take" and len(self.told) > 4:
            raise RuntimeError("no grammar")


@pytest.mark.parametrize("speculative", [False, 2])
@pytest.mark.parametrize("when", ["allowed", "take", "nothing"])
def test_a_failing_constraint_ends_its_request_alone(when: str, speculative: bool | int) -> None:
    engine = Engine(lively_model(config(), seed=4, std=0.3), speculative=speculative, max_batch=4, page_size=4)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    broken = engine.submit(Request([1, 2], params, constraint=Failing(11, when)))
    other = engine.submit([1, 2], params)
    finish(engine)
    assert broken.finish_reason == "error" and broken.error is not None
    assert ("no token" if when == "nothing" else "no grammar") in broken.error
    assert 4 <= len(broken.token_ids) < 20
    assert other.finish_reason == "length" and other.error is None and len(other.token_ids) == 20


def test_constraint_and_min_tokens_exclude_each_other() -> None:
    engine = Engine(lively_model(config()))
    with pytest.raises(ValueError, match="min_tokens is 3"):
        engine.submit(Request([1], SamplingParams(min_tokens=3, max_tokens=5), constraint=Alternating(11)))
    assert not engine.has_work
