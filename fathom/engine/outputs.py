"""What the engine returns: each request's output, a step's new tokens, statistics."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fathom.engine.routing import RoutingRecord
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import SampledFrom, SampledTokens, TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Generation:
    """A request's continuation as it grows, and what it took; also the handle to cancel it by."""

    prompt_ids: list[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    """The generated tokens; a token that ended it is the last."""
    finish_reason: FinishReason | None = None
    """stop: EOS, a stop token or a stop string; length: max_tokens or the model's length; cancelled: `Engine.cancel`;
    error: see `error`; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for EOS and where it ended otherwise."""
    error: str | None = None
    """What went wrong: its constraint failed, or no token could be sampled, as with logits that are not finite."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, where requested."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """One for each token of the prompt but the first, where requested."""
    sampled_from: list[SampledFrom] | None = None
    """One for each of `token_ids`, where requested."""
    accepted_mask: list[bool] = field(default_factory=list)
    """For each of `token_ids`, whether it was a draft that the model accepted."""
    offered_at: list[int] = field(default_factory=list)
    """How often a first, second, … draft was put before the model."""
    accepted_at: list[int] = field(default_factory=list)
    """How often it was accepted."""
    forwards: int = 0
    """Forward passes of the main model after the prompt's, which yields the first token."""
    cached_tokens: int = 0
    """Tokens of the prompt whose latents were found in the cache."""
    started: float | None = None
    """When its prompt was first read, by time.monotonic; until then it waited."""
    routing: RoutingRecord | None = field(default=None, repr=False)
    """See `routed_experts`."""

    @property
    def routed_experts(self) -> Tensor | None:
        """Where requested, the experts of every token whose hidden state was computed, (L MoE layers, T, K) int16.

        T counts the prompt, prefix-cached tokens included, and the output but for its last token, which is not fed
        once the request has finished. Rejected drafts are not among them.
        """
        return None if self.routing is None else self.routing.experts()

    @property
    def routing_weights(self) -> Tensor | None:
        """Where requested, the weights of `routed_experts`, float32; NaN for prefix-cached tokens."""
        return None if self.routing is None else self.routing.weights()

    def add(self, sampled: SampledTokens, count: int) -> None:
        """The first `count` of the sampled tokens are part of the output."""
        self.token_ids += sampled.tokens[:count]
        self.accepted_mask += [index < sampled.accepted for index in range(count)]
        if sampled.logprobs is not None:
            self.logprobs = (self.logprobs or []) + sampled.logprobs[:count]
        if self.sampled_from is not None:
            self.sampled_from += (sampled.sampled_from or [])[:count]

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """A forward pass verified drafts."""
        self.forwards += 1
        for counts, reached in ((self.offered_at, drafted), (self.accepted_at, accepted)):
            counts += [0] * (drafted - len(counts))
            for depth in range(reached):
                counts[depth] += 1

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def drafted(self) -> int:
        """Drafts put before the main model."""
        return sum(self.offered_at)

    @property
    def accepted(self) -> int:
        """Drafts accepted; the others were wasted."""
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float:
        """Share of the first drafts accepted; NaN when none was made."""
        return self.accepted_at[0] / self.offered_at[0] if self.drafted else math.nan

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decided per forward pass; plain decoding makes 1. NaN before the second token."""
        return (len(self.token_ids) - 1) / self.forwards if self.forwards else math.nan


@dataclass(frozen=True)
class Completion:
    """A finished request's output."""

    generation: Generation
    text: str | None
    """The generated text, without the stop string or token that ended it; None in an engine without tokenizer."""

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens; a token that ended the request is the last."""
        return self.generation.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """stop: EOS, a stop token or a stop string; length: max_tokens or the model's length; cancelled; error."""
        return self.generation.finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of each generated token, where requested."""
        return self.generation.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Of each token of the prompt but the first, where requested."""
        return self.generation.prompt_logprobs

    @property
    def acceptance(self) -> float:
        """Acceptance rate of the first drafts; NaN when none was made."""
        return self.generation.acceptance


class Update(NamedTuple):
    """What a step brought one request."""

    generation: Generation
    tokens: list[int]
    """Its new tokens, which are in `generation.token_ids` already."""


@dataclass(frozen=True)
class Stats:
    """What an engine does now, and what it has done since it was made."""

    waiting: int
    """Requests without pages, those that were preempted among them."""
    running: int
    """Requests that read their prompt or decode."""
    steps: int
    prompt_tokens: int
    """Tokens read, not counting those found in the cache; after a preemption tokens are read again."""
    cached_prompt_tokens: int
    """Tokens found in the cache instead."""
    generated_tokens: int
    drafted: int
    """Drafts put before the main model."""
    accepted: int
    preempted: int
    """How often a request had to give back its pages and wait."""
    pages: int
    pages_used: int
    """Pages that requests hold."""
    pages_reusable: int
    """Pages that no request holds, kept in the prefix cache until they are evicted."""
    page_size: int
    """Tokens per page."""
    bytes_per_token: int
    """Of the latent cache, all layers together."""
    cache_bytes: int
    """Allocated for the cache."""
    tokens_per_expert_LE: Tensor
    """How many tokens, rejected drafts included, each expert of each MoE layer of the main model has served, int64."""
    compile_seconds: float
    """Spent on compiling and recording steps for a GPU."""
