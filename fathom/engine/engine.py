"""Text around the core: `Engine` encodes prompts, decodes what comes, answers when all is there or piece by piece."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fathom.data.tokenizer import Tokenizer
from fathom.engine.core import Core
from fathom.engine.outputs import FinishReason, Generation, Update
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import Constraint, TokenLogprob
from fathom.model.transformer import Model

Prompt = str | Sequence[int]
"""A text, where the engine has a tokenizer, or token ids; a text is preceded by the begin token."""


@dataclass(frozen=True)
class Request:
    """A prompt and what is asked of it."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Larger goes first."""
    stream: int = 0
    """Requests of one seed draw differently if their streams differ."""
    trace: bool = False
    """Report which experts each token took, in `Generation.routing`."""
    constraint: Constraint | None = None
    """Restricts what may be generated. Its failure ends the request with the finish reason "error"."""


@dataclass(frozen=True)
class Completion:
    """A finished continuation."""

    generation: Generation
    text: str | None
    """The generated text; None in an engine without tokenizer."""

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens; a token that ended the text is the last."""
        return self.generation.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """stop: an end-of-text or stop token; length: max_tokens or the model's length; cancelled; error."""
        return self.generation.finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of each generated token, where asked for."""
        return self.generation.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Of each token of the prompt but the first, where asked for."""
        return self.generation.prompt_logprobs

    @property
    def acceptance(self) -> float:
        """Share of the first drafts accepted; NaN when none was made."""
        return self.generation.acceptance


class Engine:
    """Continues texts with a model: many at once, each with parameters of its own.

    engine = fathom.Engine(model, tokenizer)
    [answer] = engine.generate(["def main("], fathom.SamplingParams(max_tokens=64))
    for piece in engine.stream("def main("): print(piece, end="")

    Or step by step: `submit` requests at any time, call `step` while `has_work`. Greedy tokens do not depend on the
    other requests (in float32, up to rounding while prompts are read); sampled ones on their own seed and place.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        speculative: bool | int = True,
        max_batch: int = 32,
        page_size: int = 64,
        cache_tokens: int | None = None,
        prefill_budget: int | None = None,
        max_waiting: int | None = None,
        eager: bool = False,
    ) -> None:
        """Allocates the cache; the model is used where it lies.

        `speculative`: let the first MTP module draft as many tokens as pays by measured acceptance and cost; a number
        fixes the drafts per step; False decodes plainly. `max_batch`: requests that run at one time, the others wait;
        `max_waiting` limits those (`submit` then raises scheduler.QueueFull). `page_size`: tokens per page of the
        cache. `cache_tokens`: tokens the cache has room for; by default 4096 for each of `max_batch`, and one of the
        model's length at least. `prefill_budget`: tokens of prompts read per step while others decode, which bounds how
        long those wait; by default 512, on a GPU 2048. `eager`: plain torch alone.

        Raises ValueError for numbers out of range.
        """
        self.tokenizer = tokenizer
        self.core = Core(
            model,
            speculative,
            max_batch,
            page_size,
            cache_tokens,
            prefill_budget,
            max_waiting,
            eager,
            eos_ids=None if tokenizer is None else [tokenizer.eos_id, *model.config.other_eos_token_ids],
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return self.core.has_work

    def prepare(self) -> None:
        """Compile and record now, on a GPU, the steps of all batches that may decode, not when they first come."""
        self.core.prepare()

    def submit(self, request: Request) -> Generation:
        """Queue a request; returns the handle that `step` reports on.

        Raises ValueError for a prompt or parameters that cannot be served, scheduler.QueueFull when too many wait.
        """
        prompt = self.encode(request.prompt)
        return self.core.submit(
            prompt, request.params, request.priority, request.stream, request.trace, request.constraint
        )

    def cancel(self, handle: Generation) -> None:
        """End a request where it is."""
        self.core.cancel(handle)

    def step(self) -> list[Update]:
        """Let every request get on by one step; returns what is new."""
        return self.core.step()

    def step_phases(self) -> Iterator[list[Update]]:
        """The same in parts, each when it is there: what decoding brings need not wait for prompts to be read.

        Nothing else may be asked of the engine before the last of them.
        """
        return self.core.step_phases()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue all prompts, with the same parameters or one for each, greedily by default; in the prompts' order.

        Raises ValueError before anything runs if one of them cannot be served.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; it must be a list, such as [text]")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else params
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts; give one, or one for each")
        handles: list[Generation] = []
        try:
            for place, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                handles.append(self.submit(Request(prompt, own, stream=place)))
            while not all(handle.finished for handle in handles):
                self.step()
        except BaseException:
            for handle in handles:
                self.cancel(handle)
            raise
        return [self.completion(handle) for handle in handles]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The continuation of one text in pieces, as they become certain."""
        if self.tokenizer is None:
            raise ValueError("the engine has no tokenizer, so it has no text to stream: use submit and step")
        handle = self.submit(Request(prompt, params or SamplingParams()))
        text = IncrementalDetokenizer(self.tokenizer)
        try:
            while not handle.finished:
                for update in self.step():
                    if update.generation is handle:
                        yield text.add(update.tokens)
            yield text.rest()
        finally:
            self.cancel(handle)

    def completion(self, handle: Generation) -> Completion:
        """What a request has come to."""
        text = None if self.tokenizer is None else self.tokenizer.decode(handle.token_ids)
        return Completion(handle, text)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("the prompt is text, but the engine has no tokenizer: give it one, or token ids")
        return self.tokenizer.encode(prompt)


class IncrementalDetokenizer:
    """Text from tokens that come one after another; a character of several tokens waits for its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens are bytes, so whole characters depend on no token before.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.within = False
        """Whether the last token ended within a character."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        new = self._tokenizer.text_bytes(tokens)
        if new.isascii() and not self.within:
            return new.decode("ascii")
        text = self._decoder.decode(new)
        self.within = self._decoder.getstate()[0] != b""
        return text

    def rest(self) -> str:
        """What is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)


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
    """The text that follows `prompt`, without the prompt; it ends at the end-of-document token if one comes.

    The begin token precedes the prompt, so an empty prompt begins a document. For more than one text, or more control,
    make an `Engine`.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, seed=seed, max_tokens=max_new_tokens)
    [completion] = Engine(model, tokenizer, speculative, max_batch=1).generate([prompt], params)
    assert completion.text is not None
    return completion.text
