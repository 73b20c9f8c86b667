"""Pages of the latent cache: reference counts, sharing by content, eviction.

A page has slots for `page_size` tokens in every layer; a sequence's slot t lies in its page t // page_size, wherever
that page is (PagedAttention, Kwon et al., arXiv 2309.06180). What a slot holds depends on its token and the ones
before it, so a full page is named by the digest of (the previous page's digest, its own tokens), and a sequence that
begins with the same tokens may hold the same page. Shared pages are full, and full pages are never written again.

A page is *held* by one sequence or more, *evictable* (held by none, its content kept for sequences to come) or *free*.
Evictable pages are evicted only when no free one is left, the least recently held first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Names a full page by its content: 16 bytes of a cryptographic hash, since a collision would mix up contents."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Allocates pages 0 … pages − 1, counts their holders, and finds full ones by content."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.looked_up_tokens = 0
        """Tokens looked up by `match_prefix`."""
        self.matched_tokens = 0
        """Those of them found in the cache."""
        self.evictions = 0
        """Evictable pages that were reused for new content."""
        self._holders = [0] * pages
        self._free = list(range(pages))[::-1]
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._digests = [b""] * pages
        """The content each page was last registered with, whether it is found under this page or another."""
        self._registered: dict[bytes, int] = {}
        self._resets = 0

    @property
    def available(self) -> int:
        """Pages that can be allocated now: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def evictable(self) -> int:
        """Pages that no sequence holds, whose content can still be found."""
        return len(self._evictable)

    @property
    def slots(self) -> int:
        """Tokens that all pages together have room for."""
        return self.pages * self.page_size

    def pages_for(self, slots: int) -> int:
        """Pages that so many slots take."""
        return -(-slots // self.page_size)

    def root(self, salt: bytes = b"") -> bytes:
        """Stands for the page before a sequence's first, until the next `reset`; each salt has its own."""
        return blake2b(self._resets.to_bytes(8, "little") + salt, digest_size=16).digest()

    def reset(self) -> None:
        """Make all content unfindable: evictable pages become free, held ones stay with their sequences.

        What those sequences register later hangs on an earlier `root`, so it cannot be found either.
        """
        self._free += reversed(self._evictable)
        self._evictable.clear()
        self._registered.clear()
        self._resets += 1

    def match_prefix(
        self,
        tokens: Sequence[int],
        most: int,
        total: int = 0,
        digests: list[bytes] | None = None,
        root: bytes | None = None,
    ) -> list[int] | None:
        """Hold the pages of the longest cached prefix of full pages, of at most `most` tokens.

        None, with nothing held or counted, if these and what is available besides are fewer than `total` pages. A
        caller that may have to try again passes a list, empty at first, which caches the digests of these tokens.
        """
        found = self._find(tokens, min(most, len(tokens)), [] if digests is None else digests, root or self.root())
        newly_held = sum(self._holders[page] == 0 for page in found)
        if len(found) + self.available - newly_held < total:
            return None
        for page in found:
            if self._holders[page] == 0:
                del self._evictable[page]
            self._holders[page] += 1
        self.looked_up_tokens += most
        self.matched_tokens += len(found) * self.page_size
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` pages without content; None, with nothing held, if fewer are available."""
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def register_prefix(
        self, tokens: Sequence[int], pages: Sequence[int], done: int, ready: int, root: bytes | None = None
    ) -> int:
        """Make a sequence's full pages findable, now that its slots before `ready` are final.

        The first `done` pages were registered before, or came from `match_prefix`; returns their new number. Content
        that two sequences computed at the same time is found under the page that was registered first.
        """
        size = self.page_size
        for place in range(done, ready // size):
            parent = self._digests[pages[place - 1]] if place else root or self.root()
            digest = _digest(parent, tokens[place * size : (place + 1) * size])
            self._digests[pages[place]] = digest
            self._registered.setdefault(digest, pages[place])
        return max(done, ready // size)

    def release(self, pages: Sequence[int]) -> None:
        """Give back a sequence's pages, listed in its order.

        Its last pages are evicted first: a later page can only be found through the earlier ones.
        """
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise ValueError(
                    f"page {page} is released, which no sequence holds; it must be released once per holder"
                )
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._put_back(page)

    def _find(self, tokens: Sequence[int], most: int, digests: list[bytes], root: bytes) -> list[int]:
        found: list[int] = []
        size = self.page_size
        for place in range(most // size):
            if place == len(digests):
                parent = digests[-1] if digests else root
                digests.append(_digest(parent, tokens[place * size : (place + 1) * size]))
            page = self._registered.get(digests[place])
            if page is None:
                break
            found.append(page)
        return found

    def _put_back(self, page: int) -> None:
        if self._registered.get(self._digests[page]) == page:
            self._evictable[page] = None
        else:
            self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        del self._registered[self._digests[page]]
        self.evictions += 1
        return page
