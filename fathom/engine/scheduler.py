"""Which sequences the next step works on: continuous batching over a paged cache, with chunked prefill.

Pure bookkeeping: no tensor and no model. `schedule` plans a step and allocates the pages it needs; the engine runs it,
advances each sequence's `computed` and `ready`, appends the new tokens, and calls `schedule` again.

Order: higher priority first, then first come, first served. It decides which sequences are admitted, which prefill
first, and which is preempted when pages run out: the last of the running ones, whose pages are released and which later
computes all its tokens again, as far as they are no longer cached. Every other sequence may be preempted for the first,
so the first always makes progress.

Slots: a step needs slots for every token it feeds, and with `overlap` one more, for then the MTP module keeps the entry
made from (hidden state i, token i + 1) at slot i + 1, so that a page depends on nothing but its own and earlier tokens.
So prompt tokens up to `end` take end + overlap slots, and decoding with d drafts len(tokens) + d + overlap, drafts
beyond `limit` included: the batch is rectangular, and what they write needs slots. The last token is never fed, hence
without drafts `limit` slots are always enough; `add` demands no more, and drafts are the first to be dropped.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.engine.page_pool import PagePool

_IDLE_FACTOR = 4
"""Multiplies the prefill budget of steps without decoding, for whose length no next token waits."""


class QueueFull(RuntimeError):  # noqa: N818
    """`max_waiting` sequences are waiting already."""


@dataclass(eq=False)
class SequenceState:
    """One request's tokens, and the pages of their latents."""

    tokens: list[int]
    """The prompt, then what was generated; the engine appends."""
    limit: int
    """The length, prompt and output together, at which the engine finishes it at the latest."""
    priority: int = 0
    """Higher is scheduled first."""
    reuse: bool = True
    """Whether it may use cached prefixes; otherwise all its tokens are computed."""
    cache_salt: bytes = b""
    """Only sequences with the same salt share pages."""
    computed: int = 0
    """Tokens whose latents in the main model are in the cache."""
    ready: int = 0
    """Slots that are complete in every layer, the MTP module's included: only these are shared."""
    pages: list[int] = field(default_factory=list)
    """Its block table: slot t lies in pages[t // page_size]; empty while it waits."""
    registered: int = 0
    """How many of its first pages other sequences can find."""
    matched: int = 0
    """Tokens that were found in the cache when it was last admitted."""
    prefill_length: int = 0
    """Its length when it was last admitted: it decodes once so many tokens are computed."""
    digests: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as they were looked up."""
    root: bytes = b""
    """The pool's when it was last admitted: what `digests` hang on, and what it registers."""
    preemptions: int = 0
    arrival: int = -1
    """Its place in the order of arrival; −1 before `add`."""
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)


class PrefillChunk(NamedTuple):
    """Known tokens of a sequence to compute: those of the prompt and, after a preemption, generated ones."""

    sequence: SequenceState
    start: int
    """The first token fed."""
    num_tokens: int
    write_from: int
    """Tokens before it are fed for their hidden state alone: their latents lie in a page that others may share."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether it ends at the sequence's last token, so that its logits give the next one."""
        return self.end == len(self.sequence.tokens)


class Step(NamedTuple):
    """What to run next. All slots it needs are allocated."""

    decode: list[SequenceState]
    """Sequences with all but their last token computed: each feeds that and its drafts."""
    drafts: int
    """Drafts that each of them may feed."""
    prefill: list[PrefillChunk]
    """The chunk that ends at a sequence's last token yields its next one."""


def _order(sequence: SequenceState) -> tuple[int, int]:
    return -sequence.priority, sequence.arrival


class Scheduler:
    """Keeps the waiting and the running sequences, each in order, and allocates pages for the running ones."""

    def __init__(
        self, pool: PagePool, max_batch: int, prefill_budget: int, overlap: bool, max_waiting: int | None = None
    ) -> None:
        """At most `max_batch` sequences run, and a step prefills at most `prefill_budget` tokens, or four times as many
        if none decodes. With `overlap` an MTP module writes one slot ahead of the main model."""
        if prefill_budget <= overlap:
            raise ValueError(f"prefill_budget is {prefill_budget}; with drafts it must be at least 2")
        self.preemptions = 0
        self._pool, self._max_batch, self._max_waiting = pool, max_batch, max_waiting
        self._prefill_budget, self._overlap = prefill_budget, int(overlap)
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []
        self._arrivals = 0

    @property
    def waiting(self) -> tuple[SequenceState, ...]:
        """Sequences without pages, preempted ones among them, in order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[SequenceState, ...]:
        """Sequences in prefill or decode, in order."""
        return tuple(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self._waiting or self._running)

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence.

        Raises QueueFull if `max_waiting` sequences wait already, and ValueError for one that could never finish.
        """
        length, slots = len(sequence.tokens), self._pool.slots
        if not length < sequence.limit <= slots:
            found = f"limit is {sequence.limit} for a prompt of {length} tokens"
            raise ValueError(f"{found}; it must be more, and fit the cache, which has room for {slots}")
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} sequences are waiting; max_waiting is {self._max_waiting}")
        sequence.arrival = self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_order)

    def schedule(self, drafts: int = 0) -> Step:
        """The next step, with at most `drafts` drafts per decoding sequence; it makes progress if there is work."""
        preemptions = self.preemptions
        decode, drafts = self._decode(drafts)
        budget = self._prefill_budget if decode else _IDLE_FACTOR * self._prefill_budget
        # A sequence that was just preempted would be the first to be admitted again.
        if self._waiting and self.preemptions == preemptions:
            self._admit(budget)
        prefill = self._prefill(budget) if len(decode) < len(self._running) else []
        if self.preemptions > preemptions:
            decode = [sequence for sequence in decode if sequence.pages]
        return Step(decode, drafts, prefill)

    def register_prefix(self, sequence: SequenceState) -> None:
        """Make a sequence's full pages findable; to be called after its `ready` advanced."""
        sequence.registered = self._pool.register_prefix(
            sequence.tokens, sequence.pages, sequence.registered, sequence.ready, sequence.root
        )

    def finish(self, sequence: SequenceState) -> None:
        """Remove a sequence, done or cancelled, wherever it is; does nothing to one that is not there."""
        for group in (self._running, self._waiting):
            place = bisect_left(group, _order(sequence), key=_order)
            if place < len(group) and group[place] is sequence:
                del group[place]
        self._release(sequence)

    def _decode(self, drafts: int) -> tuple[list[SequenceState], int]:
        """Allocate the slots of all that decode; if pages are short, for fewer drafts, then for fewer sequences."""
        while True:
            decode = [sequence for sequence in self._running if sequence.computed >= sequence.prefill_length]
            free = self._pool.available
            for count in range(drafts, -1, -1):
                ahead = count + self._overlap
                if sum(self._missing(sequence, len(sequence.tokens) + ahead) for sequence in decode) <= free:
                    for sequence in decode:
                        self._allocate(sequence, len(sequence.tokens) + ahead)
                    return decode, count
            self._preempt_last()

    def _admit(self, budget: int) -> None:
        """Admit waiting sequences while some of the budget is left for their prefill.

        There must be pages for a new sequence's whole prefill and one token more, besides those that the sequences in
        prefill will need. If the first in the queue has to wait, so do the others.
        """
        prefilling = [sequence for sequence in self._running if sequence.computed < sequence.prefill_length]
        uncomputed = sum(sequence.prefill_length - sequence.computed for sequence in prefilling)
        promised = sum(self._missing(sequence, sequence.prefill_length + 1) for sequence in prefilling)
        while self._waiting and len(self._running) < self._max_batch and uncomputed + self._overlap < budget:
            sequence = self._waiting[0]
            known = len(sequence.tokens)
            total = self._pool.pages_for(known + 1)
            # At least one token must be computed, for the logits of the next.
            most = known - 1 if sequence.reuse else 0
            root = self._pool.root(sequence.cache_salt)
            if sequence.root != root:
                sequence.root, sequence.digests = root, []
            pages = self._pool.match_prefix(sequence.tokens, most, total + promised, sequence.digests, sequence.root)
            if pages is None:
                return
            sequence.pages, sequence.registered, sequence.prefill_length = pages, len(pages), known
            sequence.computed = sequence.ready = sequence.matched = len(pages) * self._pool.page_size
            insort(self._running, self._waiting.pop(0), key=_order)
            uncomputed += known - sequence.computed
            promised += total - len(pages)

    def _prefill(self, budget: int) -> list[PrefillChunk]:
        """Share the budget among the sequences in prefill."""
        chunks: list[PrefillChunk] = []
        # Preemption takes the last of the running sequences, never one that has its chunk already.
        for sequence in self._running:
            # The least that makes progress is one token, and with overlap perhaps one that is computed again.
            if budget <= self._overlap:
                break
            if sequence.computed >= sequence.prefill_length:
                continue
            chunk = self._chunk(sequence, budget)
            while chunk is None and self._preempt_last() is not sequence:
                chunk = self._chunk(sequence, budget)
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.num_tokens
        return chunks

    def _chunk(self, sequence: SequenceState, budget: int) -> PrefillChunk | None:
        """A sequence's next chunk, as far as budget and pages go; None if it would have no new token."""
        # The MTP module's first entry behind a shared prefix takes the hidden state of the prefix's last token.
        recomputed = self._overlap if 0 < sequence.computed == sequence.matched else 0
        start = sequence.computed - recomputed
        slots = (len(sequence.pages) + self._pool.available) * self._pool.page_size
        end = min(sequence.prefill_length, start + budget, slots - self._overlap)
        if end <= sequence.computed:
            return None
        self._allocate(sequence, end + self._overlap)
        return PrefillChunk(sequence, start, end - start, sequence.computed)

    def _missing(self, sequence: SequenceState, slots: int) -> int:
        """Pages to allocate before a sequence has so many slots."""
        return max(0, self._pool.pages_for(slots) - len(sequence.pages))

    def _allocate(self, sequence: SequenceState, slots: int) -> None:
        missing = self._missing(sequence, slots)
        if missing:
            pages = self._pool.allocate(missing)
            assert pages is not None, "the caller has checked that so many are available"
            sequence.pages += pages

    def _preempt_last(self) -> SequenceState:
        """Preempt the last of the running sequences: it goes back to its place in the queue."""
        sequence = self._running.pop()
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_order)
        return sequence

    def _release(self, sequence: SequenceState) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.ready = sequence.registered = 0
