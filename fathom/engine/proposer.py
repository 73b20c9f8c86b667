"""The drafting side of the engine: the first MTP module proposes tokens, which the next main forward pass verifies.

A draft of t_{i+2} comes from the module fed with (hidden state h_i, token t_{i+1}); further ones from the module fed
with its own hidden state and draft. The cache entry of that pair lies at slot i+1, and the module must have seen every
pair from the prompt's first on: hidden states whose pairs it has not seen yet are `pending`, also while nothing is
drafted.

Shapes: B requests, N tokens, D hidden.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fathom.engine.backends import Backend
from fathom.engine.batch import SequenceChunk
from fathom.engine.request import RequestState
from fathom.engine.sampling.verify import draft
from fathom.engine.speculative import DraftLength

_MAX_ADAPTIVE_DRAFTS = 4
"""Drafts per step that the adaptive length goes up to."""

_MAX_PENDING = 32
"""Hidden states a request keeps for the module while nothing is drafted; the module then takes them in together."""

_RETRY_STEPS = 8192
"""Steps after which unprofitable drafting is tried again. Until then the module's cache is not kept up to date."""


class Proposer:
    """Decides how many tokens to draft, drafts them, and keeps the MTP module's cache up to date."""

    def __init__(self, backend: Backend, enabled: bool, fixed_drafts: int | None) -> None:
        """`fixed_drafts`: per step; None adapts their number to measured acceptance and cost."""
        self.fixed_drafts = fixed_drafts
        self.lengths = DraftLength(max_drafts(fixed_drafts) if enabled else 0)
        self.paused_at: int | None = None
        """The step since which drafting is switched off as unprofitable; None while it is on."""
        self._backend, self._enabled = backend, enabled

    @property
    def is_active(self) -> bool:
        """Whether the module sees every pair that the main model produces."""
        return self._enabled and self.paused_at is None

    @property
    def max_drafts(self) -> int:
        """Drafts per request and step at most."""
        return self.lengths.most if self.fixed_drafts is None else self.fixed_drafts * self._enabled

    def num_drafts(self, batch: int) -> int:
        """Drafts per request for a step in which `batch` requests decode."""
        if not self.is_active:
            return 0
        return self.lengths.choose(max(batch, 1)) if self.fixed_drafts is None else self.fixed_drafts

    def propose(self, batch: list[RequestState], drafts: int) -> None:
        """Give every request `drafts` drafts; with 0, only let the module take in what has accumulated."""
        if not self.is_active:
            return
        if drafts == 0:
            self._catch_up([request for request in batch if request.num_pending >= _MAX_PENDING], 0)
            return
        limit = max(drafts, _MAX_ADAPTIVE_DRAFTS) + 1
        self._catch_up([request for request in batch if request.num_pending > limit], 1)
        chunks = [request.pending_chunk(0) for request in batch]
        last = [end - 1 for end in accumulate(request.num_pending for request in batch)]
        prev_hidden_ND = torch.cat([request.pop_pending(0) for request in batch])
        output = self._backend.forward_mtp(chunks, prev_hidden_ND, last)
        h_BD = output.h_ND[last]
        for depth in range(drafts):
            ids = draft(output.logits_NO, [request.sampling_state() for request in batch])
            for request, token in zip(batch, ids, strict=True):
                request.drafts.append(token)
            if depth + 1 < drafts:
                chunks = [
                    SequenceChunk(request.drafts[-1:], len(request.sequence.tokens) + depth, request.sequence.pages)
                    for request in batch
                ]
                output = self._backend.forward_mtp(chunks, h_BD, range(len(batch)))
                h_BD = output.h_ND

    def is_caught_up(self, batch: Iterable[RequestState]) -> bool:
        """Whether drafting takes in no more pairs than in a usual step, so that its time says what drafts cost."""
        return all(request.num_pending <= _MAX_ADAPTIVE_DRAFTS + 1 for request in batch)

    def record(self, drafts: int, accepted: Sequence[int], seconds: float, caught_up: bool) -> bool:
        """A step of len(accepted) requests took so long; `accepted`: drafts accepted, of each request.

        Returns whether drafting has turned out unprofitable.
        """
        if not self.is_active or self.fixed_drafts is not None or not (caught_up or not drafts):
            return False
        batch = len(accepted)
        accepted_at = [sum(count > depth for count in accepted) for depth in range(drafts)]
        self.lengths.record(batch, accepted_at, seconds)
        return drafts > 0 and self.lengths.is_unprofitable(batch)

    def pause(self, step: int, requests: Iterable[RequestState]) -> None:
        """Switch drafting off for long: the module will not see the pairs of these requests."""
        self.paused_at = step
        for request in requests:
            request.clear_drafting()

    def resume_if_due(self, step: int) -> None:
        """Try again after long. Call it while there are no requests, so that the module sees them from the start.

        Prefixes cached meanwhile it has not seen: drafts behind them are worse, which their acceptance will show.
        """
        if self.paused_at is not None and step >= self.paused_at + _RETRY_STEPS:
            self.reset()

    def reset(self) -> None:
        """Discard all measurements, and draft again if drafting had been switched off."""
        self.paused_at, self.lengths = None, DraftLength(self.lengths.most)

    def add_prefill(self, chunks: list[SequenceChunk], prev_hidden_ND: list[Tensor]) -> None:
        """Let the module take in pairs of a prefill."""
        if chunks:
            self._backend.write_mtp_kv_cache(chunks, torch.cat(prev_hidden_ND))

    def _catch_up(self, behind: list[RequestState], keep: int) -> None:
        """Let the module take in the pending pairs, all but the last `keep` of each request."""
        self.add_prefill(
            [request.pending_chunk(keep) for request in behind], [request.pop_pending(keep) for request in behind]
        )


def max_drafts(fixed_drafts: int | None) -> int:
    """Drafts per step at most."""
    return _MAX_ADAPTIVE_DRAFTS if fixed_drafts is None else fixed_drafts
