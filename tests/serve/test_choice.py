"""One choice as its tokens arrive, without a server."""

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
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
