"""lm-eval's tasks (EleutherAI's language model evaluation harness) on our models.

lm-eval poses the questions and scores the answers; this is its model interface. Texts are tokenised as by its own `hf`
backend, so that results can be compared: in perplexity tasks BOS is both context and target. Only control tokens
differ: one that a text merely spells stays text, unless questions are put by the chat template, whose rendering lm-eval
passes on as a text.

A task's YAML file can name Python functions, which lm-eval runs: whoever chooses a task chooses to run its code.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from fathom.data.chat_template import ChatTemplate, special_spellings
from fathom.data.tokenizer import Tokenizer
from fathom.engine.engine import Engine
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
"""Sampling parameters that a task may set; the names are ours and lm-eval's."""


def run_tasks(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks, by their names or as YAML files; each one's metrics, as lm-eval names them.

    `few_shot` examples come before each question (None: as the task says); only the first `limit` questions are asked
    (None: all). `chat`: questions are put by the model's chat template. Raises ValueError for a task that does not
    exist or needs what is not there, and where there is no chat template.
    """
    adapter = HarnessModel(model, tokenizer, chat)
    try:
        found = lm_eval.simple_evaluate(
            adapter,
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat,
        )
    except KeyError as error:
        raise ValueError(f"lm-eval: {error.args[0]}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return results


class HarnessModel(TemplateLM):
    """lm-eval's model interface over the engine."""

    def __init__(self, model: Model, tokenizer: Tokenizer, chat: bool = False) -> None:
        """`chat`: lm-eval puts its questions by the chat template. Raises ValueError where there is none."""
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._device = model.embed_tokens.weight.device
        self._template = ChatTemplate(tokenizer) if chat else None
        spellings = special_spellings(tokenizer) if chat else []
        self._control = re.compile(f"({'|'.join(map(re.escape, spellings)) or '(?!)'})")

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

    @property
    def tokenizer_name(self) -> str:
        """Under which lm-eval caches what the chat template made."""
        return hashlib.sha256(self._tokenizer.tokenizer_json.encode()).hexdigest()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for lm-eval's records."""
        return str(self._tokenizer.config["chat_template"]) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model is to continue it, control tokens spelled out."""
        assert self._template is not None
        return self._template.render(chat_history, continue_final=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS unless it is declined, or the chat template has put it."""
        if self._template is None:
            return self._tokenizer.encode(string, bos=add_special_tokens is not False)
        pieces = self._control.split(string)
        first, *texts = self._tokenizer.encode_batch(pieces[::2])
        ids = list(first)
        for control, text in zip(pieces[1::2], texts, strict=True):
            ids += [cast(int, self._tokenizer.token_id(control)), *text]
        has_bos = ids[:1] == [self._tokenizer.bos_id]
        return ids if has_bos or add_special_tokens is False else [self._tokenizer.bos_id, *ids]

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
        """Each context's continuation up to the first of its stop strings, the end of the text or max_gen_toks.

        Where max_gen_toks would leave no room for a context, half of the model's context is generated, with a warning.
        Raises ValueError where the model's logits are no numbers.
        """
        engine = Engine(self._model, self._tokenizer)
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            own = _sampling_params(options)
            if own.max_tokens >= self.max_length:
                most = self.max_length // 2
                warnings.warn(
                    f"task {request.task_name}: max_gen_toks is {own.max_tokens}, and the model's context "
                    f"{self.max_length}: answers end after {most} tokens",
                    stacklevel=1,
                )
                own = replace(own, max_tokens=most)
            prompts.append(self.tok_encode(context)[-(self.max_length - own.max_tokens) :])
            params.append(own)
        completions = engine.generate(prompts, params)
        for request, completion in zip(requests, completions, strict=True):
            if completion.finish_reason == "error":
                raise ValueError(f"task {request.task_name}: an answer ends in an error: {completion.generation.error}")
        return [completion.text or "" for completion in completions]


def _sampling_params(generation_kwargs: dict[str, Any]) -> SamplingParams:
    """A task's generation_kwargs: how to draw, where to stop."""
    options = dict(normalize_gen_kwargs(generation_kwargs))
    stop, max_tokens = [each for each in options.pop("until") if each], options.pop("max_gen_toks")
    if not options.pop("do_sample"):
        options = {key: value for key, value in options.items() if key not in _SAMPLING}
    unknown = [key for key in options if key not in _SAMPLING]
    if unknown:
        raise ValueError(f"generation_kwargs has {unknown[0]!r}; known are until, max_gen_toks, do_sample and "
                         f"{', '.join(_SAMPLING)}")  # fmt: skip
    return SamplingParams(max_tokens=max_tokens, stop=stop, **options)
