"""The scheduler under a core whose cache remembers what was written where, and rule by rule.

The core's model is a hash: the state of token i is a number made from all tokens up to i, and so is the next token.
Its cache keeps, for every slot and layer, the state that was written there. Whenever a token is fed, every slot that
it attends to must hold just the state of that place of its own sequence, so wrong sharing, a page that was taken
away, a slot that was never written or one written over all show at once.
"""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fathom.engine.page_pool import PagePool
from fathom.engine.scheduler import QueueFull, Scheduler, SequenceState, Step

VOCABULARY = 3
"""Few tokens, so that prompts often begin alike."""


def states_of(tokens: list[int]) -> list[int]:
    states, state = [], 0
    for token in tokens:
        state = hash((state, token))
        states.append(state)
    return states


def next_token(state: int) -> int:
    return hash((state, VOCABULARY)) % VOCABULARY


def lone_run(prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(states_of(tokens)[-1]))
    return tokens


class Core:
    """Carries out steps; `overlap` is a drafting module that keeps (state i, token i + 1) at slot i + 1."""

    def __init__(
        self, pages: int, page_size: int, max_batch: int, budget: int, overlap: bool, rng: random.Random | None = None
    ) -> None:
        self.pool = PagePool(pages, page_size)
        self.scheduler = Scheduler(self.pool, max_batch, budget, overlap)
        self.max_batch, self.budget, self.overlap = max_batch, budget, overlap
        self.rng = rng or random.Random(0)
        self.main: dict[tuple[int, int], int] = {}
        self.module: dict[tuple[int, int], int] = {}
        self.paired: dict[SequenceState, int] = {}
        self.most_drafts = 0
        self.expected: dict[SequenceState, list[int]] = {}
        self.finished: list[SequenceState] = []
        self.seen: Counter[str] = Counter()

    def add(self, prompt: list[int], new: int, priority: int = 0) -> SequenceState:
        sequence = SequenceState(list(prompt), len(prompt) + new, priority)
        self.scheduler.add(sequence)
        self.expected[sequence] = lone_run(prompt, sequence.limit)
        return sequence

    def cancel(self, sequence: SequenceState) -> None:
        self.scheduler.finish(sequence)
        self.expected.pop(sequence, None)

    def step(self, drafts: int = 0) -> Step:
        """Schedule, check what the scheduler promises about any step, and carry it out."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        self.most_drafts = max(self.most_drafts, drafts)
        step = self.scheduler.schedule(drafts)
        self._check_order(waiting, running)
        self._check_step(step, drafts)
        for sequence in step.decode:
            self._decode(sequence, step.drafts)
        for chunk in step.prefill:
            self._read(chunk.sequence, chunk.start, chunk.start + chunk.num_tokens, chunk.write_from)
        for sequence in [*step.decode, *(chunk.sequence for chunk in step.prefill)]:
            if len(sequence.tokens) == sequence.limit:
                self._finish(sequence)
            else:
                self.scheduler.register_prefix(sequence)
        return step

    def run(self, drafts: int = 0) -> None:
        while self.scheduler.has_work:
            self.step(drafts)
        assert self.pool.available == self.pool.pages, "a page leaked"
        assert not any(self.pool._holders)

    def _check_order(self, waiting: tuple[SequenceState, ...], running: tuple[SequenceState, ...]) -> None:
        def order(sequence: SequenceState) -> tuple[int, int]:
            return -sequence.priority, sequence.arrival

        now = self.scheduler
        for group in (now.waiting, now.running):
            assert list(group) == sorted(group, key=order)
        admitted = [sequence for sequence in waiting if sequence in now.running]
        assert admitted == list(waiting[: len(admitted)]), "somebody was overtaken"
        kept = [sequence for sequence in running if sequence in now.running]
        assert kept == list(running[: len(kept)]), "somebody earlier was preempted"
        preempted = running[len(kept) :]
        assert not (preempted and admitted), "nobody is let in when somebody has to go"
        assert all(not sequence.pages and sequence.computed == 0 for sequence in now.waiting)
        self.seen["preempted"] += len(preempted)
        self.seen["preempted while reading"] += sum(not len(s.tokens) > s.prefill_length for s in preempted)

    def _check_step(self, step: Step, drafts: int) -> None:
        running = self.scheduler.running
        reading = [chunk.sequence for chunk in step.prefill]
        assert len(running) <= self.max_batch
        assert step.decode or step.prefill, "there was work, and nothing was done"
        assert 0 <= step.drafts <= drafts
        assert step.decode == [sequence for sequence in running if len(sequence.tokens) > sequence.prefill_length]
        assert all(sequence.computed == len(sequence.tokens) - 1 for sequence in step.decode)
        assert sum(chunk.num_tokens for chunk in step.prefill) <= self.budget * (1 if step.decode else 4)
        assert reading == [sequence for sequence in running if sequence in reading], "out of order or twice"
        assert running[0] in (step.decode + reading), "the first in order must get on"
        for sequence in running:
            assert len(sequence.pages) <= self.pool.pages_for(sequence.limit + self.most_drafts)
        self.seen["fewer drafts"] += step.drafts < drafts
        self.seen["shared steps"] += len(reading) > 1

    def _decode(self, sequence: SequenceState, drafts: int) -> None:
        """Feed the last token and drafts, right ones and wrong ones; keep those that the model would have said."""
        last = len(sequence.tokens) - 1
        fed = sequence.tokens[last:]
        for _ in range(drafts):
            right = next_token(states_of(sequence.tokens[:last] + fed)[-1])
            fed.append(right if self.rng.random() < 0.7 else self.rng.randrange(VOCABULARY))
        states = states_of(sequence.tokens[:last] + fed)
        self._feed(sequence, states, range(last, last + len(fed)), last)
        said = [next_token(state) for state in states[last:]]
        accepted = next((i for i in range(drafts) if fed[i + 1] != said[i]), drafts)
        self.seen["accepted"] += accepted
        for token in said[: accepted + 1]:
            if len(sequence.tokens) < sequence.limit:
                sequence.tokens.append(token)
        # The module may fall behind for a while, as it does when nothing is drafted.
        if self.overlap and self.rng.random() < 0.7:
            self._pair(sequence, len(sequence.tokens), last + drafts + 2)
        sequence.computed = len(sequence.tokens) - 1
        sequence.ready = min(sequence.computed, self.paired[sequence]) if self.overlap else sequence.computed

    def _read(self, sequence: SequenceState, start: int, end: int, write_from: int) -> None:
        assert write_from == sequence.computed < end <= len(sequence.tokens) == sequence.prefill_length
        hit = self.overlap and 0 < sequence.computed == sequence.matched
        assert start == write_from - hit
        assert sequence.registered * self.pool.page_size >= sequence.matched
        self.seen["hits"] += 0 < sequence.computed == sequence.matched
        self.seen["chunked"] += end < len(sequence.tokens)
        states = states_of(sequence.tokens[:end])
        self._feed(sequence, states, range(start, end), write_from)
        if end == len(sequence.tokens):
            sequence.tokens.append(next_token(states[-1]))
        if self.overlap:
            if sequence.computed == sequence.matched:
                self.paired[sequence] = max(1, sequence.matched)
            assert start < self.paired[sequence], "the module lacks the state before its next entry"
            self._pair(sequence, end + 1, end + 1)
        sequence.computed = sequence.ready = end

    def _feed(self, sequence: SequenceState, states: list[int], places: range, write_from: int) -> None:
        """The main model: the tokens at these places attend to all slots before them and their own."""
        for place in places:
            if place >= write_from:
                self._write(self.main, sequence, place, states[place])
            for earlier in range(place + 1):
                assert self.main.get(self._slot(sequence, earlier)) == states[earlier]

    def _pair(self, sequence: SequenceState, known: int, end: int) -> None:
        """The module: entries of (state i, token i + 1) at the slots i + 1 < known, attending to all from slot 1 on;
        in the slots from there to `end` whatever a rectangular batch is filled up with."""
        states = states_of(sequence.tokens)
        entries = [0] + [hash(pair) for pair in zip(states, sequence.tokens[1:], strict=False)]
        for place in range(self.paired[sequence], known):
            self._write(self.module, sequence, place, entries[place])
            for earlier in range(1, place + 1):
                assert self.module.get(self._slot(sequence, earlier)) == entries[earlier]
        for place in range(known, end):
            self._write(self.module, sequence, place, -1)
        self.paired[sequence] = known

    def _slot(self, sequence: SequenceState, place: int) -> tuple[int, int]:
        return sequence.pages[place // self.pool.page_size], place % self.pool.page_size

    def _write(self, layer: dict[tuple[int, int], int], sequence: SequenceState, place: int, value: int) -> None:
        page = self._slot(sequence, place)[0]
        holders = sum(other.pages.count(page) for other in self.scheduler.running)
        assert holders == 1 == self.pool._holders[page], "a shared page is written"
        assert place >= sequence.registered * self.pool.page_size, "a registered page is written"
        layer[self._slot(sequence, place)] = value

    def _finish(self, sequence: SequenceState) -> None:
        assert sequence.tokens == self.expected.pop(sequence), "not what a lone run gives"
        self.scheduler.register_prefix(sequence)
        self.scheduler.finish(sequence)
        self.finished.append(sequence)


def prompt(rng: random.Random, most: int) -> list[int]:
    """Some begin with the same long run of zeros."""
    shared = [0] * rng.randrange(most) if rng.random() < 0.5 else []
    return (shared + [rng.randrange(VOCABULARY) for _ in range(most)])[: rng.randint(1, most)]


def random_run(seed: int) -> Core:
    rng = random.Random(seed)
    page_size, overlap = rng.choice((1, 2, 3, 4, 8)), rng.random() < 0.6
    pages = rng.randint(-(-8 // page_size), -(-60 // page_size))
    core = Core(pages, page_size, rng.randint(1, 6), rng.choice((2, 3, 5, 8, 40)), overlap, rng)
    slots, most_drafts = pages * page_size, rng.choice((0, 0, 1, 2, 4))
    for _ in range(rng.randint(2, 14)):
        new = rng.randint(1, max(1, slots // 2))
        core.add(prompt(rng, min(30, slots - new)), new, rng.choice((0, 0, 0, 1, 2)))
        for _ in range(rng.choice((0, 0, 1, 3, 6))):
            if core.scheduler.has_work:
                core.step(rng.randint(0, most_drafts))
        if rng.random() < 0.15 and core.expected:
            core.cancel(rng.choice(list(core.expected)))
    core.run(most_drafts)
    assert not core.expected, "somebody was forgotten"
    assert core.seen["preempted"] == core.scheduler.preemptions
    core.seen["evictions"] += core.pool.evictions
    return core


def test_random_runs() -> None:
    """Everybody gets just the tokens of a lone run, and every way there is taken often."""
    seen: Counter[str] = Counter()
    for seed in range(500):
        seen += random_run(seed).seen
    ways = ("preempted", "preempted while reading", "hits", "chunked", "fewer drafts", "shared steps", "evictions")
    for what in ways:
        assert seen[what] > 50, (what, seen)


def running_pair(pages: int) -> tuple[Core, SequenceState, SequenceState]:
    """Two sequences of three prompt tokens that decode, on pages of two tokens."""
    core = Core(pages, 2, 4, 16, overlap=False)
    first, second = core.add([0, 1, 2], 5), core.add([1, 1, 1], 5)
    step = core.step()
    assert [chunk[:3] for chunk in step.prefill] == [(first, 0, 3), (second, 0, 3)]
    return core, first, second


@pytest.mark.parametrize(("tokens", "limit"), [([1] * 8, 8), ([1, 2], 9)])
def test_what_could_never_run_is_refused(tokens: list[int], limit: int) -> None:
    scheduler = Scheduler(PagePool(4, 2), 2, 4, True)
    with pytest.raises(ValueError, match=f"limit is {limit} for a prompt of {len(tokens)} tokens; .* room for 8"):
        scheduler.add(SequenceState(tokens, limit))
    assert not scheduler.has_work


def test_a_budget_that_makes_no_progress_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill_budget is 1; with drafts it must be at least 2"):
        Scheduler(PagePool(4, 2), 1, 1, overlap=True)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_sequence_may_fill_the_whole_cache(overlap: bool) -> None:
    for drafts in range(4):
        core = Core(4, 2, 2, 2, overlap)
        core.add([0, 1, 2], 5)
        core.add([2, 1], 6)
        core.run(drafts)
        assert len(core.finished) == 2 and len(core.finished[0].tokens) == 8


def test_the_queue_has_an_end() -> None:
    scheduler = Scheduler(PagePool(8, 2), 1, 4, False, max_waiting=2)
    first, second = (SequenceState([1], 4) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    with pytest.raises(QueueFull, match="max_waiting is 2"):
        scheduler.add(SequenceState([1], 4))
    scheduler.schedule()
    assert scheduler.waiting == (second,) and scheduler.running == (first,)
    scheduler.add(third := SequenceState([1], 4))
    assert scheduler.waiting == (second, third)


def test_priority_then_arrival() -> None:
    core = Core(16, 2, 2, 16, overlap=False)
    low, middle, high = core.add([0], 3, -1), core.add([1], 3), core.add([2], 3, 5)
    late = core.add([1, 2], 3, 5)
    assert core.scheduler.waiting == (high, late, middle, low)
    core.run()
    assert core.finished == [high, late, middle, low]


def test_prompts_share_the_budget_in_order() -> None:
    """With nobody decoding it is four times as large."""
    core = Core(32, 2, 4, 3, overlap=False)
    first, second, third = core.add([0] * 10, 4), core.add([1] * 9, 4), core.add([2] * 3, 4)
    assert [chunk[:3] for chunk in core.step().prefill] == [(first, 0, 10), (second, 0, 2)]
    assert core.scheduler.waiting == (third,), "there is nothing left for it"
    step = core.step()
    assert step.decode == [first] and [chunk[:3] for chunk in step.prefill] == [(second, 2, 3)]
    core.step()
    step = core.step()
    assert [chunk[:3] for chunk in step.prefill] == [(second, 8, 1), (third, 0, 2)]
    core.run()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_shared_prefix_is_not_read_again(overlap: bool) -> None:
    """With a drafting module all but its last token, whose state the module needs."""
    core = Core(32, 4, 4, 32, overlap)
    first = core.add([0, 1, 2, 0, 1, 2, 0, 1], 4)
    core.step()
    same = core.add([0, 1, 2, 0, 1, 2, 0, 1], 4)
    longer = core.add([0, 1, 2, 0, 1, 2, 0, 1, 1], 4)
    chunks = core.step().prefill
    assert [chunk.sequence for chunk in chunks] == [same, longer]
    assert (chunks[0].start, chunks[0].num_tokens, chunks[0].write_from) == (4 - overlap, 4 + overlap, 4)
    assert (chunks[1].start, chunks[1].num_tokens, chunks[1].write_from) == (8 - overlap, 1 + overlap, 8)
    assert same.pages[0] == longer.pages[0] == first.pages[0] and longer.pages[1] == first.pages[1] != same.pages[1]
    assert (same.matched, longer.matched) == (4, 8)
    core.run(2)


def test_who_does_not_reuse_reads_everything() -> None:
    core = Core(32, 2, 4, 32, overlap=True)
    core.add([0, 1, 2, 0], 4)
    core.step()
    alone = SequenceState([0, 1, 2, 0, 1], 8, reuse=False)
    core.scheduler.add(alone)
    core.expected[alone] = lone_run(alone.tokens, 8)
    assert [chunk[1:] for chunk in core.step().prefill] == [(0, 5, 0)]
    core.run()


def test_fewer_drafts_before_anybody_goes() -> None:
    core, first, second = running_pair(5)
    # Four tokens each, in two pages each, and one page free: one of them may have it, both may not.
    assert core.pool.available == 1
    assert core.step(drafts=3).drafts == 0
    assert core.scheduler.preemptions == 0 and core.scheduler.running == (first, second)


def test_the_last_goes_and_comes_back() -> None:
    core, first, second = running_pair(5)
    third = core.add([2, 2], 2)
    while core.scheduler.preemptions == 0:
        step = core.step()
    assert step.decode == [first] and not step.prefill, "nobody is let in by a step that preempts"
    assert core.scheduler.waiting == (second, third) and second.preemptions == 1
    assert second.pages == [] and second.computed == second.ready == second.registered == 0
    core.run()
    assert core.finished[0] is first and len(core.finished) == 3


def test_a_reader_takes_pages_from_a_later_decoder() -> None:
    """Though the decoder had its place in the step already."""
    core = Core(8, 1, 2, 2, overlap=False)
    decoder = core.add([0], 7)
    core.step()
    reader = core.add([1] * 5, 1, priority=1)
    assert [core.step().decode for _ in range(2)] == [[decoder], [decoder]]
    step = core.step()
    assert step.decode == [] and [chunk[:3] for chunk in step.prefill] == [(reader, 4, 1)]
    assert core.scheduler.waiting == (decoder,)
    core.run()


def test_nobody_overtakes_a_head_that_lacks_pages() -> None:
    core, _, _ = running_pair(8)
    large, small = core.add([2] * 9, 2), core.add([2], 1)
    core.step()
    assert core.scheduler.waiting == (large, small) and core.pool.available > 1
    core.run()


def test_pages_that_readers_will_need_are_not_given_away() -> None:
    core = Core(9, 1, 4, 3, overlap=False)
    core.add([0], 6)
    core.step()
    reader = core.add([1] * 4, 1)
    core.step()
    other = core.add([2], 1)
    step = core.step()
    # Three pages are left when the decoder has its third: two for the reader's last token and one more, not two others.
    assert core.scheduler.waiting == (other,) and [chunk[:3] for chunk in step.prefill] == [(reader, 3, 1)]
    core.run()


def test_leaving_in_any_state() -> None:
    core = Core(32, 2, 3, 4, overlap=True)
    decoding, reading = core.add([0, 1], 9), core.add([1] * 30, 4)
    core.step()
    waiting = core.add([2] * 4, 3)
    core.step()
    never_added = SequenceState([1], 3)
    assert core.scheduler.waiting == (waiting,) and reading.computed < 30 and len(decoding.tokens) > 2
    for sequence in (reading, waiting, decoding, never_added, decoding, waiting):
        core.cancel(sequence)
        core.scheduler.register_prefix(sequence)
        assert sequence not in (*core.scheduler.running, *core.scheduler.waiting) and not sequence.pages
    assert not core.scheduler.has_work and core.pool.available == 32
    assert core.scheduler.schedule(2).prefill == []


def test_a_finished_sequence_leaves_its_pages_to_be_found() -> None:
    core = Core(16, 2, 3, 8, overlap=True)
    first = core.add([0, 1, 2], 8)
    core.run(1)
    follow_up = core.add(first.tokens, 3)
    core.step()
    assert follow_up.matched >= 8
    core.run(1)


class Requests(RuleBasedStateMachine):
    """Requests that come, go and step in any order, for hypothesis to find a short failing one."""

    @initialize(pages=st.integers(2, 8), size=st.integers(1, 4), batch=st.integers(1, 4), overlap=st.booleans())
    def start(self, pages: int, size: int, batch: int, overlap: bool) -> None:
        self.core = Core(pages, size, batch, 3, overlap)

    @rule(
        tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
        new=st.integers(1, 8),
        priority=st.integers(0, 1),
    )
    def add(self, tokens: list[int], new: int, priority: int) -> None:
        if len(tokens) + new <= self.core.pool.slots:
            self.core.add(tokens, new, priority)
        else:
            with pytest.raises(ValueError, match="limit"):
                self.core.add(tokens, new, priority)

    @precondition(lambda self: self.core.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.core.cancel(data.draw(st.sampled_from(list(self.core.expected))))

    @precondition(lambda self: self.core.scheduler.has_work)
    @rule(drafts=st.integers(0, 3), times=st.integers(1, 5))
    def step(self, drafts: int, times: int) -> None:
        for _ in range(times):
            if self.core.scheduler.has_work:
                self.core.step(drafts)

    @invariant()
    def every_page_is_held_as_often_as_it_is_listed(self) -> None:
        if hasattr(self, "core"):
            listed = Counter(page for sequence in self.core.scheduler.running for page in sequence.pages)
            held = {page: count for page, count in enumerate(self.core.pool._holders) if count}
            assert held == listed and self.core.pool.available == self.core.pool.pages - len(listed)

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.core.run(1)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
