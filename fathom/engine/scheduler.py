"""Which sequences the next step works on: continuous batching over a paged cache, with chunked prefill.

Pure bookkeeping: no tensor and no model. `schedule` says what to do and holds the pages it takes, the core does it,
moves each sequence's `computed` and `ready` on, appends the new tokens, and asks again.

Order: higher priority first, then first come, first served. It rules who is admitted, who reads first, and who goes
when pages run out: the last of the running sequences, whose pages are released and which later reads all its tokens
again, as far as they are no longer cached. Everyone may be preempted for the first, so the first always gets on.

Slots: a step holds slots for every token it feeds, and with `overlap` one more. Then a drafting module keeps the
entry made from (state i, token i + 1) at slot i + 1, so that a page depends on nothing but its own and earlier
tokens. So prompt tokens up to `end` take end + overlap slots, and decoding with d drafts len(tokens) + d + overlap,
drafts beyond `limit` included: the batch is rectangular, and what they write needs somewhere to lie. The last token
is never fed, hence without drafts `limit` slots are always enough; `add` demands no more, and drafts are the first
to be given up.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.engine.page_pool import PagePool

_IDLE_FACTOR = 4
"""A step in which nobody decodes, so that nobody's next token waits for it, reads so many times more."""


class QueueFull(RuntimeError):  # noqa: N818
    """As many sequences are waiting as may wait."""


@dataclass(eq=False)
class SequenceState:
    """One request's tokens, and where their latents lie."""

    tokens: list[int]
    """The prompt, then what was generated; the core appends."""
    limit: int
    """The length, prompt and new tokens, at which the core finishes it at the latest."""
    priority: int = 0
    """Larger goes first."""
    reuse: bool = True
    """Whether it may begin with what others left in the cache; without, all its tokens are read."""
    cache_salt: bytes = b""
    """Only sequences with the same salt share pages."""
    computed: int = 0
    """Tokens whose latents in the main model lie in the cache."""
    ready: int = 0
    """Slots that are complete in every layer, a drafting module's included: only these are shared."""
    pages: list[int] = field(default_factory=list)
    """Slot t lies in pages[t // page_size]; empty while it waits."""
    registered: int = 0
    """Pages from the first on that other sequences can find."""
    matched: int = 0
    """Tokens that were found in the cache when it was last admitted."""
    to_read: int = 0
    """Tokens known when it was last admitted: it decodes when they are computed."""
    digests: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as they were looked for in the cache."""
    root: bytes = b""
    """The pool's when it was last admitted: what `digests` hang on, and what it registers."""
    preemptions: int = 0
    arrival: int = -1
    """Its place among all that were added; −1 before."""
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
    """What to do next. All slots that it takes are held."""

    decode: list[SequenceState]
    """Those that have all but their last token computed: each feeds that and its drafts."""
    drafts: int
    """Drafts that each of them may feed."""
    prefill: list[PrefillChunk]
    """The chunk that ends at a sequence's last token yields its next one."""


def _order(sequence: SequenceState) -> tuple[int, int]:
    return -sequence.priority, sequence.arrival


class Scheduler:
    """Keeps the waiting and the running sequences, each in order, and gives the running ones their pages."""

    def __init__(
        self,
        pool: PagePool,
        max_batch: int,
        prefill_budget: int,
        overlap: bool,
        max_waiting: int | None = None,
    ) -> None:
        """At most `max_batch` sequences run, and a step reads at most `prefill_budget` known tokens, or four times
        as many if nobody decodes. With `overlap` a drafting module writes one slot ahead of the main model."""
        least = 2 if overlap else 1
        for name, value, lowest in (
            ("max_batch", max_batch, 1),
            ("prefill_budget", prefill_budget, least),
            ("max_waiting", 1 if max_waiting is None else max_waiting, 1),
        ):
            if value < lowest:
                raise ValueError(f"{name} is {value}; it must be at least {lowest}")
        self.preemptions = 0
        self._pool, self._max_batch, self._max_waiting = pool, max_batch, max_waiting
        self._prefill_budget, self._overlap = prefill_budget, int(overlap)
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []
        self._arrivals = 0

    @property
    def waiting(self) -> tuple[SequenceState, ...]:
        """Those without pages, preempted ones among them, in order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[SequenceState, ...]:
        """Those that read or decode, in order."""
        return tuple(self._running)

    @property
    def has_work(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, sequence: SequenceState) -> None:
        """Let a new sequence wait for its turn.

        Raises QueueFull if `max_waiting` sequences wait already, and ValueError for one that could never finish.
        """
        length, limit = len(sequence.tokens), sequence.limit
        if sequence.arrival >= 0:
            raise ValueError(f"arrival is {sequence.arrival}: the sequence was added before; add a new one")
        if length == 0:
            raise ValueError("tokens is empty; a sequence needs at least one token, such as the begin token")
        if limit <= length:
            raise ValueError(f"limit is {limit} for {length} tokens; it must leave room for at least one more")
        if limit > self._pool.slots:
            raise ValueError(
                f"limit is {limit}; it must be at most {self._pool.slots}, as the cache has {self._pool.pages} "
                f"pages of {self._pool.page_size} tokens"
            )
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} sequences are waiting; max_waiting is {self._max_waiting}")
        sequence.arrival = self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_order)

    def schedule(self, drafts: int = 0) -> Step:
        """The next step, with at most `drafts` drafts per decoding sequence; it does something if there is work."""
        if drafts < 0:
            raise ValueError(f"drafts is {drafts}; it must be at least 0")
        preemptions = self.preemptions
        decode, drafts = self._decode(drafts)
        budget = self._prefill_budget if decode else _IDLE_FACTOR * self._prefill_budget
        # Whoever was just preempted would be the first to be let in again.
        if self._waiting and self.preemptions == preemptions:
            self._admit(budget)
        prefill = self._prefill(budget) if len(decode) < len(self._running) else []
        if self.preemptions > preemptions:
            decode = [sequence for sequence in decode if sequence.pages]
        return Step(decode, drafts, prefill)

    def register_prefix(self, sequence: SequenceState) -> None:
        """Let others find a sequence's full pages; to be called after its `ready` moved on."""
        sequence.registered = self._pool.register_prefix(
            sequence.tokens, sequence.pages, sequence.registered, sequence.ready, sequence.root
        )

    def finish(self, sequence: SequenceState) -> None:
        """A sequence leaves, done or cancelled, wherever it is; once it has left, this does nothing."""
        for group in (self._running, self._waiting):
            place = bisect_left(group, _order(sequence), key=_order)
            if place < len(group) and group[place] is sequence:
                del group[place]
        self._vacate(sequence)

    def _decode(self, drafts: int) -> tuple[list[SequenceState], int]:
        """Hold the slots of all that decode; where pages lack, for fewer drafts, then for fewer sequences."""
        while True:
            decode = [sequence for sequence in self._running if sequence.computed >= sequence.to_read]
            free = self._pool.available
            for count in range(drafts, -1, -1):
                ahead = count + self._overlap
                if sum(self._lacking(sequence, len(sequence.tokens) + ahead) for sequence in decode) <= free:
                    for sequence in decode:
                        self._hold(sequence, len(sequence.tokens) + ahead)
                    return decode, count
            self._preempt_last()

    def _admit(self, budget: int) -> None:
        """Let waiting sequences run while there is something left of the budget for them to read.

        There must be pages for all that a newcomer will read and one token more, besides those that the ones already
        reading will need. If the first in the queue has to wait, so have the others.
        """
        reading = [sequence for sequence in self._running if sequence.computed < sequence.to_read]
        unread = sum(sequence.to_read - sequence.computed for sequence in reading)
        promised = sum(self._lacking(sequence, sequence.to_read + 1) for sequence in reading)
        while self._waiting and len(self._running) < self._max_batch and unread + self._overlap < budget:
            sequence = self._waiting[0]
            known = len(sequence.tokens)
            total = self._pool.pages_for(known + 1)
            # At least one token is computed: somebody has to say what follows.
            most = known - 1 if sequence.reuse else 0
            root = self._pool.root(sequence.cache_salt)
            if sequence.root != root:
                sequence.root, sequence.digests = root, []
            pages = self._pool.match_prefix(sequence.tokens, most, total + promised, sequence.digests, sequence.root)
            if pages is None:
                return
            sequence.pages, sequence.registered, sequence.to_read = pages, len(pages), known
            sequence.computed = sequence.ready = sequence.matched = len(pages) * self._pool.page_size
            insort(self._running, self._waiting.pop(0), key=_order)
            unread += known - sequence.computed
            promised += total - len(pages)

    def _prefill(self, budget: int) -> list[PrefillChunk]:
        """Share the budget among those that have known tokens left to read."""
        chunks: list[PrefillChunk] = []
        # Preemption takes from the end of this list, never one that was served before.
        for sequence in self._running:
            # The least that gets on is one token, and with overlap perhaps one that is read again.
            if budget <= self._overlap:
                break
            if sequence.computed >= sequence.to_read:
                continue
            chunk = self._chunk(sequence, budget)
            while chunk is None and self._preempt_last() is not sequence:
                chunk = self._chunk(sequence, budget)
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.num_tokens
        return chunks

    def _chunk(self, sequence: SequenceState, budget: int) -> PrefillChunk | None:
        """What a sequence reads next, as far as budget and pages go; None if that is nothing new."""
        # The drafting module's first entry behind a shared prefix takes the state of the prefix's last token.
        repeated = self._overlap if 0 < sequence.computed == sequence.matched else 0
        start = sequence.computed - repeated
        slots = (len(sequence.pages) + self._pool.available) * self._pool.page_size
        end = min(sequence.to_read, start + budget, slots - self._overlap)
        if end <= sequence.computed:
            return None
        self._hold(sequence, end + self._overlap)
        return PrefillChunk(sequence, start, end - start, sequence.computed)

    def _lacking(self, sequence: SequenceState, slots: int) -> int:
        """Pages that a sequence has to take to hold so many slots."""
        return max(0, self._pool.pages_for(slots) - len(sequence.pages))

    def _hold(self, sequence: SequenceState, slots: int) -> None:
        lacking = self._lacking(sequence, slots)
        if lacking:
            pages = self._pool.allocate(lacking)
            assert pages is not None, "the caller saw that so many are free"
            sequence.pages += pages

    def _preempt_last(self) -> SequenceState:
        """Send the last of the running sequences back to its place in the queue."""
        sequence = self._running.pop()
        self._vacate(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_order)
        return sequence

    def _vacate(self, sequence: SequenceState) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.ready = sequence.registered = 0
