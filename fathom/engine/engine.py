"""The inference engine: many requests at once, over a paged latent cache, with drafts by the MTP module.

A step is schedule, draft, verify, append. It feeds every decoding request its last token and the drafts of the next
ones, and prefills a chunk of the prompts that are not computed yet. The logits decide per request; the latents of
rejected drafts are overwritten later. Plain decoding is the same step without drafts.

Shapes: N tokens, D hidden, O vocabulary.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fathom.data.tokenizer import Tokenizer
from fathom.engine import backends
from fathom.engine.batch import ForwardOutput, SequenceChunk
from fathom.engine.config import EngineConfig, merged
from fathom.engine.deprecated import OldNames
from fathom.engine.detokenizer import OutputStream
from fathom.engine.live_requests import LiveRequests
from fathom.engine.outputs import Completion, FinishReason, Generation, Stats, Update
from fathom.engine.page_pool import PagePool
from fathom.engine.proposer import Proposer, max_drafts
from fathom.engine.request import Prompt, Request, RequestState, absent_ids, check
from fathom.engine.routing import ExpertLoad, PageRouting
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import SampledTokens, verify
from fathom.engine.scheduler import PrefillChunk, Scheduler
from fathom.engine.weights import update_parameters
from fathom.model.transformer import Model

if TYPE_CHECKING:
    from fathom.data.chat_template import ChatTemplate


class Engine(OldNames):
    """Continues prompts with a model: many at once, each with its own parameters. For one thread at a time.

    engine = fathom.Engine(model, tokenizer)
    [answer] = engine.generate(["def main("], fathom.SamplingParams(max_tokens=64))
    for text in engine.stream("def main("): print(text, end="")

    Or step by step: `submit` requests at any time, call `step` while `has_work`. Greedy tokens do not depend on the
    other requests (in float32, up to rounding during prefill); sampled ones depend on their own seed and position.
    Calls may be interleaved: a step works on the requests of all. While some are not finished, `submit`, `step` and
    `cancel` raise RuntimeError in another thread than theirs.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None = None, config: EngineConfig | None = None, **overrides: Any
    ) -> None:
        """Allocates the cache; the model's weights are used where they lie.

        `overrides` replace single fields of `config`: Engine(model, tokenizer, max_batch=8). Without a tokenizer
        prompts are token ids. Raises ValueError for settings out of range.
        """
        self.model, self.tokenizer = model, tokenizer
        self.config = merged(config, overrides)
        self.max_length = model.config.max_position_embeddings
        """Tokens that a prompt and its continuation may have together."""
        self.speculative = bool(self.config.speculative) and model.config.num_nextn_predict_layers > 0
        """Whether the MTP module may draft."""
        device = model.embed_tokens.weight.device
        pages, size = self.config.pages(self.max_length), self.config.page_size
        self.pool = PagePool(pages, size)
        budget = self.config.prefill_tokens(device.type)
        self.scheduler = Scheduler(self.pool, self.config.max_batch, budget, self.speculative, self.config.max_waiting)
        drafts = self.config.fixed_drafts
        positions = self.max_length + max_drafts(drafts) + 2
        self.backend = backends.choose(model, pages, size, positions, self.config.eager)
        self._proposer = Proposer(self.backend, self.speculative, drafts)
        self._load = ExpertLoad(model.config.num_moe_layers, model.config.n_routed_experts, device)
        self._page_routing = PageRouting()
        self._absent_X = absent_ids(model.config, tokenizer, device)
        self._steps = self._prompt_tokens = self._generated_tokens = self._drafted = self._accepted = 0
        self._requests = LiveRequests()

    # ------------------------------------------------------------------------------------ whole continuations

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
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                handles.append(self.submit(Request(prompt, own, stream=index)))
            while not all(handle.finished for handle in handles):
                self.step()
        except BaseException:
            for handle in handles:
                self.cancel(handle)
            raise
        return [self.completion(handle) for handle in handles]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """One prompt's continuation, piece by piece as its text becomes final; RuntimeError where an error ends it."""
        if self.tokenizer is None:
            raise ValueError("the engine has no tokenizer, so it has no text to stream: use submit and step")
        handle = self.submit(prompt, params)
        output = OutputStream(handle, self.tokenizer)
        try:
            while output.finish_reason is None:
                if not handle.finished:  # as it may be by the steps of others
                    self.step()
                if text := output.new_text():
                    yield text
            if handle.error is not None:
                raise RuntimeError(handle.error)
        finally:
            self.cancel(handle)

    def completion(self, handle: Generation) -> Completion:
        """A request's result."""
        return Completion(handle, None if self.tokenizer is None else OutputStream(handle, self.tokenizer).new_text())

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("the prompt is text, but the engine has no tokenizer: give it one, or token ids")
        return self.tokenizer.encode(prompt)

    def chat(self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The model's answer to a conversation: messages of OpenAI's protocol, [{"role": "user", "content": …}].

        Raises ValueError where there is no chat template, or it refuses the messages.
        """
        [answer] = self.generate([self.encode_chat(messages)], params)
        return answer

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Raises ValueError as `chat` does."""
        return self.chat_template.encode(messages)

    @cached_property
    def chat_template(self) -> "ChatTemplate":
        """The one that came with the tokenizer.

        Raises ValueError where there is no tokenizer, or it has no chat template; ImportError without jinja2.
        """
        if self.tokenizer is None:
            raise ValueError("the engine has no tokenizer, so it has no chat template: give it the model's tokenizer")
        try:
            from fathom.data.chat_template import ChatTemplate  # jinja2 comes with the extra "serve"
        except ModuleNotFoundError as error:
            raise ImportError(f"chat templates need {error.name}: pip install 'fathom-lm[serve]'") from error
        return ChatTemplate(self.tokenizer)

    # ------------------------------------------------------------------------------------------- step by step

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return len(self._requests) > 0

    def submit(self, request: Request | Prompt, params: SamplingParams | None = None) -> Generation:
        """Queue a request, or a prompt with these parameters; returns the handle that `step` reports on.

        Raises ValueError for a prompt or parameters that cannot be served, scheduler.QueueFull when too many wait,
        RuntimeError while another thread's requests are not finished.
        """
        if not isinstance(request, Request):
            request = Request(request, params or SamplingParams())
        elif params is not None:
            raise ValueError("params is given beside a Request, which has its own; give one of them")
        prompt = self.encode(request.prompt)
        check(request, prompt, self.tokenizer, self.model.config.vocab_size, self.max_length)
        if not self._requests:
            self._proposer.resume_if_due(self._steps)
        limit = min(len(prompt) + request.params.max_tokens, self.max_length, self.pool.slots)
        state = RequestState.of(request, prompt, limit, self.tokenizer, self.model.config)
        self._requests.add(state, self.scheduler)
        return state.generation

    def cancel(self, handle: Generation) -> None:
        """End a request where it is; does nothing to one that has finished."""
        request = self._requests.of(handle)
        if request is not None:
            self._requests.check_thread()
            self._finish(request, "cancelled")

    def step(self) -> list[Update]:
        """Run one engine step; returns the new tokens of every request that got some, whoever submitted it.

        What other steps brought a request, such as those of a stream, is in its `Generation.token_ids` as well.
        """
        return list(chain.from_iterable(self.step_phases()))

    def step_phases(self) -> Iterator[list[Update]]:
        """A step in phases, decoding then prefill: the tokens of decoding need not wait for the prefill.

        Must be exhausted before any other method is called.
        """
        self._requests.check_thread()
        decoding = sum(sequence.computed >= sequence.prefill_length for sequence in self.scheduler.running)
        plan = self.scheduler.schedule(self._proposer.num_drafts(decoding))
        self._steps += bool(plan.decode or plan.prefill)
        if plan.decode:
            yield self._decode([self._requests[sequence] for sequence in plan.decode], plan.drafts)
        if plan.prefill:
            yield self._prefill(plan.prefill)

    # ------------------------------------------------------------------------------------------ the whole engine

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights in place, given by their names in `Model.state_dict()`; those not given stay as they are.

        Values are converted to each parameter's type, and quantised again where it is int8 or int4. Tensors that the
        model shares with others change for them, too: `fathom.quantized` shares what it does not quantise. The prefix
        cache and the measurements of drafting start afresh. Raises RuntimeError while requests are not finished, whose
        latents would mix old and new weights; ValueError, before anything changes, for an unknown name, another shape,
        or values that are not floating-point numbers.
        """
        if self.has_work:
            problem = f"{len(self._requests)} requests are not finished"
            raise RuntimeError(f"{problem}; step until has_work is False, or cancel them")
        update_parameters(self.model, tensors)
        self.backend.refresh_weights()
        self.reset_prefix_cache()
        self._proposer.reset()

    def reset_prefix_cache(self) -> None:
        """Discard cached prefixes. Running requests keep their pages, which later requests will not find."""
        self.pool.reset()

    def warm_up(self) -> None:
        """Compile kernels and capture graphs now, on a GPU, for all batches that may decode."""
        self.backend.warm_up(self.config.max_batch * (1 + self._proposer.max_drafts))

    @property
    def compile_seconds(self) -> float:
        """Seconds spent so far on compiling kernels and capturing graphs."""
        return self.backend.compile_seconds

    def stats(self) -> Stats:
        """Counts and sizes, as they are now."""
        pool, cache = self.pool, self.backend.cache
        return Stats(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=pool.matched_tokens,
            generated_tokens=self._generated_tokens,
            drafted=self._drafted,
            accepted=self._accepted,
            preempted=self.scheduler.preemptions,
            pages=pool.pages,
            pages_used=pool.pages - pool.available,
            pages_reusable=pool.evictable,
            page_size=pool.page_size,
            bytes_per_token=cache.bytes_per_token,
            cache_bytes=cache.latents_LMW.nbytes,
            tokens_per_expert_LE=self._load.total(),
            compile_seconds=self.compile_seconds,
        )

    # ------------------------------------------------------------------------------------------------- decoding

    def _decode(self, batch: list[RequestState], drafts: int) -> list[Update]:
        caught_up = self._proposer.is_caught_up(batch)
        began = time.perf_counter()
        self._proposer.propose(batch, drafts)
        fed = drafts + 1
        output = self._forward([request.decode_chunk() for request in batch], range(fed * len(batch)))
        sampled = verify(output.logits_NO, [request.sampling_state() for request in batch], self._absent_X)
        updates = []
        for index, (request, own) in enumerate(zip(batch, sampled, strict=True)):
            first = index * fed
            request.record_routing(len(request.sequence.tokens) - 1, output, first, own.accepted + 1)
            update = self._append(request, own, output.h_ND, first)
            accepted = min(own.accepted, len(update.tokens))  # those behind a token that ended it are in no answer
            self._drafted, self._accepted = self._drafted + drafts, self._accepted + accepted
            request.generation.count_drafts(drafts, accepted)
            updates.append(update)
        seconds = time.perf_counter() - began
        if self._proposer.record(drafts, [own.accepted for own in sampled], seconds, caught_up):
            self._proposer.pause(self._steps, self._requests)
        return updates

    def _forward(self, chunks: list[SequenceChunk], logits_indices: Sequence[int]) -> ForwardOutput:
        output = self.backend.forward(chunks, logits_indices)
        self._load.add(output.routed.experts_LNK)
        return output

    # -------------------------------------------------------------------------------------------------- prefill

    def _prefill(self, scheduled: list[PrefillChunk]) -> list[Update]:
        logits_indices: list[int] = []
        chunks, fed = [], 0
        for part in scheduled:
            sequence, generation = part.sequence, self._requests[part.sequence].generation
            tokens = sequence.tokens[part.start : part.end]
            chunks.append(SequenceChunk(tokens, part.start, sequence.pages, part.write_from))
            fed += part.num_tokens
            generation.started = generation.started or time.monotonic()
            if generation.params.prompt_logprobs is not None:
                logits_indices += range(fed - part.num_tokens, fed)
            elif part.is_last:
                logits_indices.append(fed - 1)
        self._prompt_tokens += fed
        output = self._forward(chunks, logits_indices)
        return self._after_prefill(scheduled, output)

    def _after_prefill(self, scheduled: list[PrefillChunk], output: ForwardOutput) -> list[Update]:
        """Book what a prefill pass computed; sample the first token where a sequence's last chunk was among it."""
        complete: list[tuple[RequestState, Tensor]] = []
        last_logits, fed, used = [], 0, 0
        mtp_chunks, mtp_hidden = [], []
        for part in scheduled:
            sequence, request = part.sequence, self._requests[part.sequence]
            if sequence.computed == sequence.matched:
                if request.generation.routing is not None:
                    matched = sequence.pages[: sequence.matched // self.pool.page_size]
                    self._page_routing.load(request.generation.routing, matched)
                request.clear_drafting()
                if sequence.preemptions == 0:
                    request.generation.cached_tokens = sequence.matched
            request.record_routing(part.start, output, fed, part.num_tokens)
            h_ND = output.h_ND[fed : fed + part.num_tokens]
            fed += part.num_tokens
            num_logits = int(part.is_last)
            if request.generation.params.prompt_logprobs is not None:
                num_logits = part.num_tokens
                request.add_prompt_logprobs(part.start, output.logits_NO[used : used + num_logits])
            used += num_logits
            # The pair with the token that is sampled now stays pending until the next draft.
            pairs = part.num_tokens - part.is_last
            if self._proposer.is_active and pairs:
                tokens = sequence.tokens[part.start + 1 : part.start + 1 + pairs]
                mtp_chunks.append(SequenceChunk(tokens, part.start + 1, sequence.pages))
                mtp_hidden.append(h_ND[:pairs])
            sequence.computed = sequence.ready = part.end
            if part.is_last:
                complete.append((request, h_ND[-1:]))
                last_logits.append(used - 1)
            else:
                self._register_prefix(request)
        self._proposer.add_prefill(mtp_chunks, mtp_hidden)
        if not complete:
            return []
        sampled = verify(output.logits_NO[last_logits], [each.sampling_state() for each, _ in complete], self._absent_X)
        return [self._append(request, own, h_1D, 0) for (request, h_1D), own in zip(complete, sampled, strict=True)]

    # ------------------------------------------------------------------------------------------------ new tokens

    def _append(self, request: RequestState, sampled: SampledTokens, h_ND: Tensor, first: int) -> Update:
        """Append sampled tokens up to one that ends the request; `h_ND` from `first` on holds the hidden states before
        them."""
        generation, sequence = request.generation, request.sequence
        request.drafts = []
        tokens, reason = request.until_finished(sampled)
        request.advance_constraint(tokens)
        if generation.error:
            reason = "error"
        sequence.tokens += tokens
        generation.add(sampled, len(tokens))
        self._generated_tokens += len(tokens)
        sequence.computed = len(sequence.tokens) - 1
        if generation.routing is not None:
            # The pass also computed accepted drafts behind a token that ends the request.
            generation.routing.truncate(sequence.computed)
        if self._proposer.is_active:
            request.pending_ND.append(h_ND[first : first + len(tokens)])
            request.num_pending += len(tokens)
        sequence.ready = len(sequence.tokens) - max(request.num_pending, 1)
        self._register_prefix(request)
        if reason:
            self._finish(request, reason)
        return Update(generation, tokens)

    def _register_prefix(self, request: RequestState) -> None:
        sequence, record = request.sequence, request.generation.routing
        before = sequence.registered
        self.scheduler.register_prefix(sequence)
        if record is not None:
            self._page_routing.save(record, sequence.pages, before, sequence.registered, self.pool.page_size)

    def _finish(self, request: RequestState, reason: FinishReason) -> None:
        request.generation.finish_reason = reason
        self.scheduler.finish(request.sequence)
        self._requests.remove(request)
