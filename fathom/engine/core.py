"""The engine's core: requests of token ids in, tokens out, many at once. `step` is schedule, draft, verify, decide.

One step feeds every decoding sequence its last token and the drafts of the next ones, and reads a chunk of the
prompts that are still being read. What the logits say is decided per request; the latents of rejected drafts are
written over later. Plain decoding is the same step without drafts.

A draft of t_{i+2} comes from the first MTP module fed with (state h_i, token t_{i+1}); further ones from the module fed
with its own state and draft. The module's cache entry of that pair lies at slot i+1, and it must have seen every pair
from the prompt's first on: states whose pairs it has not seen yet are `pending`, also while nothing is drafted.

Shapes: N tokens, D hidden, M drafts, O vocabulary.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import cast

import torch
from torch import Tensor

from fathom.engine.backends.eager import Output, Runner, SequenceChunk
from fathom.engine.outputs import FinishReason, Generation, Stats, TokenRouting, Update
from fathom.engine.page_pool import PagePool
from fathom.engine.sampling.sampler import SamplingParams, check_against
from fathom.engine.sampling.verify import Constraint, SampledTokens, SamplingState, draft, prompt_logprobs, verify
from fathom.engine.scheduler import PrefillChunk, Scheduler, SequenceState
from fathom.engine.speculative import DraftLength
from fathom.model.block import Block
from fathom.model.cached_batch import Routed
from fathom.model.config import ModelConfig
from fathom.model.moe import MoE
from fathom.model.transformer import Model

_MOST_DRAFTS = 4
"""Drafts per step that adapting goes up to."""

_MOST_PENDING = 32
"""States a sequence keeps for the drafting module while nothing is drafted; it then takes them in together."""

_SLEEP_STEPS = 8192
"""Steps for which the drafting module is not kept up to date where drafts are is_unprofitable."""

_MOST_UNCOUNTED = 64
"""Passes whose routing is kept until all of it is counted at once."""

_PREFILL_BUDGETS = {"cpu": 512, "cuda": 2048}
"""Tokens of prompts read per step while others decode: a GPU is not busy with fewer."""

_USUAL_LENGTH = 4096
"""Tokens per sequence the cache has room for unless its size is given; longer ones take the room of others."""


@dataclass(eq=False)
class _Active:
    """A request on its way."""

    generation: Generation
    sequence: SequenceState
    stream: int
    ending: tuple[int, ...]
    """Ids that end it."""
    constraint: Constraint | None
    drafts: list[int] = field(default_factory=list)
    pending_ND: list[Tensor] = field(default_factory=list)
    """States whose pairs with the latest tokens the drafting module has not seen."""
    pending: int = 0
    """How many they are."""

    def row(self) -> SamplingState:
        sequence, params = self.sequence, self.generation.params
        prompt = sequence.prompt_length
        return SamplingState(params, self.stream, sequence.tokens, prompt, self.ending, self.drafts, self._allowed())

    def _allowed(self) -> Tensor | None:
        """What the constraint says. Its failure is this request's alone, and ends it when the step is done."""
        if self.constraint is None or self.generation.error:
            return None
        try:
            allowed_TO = self.constraint.allowed(self.drafts)
            if not allowed_TO[0].any():
                raise ValueError("the constraint allows no token after the output so far")
        except Exception as error:
            self.generation.error = f"{type(error).__name__}: {error}"
            return None
        # A draft that is not allowed ends what matters.
        return allowed_TO | ~allowed_TO.any(-1, keepdim=True)

    def taken(self, tokens: list[int]) -> None:
        """Tell the constraint."""
        if self.constraint is not None and not self.generation.error:
            try:
                self.constraint.take(tokens)
            except Exception as error:
                self.generation.error = f"{type(error).__name__}: {error}"

    def unseen(self, left: int) -> SequenceChunk:
        """The tokens of the pending pairs, all but the last `left`."""
        tokens = self.sequence.tokens
        start = len(tokens) - self.pending
        return SequenceChunk(tokens[start : len(tokens) - left], start, self.sequence.pages)

    def take_pending(self, left: int) -> Tensor:
        """Take out the pending states (N, D), all but the last `left`."""
        h_ND = torch.cat(self.pending_ND)
        end, self.pending = self.pending - left, left
        self.pending_ND = [h_ND[end:]] if left else []
        return h_ND[:end]

    def forget(self) -> None:
        """It was preempted: everything is read again."""
        self.drafts, self.pending_ND, self.pending = [], [], 0


class Core:
    """Serves requests with one model; not for several threads at once."""

    def __init__(
        self,
        model: Model,
        speculative: bool | int = True,
        max_batch: int = 32,
        page_size: int = 64,
        cache_tokens: int | None = None,
        prefill_budget: int | None = None,
        max_waiting: int | None = None,
        eager: bool = False,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        """See `fathom.Engine`, which passes these on. `eos_ids` end a text; by default the configuration's."""
        config = model.config
        self.eos_ids = tuple(eos_ids) if eos_ids is not None else _configured_eos(config)
        self.config, self.max_length = config, config.max_position_embeddings
        if not isinstance(speculative, bool) and not 0 <= speculative <= 16:
            raise ValueError(f"speculative is {speculative}; it must be True, False, or a number of drafts up to 16")
        self.drafting = bool(speculative) and config.num_nextn_predict_layers > 0
        self._fixed_drafts = None if speculative is True else int(speculative)
        most = _MOST_DRAFTS if self._fixed_drafts is None else self._fixed_drafts
        pages = _pages(config, max_batch, page_size, cache_tokens)
        self._max_batch = max_batch
        self.pool = PagePool(pages, page_size)
        if prefill_budget is None:
            prefill_budget = _PREFILL_BUDGETS["cuda" if model.embed_tokens.weight.is_cuda else "cpu"]
        self.scheduler = Scheduler(self.pool, max_batch, prefill_budget, self.drafting, max_waiting)
        self.runner = Runner(model, pages, page_size, self.max_length + most + 2, eager)
        self.lengths = DraftLength(most if self.drafting else 0)
        self._asleep_since: int | None = None
        """The step since which nobody drafts and the module is not kept up to date; None while it is."""
        self._steps = self._prompt_tokens = self._generated_tokens = self._drafted = self._accepted = 0
        layers = sum(isinstance(layer.mlp, MoE) for layer in cast(Iterable[Block], model.layers))
        device = model.embed_tokens.weight.device
        self._load_LE = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=device)
        self._uncounted: list[Tensor] = []
        self._active: dict[SequenceState, _Active] = {}
        self._of: dict[Generation, _Active] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._active)

    def prepare(self) -> None:
        """Make ready, on a GPU, the steps of all batches that may decode: a server's first requests need not wait."""
        drafts = self.lengths.most if self._fixed_drafts is None else self._fixed_drafts
        self.runner.prepare(self._max_batch * (1 + (drafts if self.drafting else 0)))

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        stream: int = 0,
        trace: bool = False,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Queue a request; see `engine.Request` for what is asked of it.

        Raises ValueError for a prompt or parameters that cannot be served, scheduler.QueueFull when too many wait.
        """
        prompt = list(prompt)
        self._check(prompt, params)
        if constraint is not None and params.min_tokens:
            raise ValueError(
                f"min_tokens is {params.min_tokens}; with a constraint it must be 0, for that may allow the end alone"
            )
        self._wake()
        # The list of tokens is the sequence's own: it grows.
        limit = min(len(prompt) + params.max_tokens, self.max_length, self.pool.slots)
        sequence = SequenceState(list(prompt), limit, priority, reuse=params.prompt_logprobs is None)
        self.scheduler.add(sequence)
        ending = params.stop_ids if params.ignore_eos else (*params.stop_ids, *self.eos_ids)
        generation = Generation(prompt, params, routing=[] if trace else None)
        active = _Active(generation, sequence, stream, ending, constraint)
        self._active[sequence] = self._of[generation] = active
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request where it is; does nothing to one that has ended."""
        active = self._of.get(generation)
        if active is not None:
            self._end(active, "cancelled")

    def step(self) -> list[Update]:
        """Let everybody get on by one step; returns what is new, nothing where there is nothing to do."""
        return list(chain.from_iterable(self.step_phases()))

    def step_phases(self) -> Iterator[list[Update]]:
        """A step in parts: what decoding brought, then what reading prompts brought. To be gone through to its end."""
        decoding = sum(sequence.computed >= sequence.to_read for sequence in self.scheduler.running)
        plan = self.scheduler.schedule(self._wanted_drafts(decoding))
        self._steps += bool(plan.decode or plan.prefill)
        if plan.decode:
            yield self._decode([self._active[sequence] for sequence in plan.decode], plan.drafts)
        if plan.prefill:
            yield self._prefill(plan.prefill)

    def stats(self) -> Stats:
        """Counts and sizes, as they are now."""
        pool, latents_LMW = self.pool, self.runner.cache.latents_LMW
        self._count_loads()
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
            bytes_per_token=latents_LMW[:, 0].numel() * latents_LMW.element_size(),
            cache_bytes=latents_LMW.numel() * latents_LMW.element_size(),
            tokens_per_expert_LE=self._load_LE.clone(),
            compile_seconds=self.runner.compile_seconds,
        )

    # ------------------------------------------------------------------------------------------------- decoding

    @property
    def _keeps_up(self) -> bool:
        """Whether the drafting module sees what the main model does."""
        return self.drafting and self._asleep_since is None

    def _sleep(self) -> None:
        """Give drafting up for long: what the module has not seen it never will."""
        self._asleep_since = self._steps
        for active in self._active.values():
            active.forget()

    def _wake(self) -> None:
        """Try anew after long, with sequences that the module sees from their first token on.

        Beginnings shared from meanwhile it has not seen: drafts behind them are worse, which accepting finds out.
        """
        if self._asleep_since is not None and not self._active and self._steps >= self._asleep_since + _SLEEP_STEPS:
            self._asleep_since, self.lengths = None, DraftLength(self.lengths.most)

    def _wanted_drafts(self, batch: int) -> int:
        if not self._keeps_up:
            return 0
        return self.lengths.choose(max(batch, 1)) if self._fixed_drafts is None else self._fixed_drafts

    def _decode(self, batch: list[_Active], drafts: int) -> list[Update]:
        # What piled up while nothing was drafted is no cost of drafting once.
        caught_up = all(active.pending <= _MOST_DRAFTS + 1 for active in batch)
        began = time.perf_counter()
        self._draft(batch, drafts)
        chunks = []
        for active in batch:
            tokens = active.sequence.tokens
            chunks.append(SequenceChunk([tokens[-1], *active.drafts], len(tokens) - 1, active.sequence.pages))
        fed = drafts + 1
        output = self._main(chunks, range(fed * len(batch)))
        decisions = verify(output.logits_NO, [active.row() for active in batch])
        updates = []
        for place, (active, decision) in enumerate(zip(batch, decisions, strict=True)):
            self._count(active.generation, drafts, decision.accepted)
            first = place * fed
            self._trace(active.generation, len(active.sequence.tokens) - 1, output.routed, first, decision.accepted + 1)
            updates.append(self._take(active, decision, output.h_ND, first))
        if self._keeps_up and self._fixed_drafts is None and (caught_up or not drafts):
            accepted_at = [sum(decision.accepted > place for decision in decisions) for place in range(drafts)]
            self.lengths.record(len(batch), drafts, len(batch), accepted_at, time.perf_counter() - began)
            if drafts and self.lengths.is_unprofitable(len(batch)):
                self._sleep()
        return updates

    def _draft(self, batch: list[_Active], drafts: int) -> None:
        """Show the module what it has not seen and have it draft; without drafts, only where much has piled up."""
        if not self._keeps_up:
            return
        if drafts == 0:
            self._catch_up([active for active in batch if active.pending >= _MOST_PENDING], 0)
            return
        self._catch_up([active for active in batch if active.pending > max(drafts, _MOST_DRAFTS) + 1], 1)
        chunks = [active.unseen(0) for active in batch]
        ends = [end - 1 for end in accumulate(active.pending for active in batch)]
        output = self.runner.draft(chunks, torch.cat([active.take_pending(0) for active in batch]), ends)
        h_BD = output.h_ND[ends]
        for place in range(drafts):
            ids = draft(output.logits_NO, [active.row() for active in batch])
            for active, token in zip(batch, ids, strict=True):
                active.drafts.append(token)
            if place + 1 < drafts:
                chunks = [
                    SequenceChunk(active.drafts[-1:], len(active.sequence.tokens) + place, active.sequence.pages)
                    for active in batch
                ]
                output = self.runner.draft(chunks, h_BD, range(len(batch)))
                h_BD = output.h_ND

    def _catch_up(self, behind: list[_Active], left: int) -> None:
        """Have the module take in the pending pairs, all but the last `left` of each."""
        if behind:
            chunks = [active.unseen(left) for active in behind]
            self.runner.write_mtp_kv_cache(chunks, torch.cat([active.take_pending(left) for active in behind]))

    def _main(self, chunks: list[SequenceChunk], logits_indices: Sequence[int]) -> Output:
        output = self.runner.main(chunks, logits_indices)
        self._uncounted.append(output.routed.experts_LNK)
        if len(self._uncounted) == _MOST_UNCOUNTED:
            self._count_loads()
        return output

    def _count_loads(self) -> None:
        if self._uncounted:
            experts_LX = torch.cat(self._uncounted, dim=1).flatten(1)
            self._load_LE.scatter_add_(1, experts_LX, torch.ones_like(experts_LX))
            self._uncounted.clear()

    @staticmethod
    def _trace(generation: Generation, start: int, routed: Routed, first: int, count: int) -> None:
        """Note what `count` tokens took, the first of which is the sequence's token `start` and the pass's `first`."""
        if generation.routing is None:
            return
        experts_NLK = routed.experts_LNK[:, first : first + count].transpose(0, 1).tolist()
        weights_NLK = routed.weights_LNK[:, first : first + count].transpose(0, 1).tolist()
        # Tokens whose latents were found in the cache took experts that nobody saw. All in one assignment, as another
        # thread may be reading the list.
        known = min(start, len(generation.routing))
        found: list[TokenRouting | None] = [None] * (start - known)
        found += [TokenRouting(*facts) for facts in zip(experts_NLK, weights_NLK, strict=True)]
        generation.routing[known : start + count] = found

    def _count(self, generation: Generation, drafts: int, accepted: int) -> None:
        self._drafted, self._accepted = self._drafted + drafts, self._accepted + accepted
        generation.forwards += 1
        for counts, reached in ((generation.offered_at, drafts), (generation.accepted_at, accepted)):
            counts += [0] * (drafts - len(counts))
            for place in range(reached):
                counts[place] += 1

    # ------------------------------------------------------------------------------------------- reading prompts

    def _prefill(self, scheduled: list[PrefillChunk]) -> list[Update]:
        logits_indices: list[int] = []
        chunks, seen = [], 0
        for sequence, start, count, write_from in scheduled:
            tokens = sequence.tokens[start : start + count]
            chunks.append(SequenceChunk(tokens, start, sequence.pages, write_from))
            seen += count
            generation = self._active[sequence].generation
            generation.started = generation.started or time.monotonic()
            if generation.params.prompt_logprobs is not None:
                logits_indices += range(seen - count, seen)
            elif start + count == len(sequence.tokens):
                logits_indices.append(seen - 1)
        self._prompt_tokens += seen
        output = self._main(chunks, logits_indices)
        return self._after_prefill(scheduled, output)

    def _after_prefill(self, scheduled: list[PrefillChunk], output: Output) -> list[Update]:
        ended: list[tuple[_Active, Tensor]] = []
        last, seen, used = [], 0, 0
        module_stretches, module_h_ND = [], []
        for sequence, start, count, _ in scheduled:
            active = self._active[sequence]
            if sequence.computed == sequence.matched:
                active.forget()
                if sequence.preemptions == 0:
                    active.generation.cached_tokens = sequence.matched
            end = start + count
            self._trace(active.generation, start, output.routed, seen, count)
            h_ND = output.h_ND[seen : seen + count]
            seen += count
            whole = end == len(sequence.tokens)
            logits = 0
            if active.generation.params.prompt_logprobs is not None:
                logits = count
                self._report_prompt(active, start, output.logits_NO[used : used + count])
            elif whole:
                logits = 1
            used += logits
            sequence.computed = end
            if self._keeps_up:
                # The pair with the token that is decided now waits for the next drafting.
                pairs = count - 1 if whole else count
                if pairs:
                    tokens = sequence.tokens[start + 1 : start + 1 + pairs]
                    module_stretches.append(SequenceChunk(tokens, start + 1, sequence.pages))
                    module_h_ND.append(h_ND[:pairs])
            sequence.ready = end
            if whole:
                ended.append((active, h_ND[-1:]))
                last.append(used - 1)
            else:
                self.scheduler.register_prefix(sequence)
        if module_stretches:
            self.runner.write_mtp_kv_cache(module_stretches, torch.cat(module_h_ND))
        if not ended:
            return []
        decisions = verify(output.logits_NO[last], [active.row() for active, _ in ended])
        return [
            self._take(active, decision, h_1D, 0) for (active, h_1D), decision in zip(ended, decisions, strict=True)
        ]

    @staticmethod
    def _report_prompt(active: _Active, start: int, logits_NO: Tensor) -> None:
        generation = active.generation
        following = generation.prompt_ids[start + 1 : start + 1 + len(logits_NO)]
        known = generation.prompt_logprobs or []
        top = generation.params.prompt_logprobs or 0
        # After a preemption the prompt is read again.
        if following and len(known) <= start:
            ids = torch.tensor(following, device=logits_NO.device)
            known = known + prompt_logprobs(logits_NO[: len(following)], ids, top)
        generation.prompt_logprobs = known

    # ----------------------------------------------------------------------------------------------- what follows

    def _take(self, active: _Active, decision: SampledTokens, h_ND: Tensor, first: int) -> Update:
        """Append decided tokens, up to one that ends the request; they pair with the states of `h_ND` from `first`."""
        generation, sequence = active.generation, active.sequence
        active.drafts = []
        taken: list[int] = []
        # A row whose constraint failed was decided without it.
        reason: FinishReason | None = "error" if generation.error else None
        for token in [] if generation.error else decision.tokens:
            taken.append(token)
            if token in active.ending:
                reason = "stop"
            elif len(sequence.tokens) + len(taken) == sequence.limit:
                reason = "length"
            if reason:
                break
        active.taken(taken)
        if generation.error:
            reason = "error"
        sequence.tokens += taken
        generation.token_ids += taken
        self._generated_tokens += len(taken)
        generation.accepted_mask += [place < decision.accepted for place in range(len(taken))]
        if decision.logprobs is not None:
            generation.logprobs = (generation.logprobs or []) + decision.logprobs[: len(taken)]
        sequence.computed = len(sequence.tokens) - 1
        if generation.routing is not None:
            # The pass read accepted drafts that an ending left out.
            del generation.routing[sequence.computed :]
        if self._keeps_up:
            active.pending_ND.append(h_ND[first : first + len(taken)])
            active.pending += len(taken)
        sequence.ready = len(sequence.tokens) - max(active.pending, 1)
        self.scheduler.register_prefix(sequence)
        if reason:
            self._end(active, reason)
        return Update(generation, taken)

    def _end(self, active: _Active, reason: FinishReason) -> None:
        active.generation.finish_reason = reason
        self.scheduler.finish(active.sequence)
        del self._active[active.sequence], self._of[active.generation]

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        words = self.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one token, such as the begin token")
        wrong = next((token for token in prompt if not (isinstance(token, int) and 0 <= token < words)), None)
        if wrong is not None:
            raise ValueError(f"the prompt has token {wrong!r}; ids are integers from 0 to {words - 1}")
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with one more it must fit the model's length, "
                f"max_position_embeddings = {self.max_length}"
            )
        check_against(params, words)


def _configured_eos(config: ModelConfig) -> tuple[int, ...]:
    return () if config.eos_token_id is None else (config.eos_token_id, *config.other_eos_token_ids)


def _pages(config: ModelConfig, max_batch: int, page_size: int, cache_tokens: int | None) -> int:
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be at least 1")
    longest = config.max_position_embeddings
    if cache_tokens is None:
        cache_tokens = max(longest, max_batch * min(longest, _USUAL_LENGTH))
    if cache_tokens < 2:
        raise ValueError(f"cache_tokens is {cache_tokens}; a request takes at least 2")
    # A page is shared whole, so that a sequence takes up to one page beyond its length.
    return -(-cache_tokens // page_size)
