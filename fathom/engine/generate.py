"""One text continued, without making an engine oneself."""

from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.transformer import Model


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    speculative: bool = True,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that follows `prompt`, without the prompt, up to the end-of-document token if one comes.

    BOS precedes the prompt, so an empty prompt begins a document. For more than one text, or more control, make an
    `Engine`. Raises RuntimeError where no token can be sampled, as with weights that are not finite.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, seed=seed, max_tokens=max_new_tokens)
    [completion] = Engine(model, tokenizer, speculative=speculative, max_batch=1).generate([prompt], params)
    if completion.generation.error is not None:
        raise RuntimeError(completion.generation.error)
    assert completion.text is not None
    return completion.text
