"""A seed gives the same text whatever is drafted and whoever else is served."""

import random

import pytest

from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from tests.model.configs import lively_model, tiny


@pytest.mark.parametrize("eager", [False, True], ids=["native", "torch"])
def test_sampled_tokens_depend_on_the_seed_alone(eager: bool) -> None:
    model = lively_model(tiny(vocab_size=40, num_nextn_predict_layers=1), seed=4, std=0.15)
    rng = random.Random(2)
    prompts = [[rng.randrange(40) for _ in range(rng.randint(1, 12))] for _ in range(6)]
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=place, max_tokens=40) for place in range(6)]
    alone = []
    for prompt, own in zip(prompts, params, strict=True):
        engine = Engine(model, speculative=False, max_batch=1, page_size=4, eager=eager)
        handle = engine.submit(prompt, own)
        while engine.has_work:
            engine.step()
        alone.append(handle.token_ids)
    for speculative in (False, True, 1, 3):
        engine = Engine(
            model, speculative=speculative, max_batch=4, page_size=4, cache_tokens=120, prefill_budget=8, eager=eager
        )
        handles = [engine.submit(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        while engine.has_work:
            engine.step()
        assert [handle.token_ids for handle in handles] == alone
        if speculative == 3:
            assert sum(handle.accepted for handle in handles) > 0
