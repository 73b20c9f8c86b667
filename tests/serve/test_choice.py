"""One choice as its tokens arrive, without a server."""

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
import torch
from torch import Tensor

from fathom.data.tokenizer import train_tokenizer
from fathom.engine.outputs import Generation
from fathom.engine.sampling.sampler import SamplingParams
from fathom.serve.choice import Choice

TOKENIZER = train_tokenizer(["aé aè aê aë aà aâ " * 50], 400)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("stops", [[], ["never"]])
def test_a_completion_may_end_within_a_character(each: bool, stops: list[str]) -> None:
    """Also after a token that begins with a whole one, and when the token that ends the answer comes later."""
    whole_and_half = next(
        token for token in range(TOKENIZER.vocab_size) if TOKENIZER.text_bytes([token]).endswith(b"a\xc3")
    )
    generation = Generation([0], SamplingParams(stop=stops), token_ids=[whole_and_half])
    choice = Choice(generation, TOKENIZER, each)
    outputs = choice.take(1, finished=False)
    generation.token_ids.append(TOKENIZER.eos_id)
    generation.finish_reason = "stop"
    outputs += choice.take(2, finished=True)
    assert "".join(output.text for output in outputs) == TOKENIZER.decode(generation.token_ids)
    assert choice.finish_reason == "stop" and choice.num_tokens == 2
    if each:
        assert [output.token for output in outputs] == [whole_and_half]


class Routed(Generation):
    """The engine records another token between the two reads."""

    @property
    def routed_experts(self) -> Tensor:
        return torch.zeros(1, 2, 1, dtype=torch.int16)

    @property
    def routing_weights(self) -> Tensor:
        return torch.ones(1, 3, 1)


def test_routing_is_read_while_the_engine_records_it() -> None:
    choice = Choice(Routed([0], SamplingParams(), token_ids=[65, 66, 67]), TOKENIZER, each=True)
    choice.take(3, finished=False)
    assert choice.routing() == [{"index": 0, "experts": [[0]], "weights": [[1.0]]}]
