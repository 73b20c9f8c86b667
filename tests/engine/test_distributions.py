"""What tokens were sampled from, as the engine reports it, against the whole model's logits."""

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams, probabilities
from tests.engine.backends.make import every_backend, use
from tests.model.configs import lively_model, tiny

PROMPT = [1, 2, 3, 4, 5]


@every_backend
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "top_k": 9}], ids=["all", "filtered"])
@torch.no_grad()
def test_reports_what_each_token_was_sampled_from(
    name: str, filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(monkeypatch, name)
    model = place(lively_model(tiny(vocab_size=23, num_nextn_predict_layers=1), seed=2, std=0.3))
    params = SamplingParams(temperature=0.7, max_tokens=7, ignore_eos=True, **filters)  # type: ignore[arg-type]
    engine = Engine(model, speculative=2)
    handles = [engine.submit(Request(PROMPT, params, stream=stream, return_distributions=True)) for stream in range(2)]
    handles.append(engine.submit(PROMPT, SamplingParams(max_tokens=7, ignore_eos=True)))  # a greedy one beside them
    while engine.has_work:
        engine.step()
    assert handles.pop().sampled_from is None
    for handle in handles:
        tokens = handle.prompt_ids + handle.token_ids
        logits_TO = model(torch.tensor([tokens[:-1]]).to(model.embed_tokens.weight.device)).logits_BSO[0].cpu()
        probs_TO = probabilities(logits_TO[len(PROMPT) - 1 :], params)
        assert handle.sampled_from is not None and len(handle.sampled_from) == len(handle.token_ids)
        for p_O, token, found in zip(probs_TO, handle.token_ids, handle.sampled_from, strict=True):
            assert found.logprob == pytest.approx(float(p_O[token].log()), abs=1e-4)
            if filters:
                assert found.kept_ids is not None and found.kept_ids.tolist() == p_O.nonzero()[:, 0].tolist()
            else:
                assert found.kept_ids is None


def test_greedy_tokens_are_not_sampled() -> None:
    engine = Engine(lively_model(tiny()))
    with pytest.raises(ValueError, match="temperature must then be above 0"):
        engine.submit(Request(PROMPT, return_distributions=True))
