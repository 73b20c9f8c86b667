"""A request: what the caller specifies, and its state inside the engine.

Shapes: N tokens, D hidden, T = drafts + 1 positions, O vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fathom.config import renamed_fields
from fathom.data.tokenizer import Tokenizer
from fathom.engine.batch import ForwardOutput, SequenceChunk
from fathom.engine.detokenizer import StopChecker
from fathom.engine.outputs import FinishReason, Generation
from fathom.engine.routing import PageRouting, RoutingRecord
from fathom.engine.sampling.sampler import SamplingParams, check_against
from fathom.engine.sampling.verify import Constraint, SampledTokens, SamplingState, prompt_logprobs
from fathom.engine.scheduler import SequenceState
from fathom.model.config import ModelConfig

Prompt = str | Sequence[int]
"""Text, where the engine has a tokenizer, or token ids. BOS is put before a text, not before ids."""


@renamed_fields(trace="return_routed_experts")
@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Requests of higher priority are scheduled first."""
    stream: int = 0
    """Requests with the same seed draw differently if their streams differ."""
    return_routed_experts: bool = False
    """Record the experts of every token, in `Generation.routed_experts`."""
    return_routing_weights: bool = False
    """Record their weights, too, in `Generation.routing_weights`."""
    return_distributions: bool = False
    """Record what each token was sampled from, in `Generation.sampled_from`."""
    constraint: Constraint | None = None
    """Restricts what may be generated. If it fails, the request ends with the finish reason "error"."""


@dataclass(eq=False)
class RequestState:
    """A request that is waiting or running."""

    generation: Generation
    sequence: SequenceState
    stream: int
    stop_ids: tuple[int, ...]
    """Token ids that end it."""
    constraint: Constraint | None
    stop_checker: StopChecker | None = None
    drafts: list[int] = field(default_factory=list)
    pending_ND: list[Tensor] = field(default_factory=list)
    """Hidden states of the latest tokens, whose pairs with the token after them the MTP module has not seen."""
    num_pending: int = 0

    @staticmethod
    def of(
        request: Request, prompt: list[int], limit: int, tokenizer: Tokenizer | None, config: ModelConfig
    ) -> "RequestState":
        """The state of a new request; `prompt` holds its token ids, `limit` is its sequence's."""
        params = request.params
        # The list of tokens is the sequence's own: it grows.
        sequence = SequenceState(list(prompt), limit, request.priority, reuse=params.prompt_logprobs is None)
        generation = Generation(prompt, params)
        if request.return_routed_experts:
            sequence.cache_salt = PageRouting.salt
            shape = (config.num_moe_layers, config.num_experts_per_tok)
            generation.routing = RoutingRecord(*shape, request.return_routing_weights)
        if request.return_distributions:
            generation.sampled_from = []
        stop_ids = params.stop_ids if params.ignore_eos else (*params.stop_ids, *eos_ids(config, tokenizer))
        checker = StopChecker(tokenizer, params.stop) if tokenizer is not None and params.stop else None
        return RequestState(generation, sequence, request.stream, stop_ids, request.constraint, checker)

    def sampling_state(self) -> SamplingState:
        """What sampling needs in this step."""
        sequence, params = self.sequence, self.generation.params
        allowed_TO = self._allowed()
        report = self.generation.sampled_from is not None
        return SamplingState(
            params, self.stream, sequence.tokens, sequence.prompt_length, self.stop_ids, self.drafts, allowed_TO, report
        )

    def decode_chunk(self) -> SequenceChunk:
        """The last token and its drafts, which a decoding step feeds."""
        tokens = self.sequence.tokens
        return SequenceChunk([tokens[-1], *self.drafts], len(tokens) - 1, self.sequence.pages)

    def advance_constraint(self, tokens: list[int]) -> None:
        """Tokens were generated."""
        if self.constraint is not None and not self.generation.error:
            try:
                self.constraint.take(tokens)
            except Exception as error:
                self.generation.error = f"{type(error).__name__}: {error}"

    def pending_chunk(self, keep: int) -> SequenceChunk:
        """The tokens of the pending pairs, all but the last `keep`."""
        tokens = self.sequence.tokens
        start = len(tokens) - self.num_pending
        return SequenceChunk(tokens[start : len(tokens) - keep], start, self.sequence.pages)

    def pop_pending(self, keep: int) -> Tensor:
        """Remove and return the pending hidden states (N, D), all but the last `keep`."""
        h_ND = torch.cat(self.pending_ND)
        end, self.num_pending = self.num_pending - keep, keep
        self.pending_ND = [h_ND[end:]] if keep else []
        return h_ND[:end]

    def clear_drafting(self) -> None:
        """Drop drafts and pending hidden states: it was preempted, or drafting has been switched off."""
        self.drafts, self.pending_ND, self.num_pending = [], [], 0

    def until_finished(self, sampled: SampledTokens) -> tuple[list[int], FinishReason | None]:
        """The sampled tokens up to one that ends the request, and why it does."""
        if self.generation.error:  # its constraint failed, and the tokens were sampled without it
            return [], "error"
        tokens = sampled.tokens
        for count, token in enumerate(tokens, start=1):
            if token in self.stop_ids:
                self.generation.stop_reason = token if token in self.generation.params.stop_ids else None
                return tokens[:count], "stop"
            if self.stop_checker is not None and (stop := self.stop_checker.completed_by(token)):
                self.generation.stop_reason = stop
                return tokens[:count], "stop"
            if len(self.sequence.tokens) + count == self.sequence.limit:
                return tokens[:count], "length"
        self.generation.error = sampled.error
        return tokens, None

    def add_prompt_logprobs(self, start: int, logits_NO: Tensor) -> None:
        """Report the prompt's tokens behind `start`, by the logits from there on."""
        generation = self.generation
        known = generation.prompt_logprobs or []
        # After a preemption the prompt is prefilled again, in other chunks: the first ones may be known in part.
        logits_NO = logits_NO[len(known) - start :]
        following = generation.prompt_ids[len(known) + 1 : len(known) + 1 + len(logits_NO)]
        if following:
            ids = torch.tensor(following, device=logits_NO.device)
            top = generation.params.prompt_logprobs or 0
            known = known + prompt_logprobs(logits_NO[: len(following)], ids, top)
        generation.prompt_logprobs = known

    def record_routing(self, start: int, output: ForwardOutput, first: int, count: int) -> None:
        """The pass's tokens `first` on are `count` tokens of the sequence, from its token `start` on."""
        if self.generation.routing is not None:
            experts_LNK, weights_LNK = (each_LNK[:, first : first + count] for each_LNK in output.routed)
            self.generation.routing.add(start, experts_LNK, weights_LNK)

    def _allowed(self) -> Tensor | None:
        """Which tokens the constraint allows (T, O). If it fails, this request alone ends, when the step is done."""
        if self.constraint is None or self.generation.error:
            return None
        try:
            allowed_TO = self.constraint.allowed(self.drafts)
            if not allowed_TO[0].any():
                raise ValueError("the constraint allows no token after the output so far")
        except Exception as error:
            self.generation.error = f"{type(error).__name__}: {error}"
            return None
        # Positions behind a draft that is not allowed do not matter, but an empty row cannot be sampled from.
        return allowed_TO | ~allowed_TO.any(-1, keepdim=True)


def check(request: Request, prompt: list[int], tokenizer: Tokenizer | None, vocab_size: int, max_length: int) -> None:
    """Raises ValueError for a request that cannot be served; `prompt` holds its token ids."""
    if not prompt:
        raise ValueError("the prompt is empty; it needs at least one token, such as BOS")
    wrong = next((token for token in prompt if not (isinstance(token, int) and 0 <= token < vocab_size)), None)
    if wrong is not None:
        raise ValueError(f"the prompt has token {wrong!r}; ids are integers from 0 to {vocab_size - 1}")
    if len(prompt) >= max_length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; with one more it must fit the model's length, "
            f"max_position_embeddings = {max_length}"
        )
    if request.params.stop and tokenizer is None:
        raise ValueError(f"stop is {list(request.params.stop)}, but the engine has no tokenizer: use stop_ids")
    check_against(request.params, vocab_size)
    if request.return_routing_weights and not request.return_routed_experts:
        raise ValueError("return_routing_weights is True; return_routed_experts must then be True, too")
    if request.return_distributions and request.params.temperature == 0:
        raise ValueError(
            "return_distributions is True; temperature must then be above 0: greedy tokens are not sampled"
        )
    if request.constraint is not None and request.params.min_tokens:
        raise ValueError(
            f"min_tokens is {request.params.min_tokens}; with a constraint, which may allow only EOS, it must be 0"
        )


def eos_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """What ends a text: the tokenizer's EOS, or else the model's, and further ones that the model names."""
    eos_id = config.eos_token_id if tokenizer is None else tokenizer.eos_id
    return () if eos_id is None else (eos_id, *config.other_eos_token_ids)


def absent_ids(config: ModelConfig, tokenizer: Tokenizer | None, device: torch.device) -> Tensor | None:
    """The ids (X) of the model's vocabulary that no token of the tokenizer has; None where there are none."""
    absent = [] if tokenizer is None else tokenizer.absent_ids(config.vocab_size)
    return torch.tensor(absent, device=device) if absent else None
