"""The page manager against one that names pages by their whole prefix instead of a digest, and rule by rule."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.engine.page_pool import PagePool


def cached(blocks: PagePool, tokens: list[int]) -> list[int]:
    """Pages for all these tokens, published and released; one sequence that came and went."""
    pages = blocks.allocate(blocks.pages_for(len(tokens)))
    assert pages is not None
    blocks.register_prefix(tokens, pages, 0, len(tokens))
    blocks.release(pages)
    return pages


def test_allocation_is_all_or_nothing() -> None:
    blocks = PagePool(3, 4)
    assert blocks.allocate(4) is None and blocks.available == 3
    pages = blocks.allocate(3)
    assert pages is not None and sorted(pages) == [0, 1, 2]
    assert blocks.allocate(1) is None and blocks.allocate(0) == []
    blocks.release(pages[:1])
    assert blocks.allocate(1) == pages[:1]


def test_full_pages_alone_are_found() -> None:
    blocks = PagePool(4, 2)
    pages = cached(blocks, [1, 2, 3, 4, 5])
    assert blocks.match_prefix([1, 2, 3, 4, 5, 6], 6) == pages[:2]
    assert blocks.match_prefix([1, 2, 3, 4], 3) == pages[:1], "at most three tokens: one page"
    digests: list[bytes] = []
    assert blocks.match_prefix([1, 2, 3], 9, digests=digests) == pages[:1], "there are no more tokens than given"
    assert len(digests) == 1, "a page that is not full has no name yet"
    assert blocks.match_prefix([1, 2], 1) == []
    assert blocks.match_prefix([3, 4], 2) == [], "the same tokens behind another beginning"
    assert blocks.match_prefix([2, 1, 3, 4], 4) == []
    assert (blocks.matched_tokens, blocks.looked_up_tokens) == (8, 6 + 3 + 9 + 1 + 2 + 4)


def test_page_boundaries_and_large_tokens_do_not_blur() -> None:
    """Numbers that share digits or low bytes stay apart."""
    blocks = PagePool(8, 2)
    cached(blocks, [1, 2**32])
    for other in ([1, 0], [1 + 2**32, 0], [2**32, 1], [1, 2**33], [1, -(2**32)]):
        assert blocks.match_prefix(other, 2) == []


def test_publishing_goes_on_where_it_stopped() -> None:
    blocks = PagePool(4, 2)
    tokens = [7, 8, 9, 10, 11]
    pages = blocks.allocate(3)
    assert pages is not None
    assert blocks.register_prefix(tokens, pages, 0, 1) == 0
    assert blocks.match_prefix(tokens, 5) == []
    done = blocks.register_prefix(tokens, pages, 0, 3)
    assert done == 1 and blocks.match_prefix(tokens, 5) == pages[:1]
    assert blocks.register_prefix(tokens, pages, done, 3) == 1
    assert blocks.register_prefix(tokens, pages, done, 5) == 2 and blocks.match_prefix(tokens, 5) == pages[:2]
    assert blocks.register_prefix(tokens, pages, 2, 1) == 2, "what is published stays so"


def test_the_first_registration_stays() -> None:
    """Two sequences computed the same; the second's page is nobody's when it leaves, but its chain goes on."""
    blocks = PagePool(4, 2)
    first, second = blocks.allocate(1), blocks.allocate(2)
    assert first is not None and second is not None
    blocks.register_prefix([1, 2], first, 0, 2)
    assert blocks.register_prefix([1, 2, 3, 4], second, 0, 4) == 2
    assert blocks.match_prefix([1, 2, 3, 4], 4) == [first[0], second[1]]
    blocks.release([first[0], second[1]])
    blocks.release(second)
    assert blocks.match_prefix([1, 2, 3, 4], 4) == [first[0], second[1]]
    # Fresh pages are three: the one never used, the second's own first page, and nothing that is held.
    rest = blocks.allocate(2)
    assert rest is not None and second[0] in rest and blocks.evictions == 0 and blocks.available == 0


def test_held_pages_are_never_evicted_and_the_last_go_first() -> None:
    blocks = PagePool(6, 1)
    old, new = cached(blocks, [1, 2, 3]), cached(blocks, [4, 5])
    assert blocks.available == 6 and blocks.evictions == 0
    held = blocks.match_prefix([4], 1)
    assert held == new[:1] and blocks.available == 5
    taken = blocks.allocate(3)
    assert taken is not None and set(taken[1:]) == set(old[1:]), "one blank page, then the old one's last"
    assert blocks.evictions == 2
    assert blocks.match_prefix([1, 2, 3], 3) == old[:1], "its first page is still there"
    assert blocks.allocate(1) == new[1:], "of the other all but the held page"
    assert blocks.allocate(1) is None
    assert blocks.match_prefix([4, 5], 2) == held


def test_a_match_makes_a_page_recent() -> None:
    blocks = PagePool(2, 1)
    first, second = cached(blocks, [1]), cached(blocks, [2])
    assert blocks.match_prefix([1], 1) == first
    blocks.release(first)
    assert blocks.allocate(1) == second


def test_evicted_content_is_forgotten() -> None:
    blocks = PagePool(1, 1)
    cached(blocks, [1])
    page = blocks.allocate(1)
    assert page is not None and blocks.match_prefix([1], 1) == []
    blocks.release(page)
    assert blocks.match_prefix([1], 1) == [] and blocks.allocate(1) == page and blocks.evictions == 1


def test_a_match_may_ask_for_room() -> None:
    """Idle pages that are matched are no longer free for the rest; held ones cost nothing."""
    blocks = PagePool(4, 1)
    pages = cached(blocks, [1, 2])
    digests: list[bytes] = []
    assert blocks.match_prefix([1, 2, 3, 4, 5], 4, total=5, digests=digests) is None
    assert blocks.available == 4 and blocks.looked_up_tokens == blocks.matched_tokens == 0
    assert blocks.match_prefix([1, 2, 3, 4], 3, total=4, digests=list(digests)) == pages
    assert blocks.available == 2
    assert blocks.match_prefix([1, 2, 3, 4, 5], 4, total=5, digests=digests) is None
    assert blocks.match_prefix([1, 2, 3, 4, 5], 4, total=4, digests=digests) == pages
    assert blocks.available == 2 and len(digests) == 3


def test_releasing_too_often_is_an_error() -> None:
    blocks = PagePool(2, 1)
    pages = blocks.allocate(1)
    assert pages is not None
    blocks.release(pages)
    with pytest.raises(ValueError, match="page 0 is released, which no sequence holds"):
        blocks.release(pages)


class PlainBlocks:
    """The same rules with nothing clever: contents are whole prefixes, and everything is looked up by search."""

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self.content: dict[int, tuple[int, ...]] = {}
        self.holders: Counter[int] = Counter()
        self.idle: list[int] = []
        self.pages = range(pages)
        self.evictions = 0

    def free(self) -> int:
        return sum(self.holders[page] == 0 for page in self.pages)

    def match(self, tokens: list[int], most: int) -> list[int]:
        found: list[int] = []
        for end in range(self.size, min(most, len(tokens)) + 1, self.size):
            page = [page for page, prefix in self.content.items() if prefix == tuple(tokens[:end])]
            if not page:
                break
            found += page
        for page in found:
            self.holders[page] += 1
            self.idle = [other for other in self.idle if other != page]
        return found

    def expected_evictions(self, count: int) -> list[int]:
        blank = sum(self.holders[page] == 0 and page not in self.content for page in self.pages)
        return self.idle[: max(0, count - blank)]

    def take(self, pages: list[int]) -> None:
        for page in pages:
            if page in self.content:
                self.evictions += 1
                del self.content[page]
            self.idle = [other for other in self.idle if other != page]
            self.holders[page] += 1

    def publish(self, tokens: list[int], pages: list[int], ready: int) -> None:
        for place in range(ready // self.size):
            prefix = tuple(tokens[: (place + 1) * self.size])
            if prefix not in self.content.values():
                self.content[pages[place]] = prefix

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page] == 0 and page in self.content:
                self.idle.append(page)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 14), st.integers(1, 3))
def test_random_use_against_the_plain_manager(rng: random.Random, pages: int, size: int) -> None:
    blocks, plain = PagePool(pages, size), PlainBlocks(pages, size)
    held: list[list[int]] = []
    for _ in range(60):
        if held and rng.random() < 0.4:
            mine = held.pop(rng.randrange(len(held)))
            blocks.release(mine)
            plain.release(mine)
        else:
            # Two tokens make prefixes meet often.
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 5 * size))]
            most = rng.randrange(len(tokens) + 2)
            mine = blocks.match_prefix(tokens, most) or []
            assert mine == plain.match(tokens, most)
            count = blocks.pages_for(len(tokens)) - len(mine)
            evicted, room = plain.expected_evictions(count), plain.free()
            fresh = blocks.allocate(count)
            assert (fresh is None) == (count > room)
            if fresh is not None:
                assert [page for page in fresh if page in plain.content] == evicted
                plain.take(fresh)
                mine = mine + fresh
                ready = rng.randrange(len(mine) * size - count * size, len(tokens) + 1)
                done = blocks.register_prefix(tokens, mine, len(mine) - count, ready)
                assert done == max(len(mine) - count, ready // size)
                plain.publish(tokens, mine, ready)
            held.append(mine)
        assert blocks.available == plain.free() and blocks.evictions == plain.evictions
    for mine in held:
        blocks.release(mine)
    assert blocks.available == pages


def test_after_a_reset_nothing_is_found() -> None:
    """Evictable pages are free again; held ones stay, and what their sequence registers later is not found either."""
    pool = PagePool(6, 2)
    running, ended = pool.allocate(3), pool.allocate(2)
    assert running is not None and ended is not None
    root, tokens = pool.root(), [1, 2, 3, 4, 5, 6]
    done = pool.register_prefix(tokens, running, 0, 2, root)
    pool.register_prefix([7, 8, 9, 10], ended, 0, 4)
    pool.release(ended)
    assert pool.evictable == 2
    pool.reset()
    assert pool.evictable == 0 and pool.available == 3
    assert pool.match_prefix(tokens, 6) == [] and pool.match_prefix([7, 8, 9, 10], 4) == []
    assert pool.register_prefix(tokens, running, done, 6, root) == 3
    assert pool.match_prefix(tokens, 6) == []
    # Even if its beginning is computed anew: the later pages were computed before.
    anew = pool.allocate(1)
    assert anew is not None
    pool.register_prefix(tokens, anew, 0, 2)
    assert pool.match_prefix(tokens, 6) == anew
    pool.release(running)
    assert pool.allocate(5) is not None, "a page was leaked"
