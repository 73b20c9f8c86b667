"""lm-eval's tasks (EleutherAI's language model evaluation harness) on our models.

lm-eval poses the questions and counts the answers; this is the model that it asks. Texts become tokens as they do for
its own `hf` backend, so that figures can be compared: in perplexity tasks the begin token is both given and predicted.
Only control tokens differ: one that a text merely spells stays text.

A task's YAML file can name Python functions, which lm-eval runs: whoever chooses a task chooses to run its code.
"""

from collections.abc import Sequence
from typing import Any

from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.eval.likelihood import Continuation, likelihoods, windows
from fathom.model.transformer import Model

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(f"tasks are run by lm-eval ({error}): pip install 'fathom-lm[eval]'") from error

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""What a task may say of how answers are drawn, under our names and theirs."""


def run_tasks(
    model: Model, tokenizer: Tokenizer, tasks: Sequence[str], few_shot: int | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks, by their names or as YAML files; each one's metrics, as lm-eval names them.

    `few_shot` examples come before each question (None: as the task says); only the first `limit` questions are asked
    (None: all). Raises ValueError for a task that does not exist or asks for what is not there.
    """
    try:
        found = lm_eval.simple_evaluate(
            HarnessModel(model, tokenizer), tasks=list(tasks), num_fewshot=few_shot, limit=limit, log_samples=False
        )
    except KeyError as error:
        raise ValueError(f"lm-eval: {error.args[0]}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return results


class HarnessModel(TemplateLM):
    """A model as lm-eval wants to ask it."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._device = model.embed_tokens.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins one."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._model.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the begin token unless it is declined."""
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = likelihoods(self._model, [Continuation(context, ids) for _, context, ids in requests])
        return [(likelihood.logprob, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """log p of each whole text."""
        texts = [
            list(windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length))
            for request in requests
        ]
        found = iter(likelihoods(self._model, [part for parts in texts for part in parts]))
        return [sum(next(found).logprob for _ in parts) for parts in texts]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Each context's continuation up to the first of its stop strings, the end of the text or max_gen_toks."""
        engine = Engine(self._model, self._tokenizer)
        handles, stops = [], []
        for place, request in enumerate(requests):
            context, wishes = request.args
            params, until = _wishes(wishes)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {params.max_tokens}; it must leave room in the model's {self.max_length} tokens"
                )
            handles.append(engine.submit(Request(self.tok_encode(context)[-room:], params, stream=place)))
            stops.append(until)
        return self._texts(engine, handles, stops)

    def _texts(self, engine: Engine, handles: list[Generation], stops: list[list[str]]) -> list[str]:
        """Run all to their ends; one whose text has a stop string in it is ended there."""
        places = {id(handle): place for place, handle in enumerate(handles)}
        while engine.has_work:
            for update in engine.step():
                handle = update.generation
                text = self._tokenizer.decode(handle.token_ids)
                if any(stop in text for stop in stops[places[id(handle)]]):
                    engine.cancel(handle)
        texts = [self._tokenizer.decode(handle.token_ids) for handle in handles]
        return [_before(text, until) for text, until in zip(texts, stops, strict=True)]


def _wishes(given: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
    """A task's generation_kwargs: how to draw, and the strings to stop at."""
    wishes = dict(normalize_gen_kwargs(given))
    until, longest = [stop for stop in wishes.pop("until") if stop], wishes.pop("max_gen_toks")
    if not wishes.pop("do_sample"):
        wishes = {key: value for key, value in wishes.items() if key not in _SAMPLING}
    unknown = [key for key in wishes if key not in _SAMPLING]
    if unknown:
        raise ValueError(f"generation_kwargs has {unknown[0]!r}; known are until, max_gen_toks, do_sample and "
                         f"{', '.join(_SAMPLING)}")  # fmt: skip
    return SamplingParams(max_tokens=longest, **wishes), until


def _before(text: str, stops: list[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
