"""New weights in place: after an update an engine is, bit for bit, the one that was made with the new weights."""

import copy
from typing import Any

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.outputs import Completion
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.model.transformer import Model
from tests.engine.backends.make import every_backend, skip_unless_supported, use
from tests.model.configs import lively_model, tiny

WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32, "v_head_dim": 32}
PROMPT = [1, 2, 3, 4, 5, 6, 0, 2, 3]


def model(seed: int, **changes: Any) -> Model:
    config = tiny(**{"vocab_size": 11, "num_hidden_layers": 2, "num_nextn_predict_layers": 1, **changes})
    return lively_model(config, seed=seed, std=0.3)


def answer(engine: Engine, count: int = 4) -> Completion:
    [found] = engine.generate([PROMPT], SamplingParams(max_tokens=count, ignore_eos=True, logprobs=3))
    return found


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_updated_engine_is_one_with_the_new_weights(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and router biases included, of which the compiled CPU backend holds float32 copies."""
    skip_unless_supported(name, dtype)
    place = use(monkeypatch, name)
    old, new = (place(model(seed).to(dtype)) for seed in (1, 2))
    engine = Engine(old, speculative=1, page_size=4)
    before, pointers = answer(engine), [parameter.data_ptr() for parameter in old.parameters()]
    engine.update_weights(new.state_dict())
    after, expected = answer(engine), answer(Engine(new, speculative=1, page_size=4))
    assert after.generation.cached_tokens == 0, "the prefix cache holds latents of the old weights"
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)
    assert after.generation.accepted_mask == expected.generation.accepted_mask
    assert after.logprobs != before.logprobs
    assert [parameter.data_ptr() for parameter in old.parameters()] == pointers


@every_backend
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_low_bit_weights_are_quantized_again(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = use(monkeypatch, name)
    old, new = (place(model(seed, **WIDE)) for seed in (1, 2))
    engine = Engine(quantized(old, precision), page_size=4)
    answer(engine)
    engine.update_weights(new.named_parameters())
    engine.update_weights({key: value for key, value in new.state_dict().items() if key.endswith("bias")})
    after, expected = answer(engine), answer(Engine(quantized(new, precision), page_size=4))
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)


def test_some_weights_and_other_types_will_do() -> None:
    """Values are rounded to the parameter's own type; what is not named stays."""
    engine = Engine(model(1).to(torch.bfloat16))
    before = copy.deepcopy(engine.model.state_dict())
    given = torch.randn(11, 24, dtype=torch.float64)
    engine.update_weights([("lm_head.weight", given)])
    for key, value in engine.model.state_dict().items():
        assert torch.equal(value, given.bfloat16() if key == "lm_head.weight" else before[key])


def test_a_tied_head_is_one_parameter() -> None:
    engine = Engine(model(1, tie_word_embeddings=True))
    weights = dict(model(2, tie_word_embeddings=True).state_dict())
    engine.update_weights(weights)
    assert torch.equal(engine.model.lm_head.weight, weights["embed_tokens.weight"])
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight and embed_tokens\.weight are one parameter"):
        engine.update_weights(weights)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", torch.ones(24), r"model\.norm\.weight is no parameter .* such as embed_tokens\.weight"),
        ("norm.weight", torch.ones(25), r"norm\.weight has shape \(25,\); the model's has \(24,\)"),
        ("norm.weight", torch.ones(24, dtype=torch.int64), r"norm\.weight has type torch\.int64; it must be float32"),
        ("norm.weight", torch.ones(24, device="meta"), r"norm\.weight is on the meta device"),
        ("norm.weight", [1.0] * 24, r"norm\.weight is given as list"),
    ],
)
def test_what_does_not_fit_changes_nothing(name: str, tensor: Any, message: str) -> None:
    engine = Engine(model(1), page_size=4)
    answer(engine)
    before = copy.deepcopy(engine.model.state_dict())
    with pytest.raises(ValueError, match=message):
        engine.update_weights({"lm_head.weight": torch.zeros(11, 24), name: tensor})
    assert all(torch.equal(value, before[key]) for key, value in engine.model.state_dict().items())
    assert answer(engine).generation.cached_tokens > 0, "the prefix cache is still that of these weights"


def test_names_are_those_of_the_state_dict() -> None:
    from fathom.engine.weights import _parameters

    plain = model(1)
    assert [name for name, _ in _parameters(plain)] == list(plain.state_dict())
    assert {name for name, _ in _parameters(quantized(model(1, **WIDE), "int8"))} == set(plain.state_dict())


def test_running_requests_refuse_an_update() -> None:
    engine = Engine(model(1))
    handle = engine.submit(PROMPT, SamplingParams(max_tokens=9))
    with pytest.raises(RuntimeError, match="1 requests are not finished"):
        engine.update_weights(model(2).state_dict())
    engine.cancel(handle)
    engine.update_weights(model(2).state_dict())


def test_drafting_is_measured_afresh() -> None:
    engine = Engine(model(1))
    answer(engine, 60)
    engine._proposer.pause(3, [])
    measured = engine._proposer.lengths
    assert measured._costs
    engine.update_weights({})
    assert engine._proposer.is_active and not engine._proposer.lengths._costs
    assert answer(engine, 20).generation.drafted > 0


@every_backend
def test_a_reset_prefix_cache_is_found_by_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a request runs, which keeps its pages and goes on."""
    place = use(monkeypatch, name)
    engine = Engine(place(model(1)), speculative=1, page_size=4)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    [expected] = engine.generate([PROMPT], params)
    running = engine.submit(PROMPT, params)
    engine.step()
    assert running.cached_tokens == 8 and not running.finished
    engine.reset_prefix_cache()
    later = engine.submit(PROMPT, params)
    while engine.has_work:
        engine.step()
    assert later.cached_tokens == 0
    assert running.token_ids == later.token_ids == expected.token_ids
    [again] = engine.generate([PROMPT], params)
    assert again.generation.cached_tokens == 8
    assert engine.stats().pages_used == 0
