"""Acceptance of a module that always, never and sometimes guesses right."""

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval import acceptance
from fathom.eval.acceptance import draft_acceptance
from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from tests.model.configs import lively_model, tiny

PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 2], [3, 3]]


def config(**changes: int) -> ModelConfig:
    return tiny(**{"vocab_size": 7, "num_nextn_predict_layers": 1, **changes})


def test_figures_are_the_sums_over_the_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_ROWS", 3)  # so that a second batch is needed
    model = lively_model(config(), seed=11, std=0.25)
    found = draft_acceptance(model, PROMPTS, 20)
    one_by_one = [continue_alone(model, prompt, 20) for prompt in PROMPTS]
    assert found.drafted == sum(g.drafted for g in one_by_one) == sum(g.forwards for g in one_by_one)
    assert found.acceptance == sum(g.accepted for g in one_by_one) / found.drafted
    assert found.tokens_per_forward == 4 * 19 / found.drafted
    assert 0 < found.acceptance < 1


def test_a_perfect_drafter_doubles_the_tokens_per_forward() -> None:
    """A model that always says token 0 is easy to draft for."""
    found = draft_acceptance(constant_model(), PROMPTS, 21)
    assert (found.acceptance, found.tokens_per_forward) == (1, 2)


def continue_alone(model: Model, prompt: list[int], count: int) -> Generation:
    engine = Engine(model, speculative=1)
    found = engine.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
    while engine.has_work:
        engine.step()
    return found


@torch.no_grad()
def constant_model() -> Model:
    model = lively_model(config())
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits equal: the first token is the likeliest
    return model


def test_impossible_requests_are_named() -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        draft_acceptance(lively_model(config(num_nextn_predict_layers=0)), PROMPTS)
    with pytest.raises(ValueError, match="prompts is empty"):
        draft_acceptance(constant_model(), [])
    with pytest.raises(ValueError, match="new_tokens is 1; it must be at least 2"):
        draft_acceptance(constant_model(), PROMPTS, 1)
