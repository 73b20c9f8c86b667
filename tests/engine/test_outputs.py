"""What the engine reports besides tokens, and constraints."""

import pytest
import torch
from torch import Tensor

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.config import ModelConfig
from tests.model.configs import lively_model, tiny

ways = pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])


def config() -> ModelConfig:
    return tiny(vocab_size=11, num_nextn_predict_layers=1)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    assert engine.pool.available == engine.pool.pages


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
