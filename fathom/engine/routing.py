"""Which experts the main model's tokens were routed to: totals per expert, and token by token where requested.

Shapes: N tokens of a pass, T tokens of a request, L MoE layers, E experts, K experts per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_UNCOUNTED = 64
"""Passes whose routing is kept until all of it is counted at once."""


class ExpertLoad:
    """How many tokens each expert has served."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._total_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._uncounted: list[Tensor] = []

    def add(self, experts_LNK: Tensor) -> None:
        """Count a pass."""
        self._uncounted.append(experts_LNK)
        if len(self._uncounted) == _MAX_UNCOUNTED:
            self._count()

    def total(self) -> Tensor:
        """Tokens per expert so far, (L, E) int64."""
        self._count()
        return self._total_LE.clone()

    def _count(self) -> None:
        if self._uncounted:
            experts_LX = torch.cat(self._uncounted, dim=1).flatten(1)
            self._total_LE.scatter_add_(1, experts_LX, torch.ones_like(experts_LX))
            self._uncounted.clear()


class RoutingRecord:
    """The routing of one request's tokens, in host memory; another thread may read it while it grows."""

    def __init__(self, layers: int, topk: int, weights: bool) -> None:
        """`weights`: record the experts' weights, too."""
        self.num_tokens = 0
        self._experts_TLK = torch.empty(0, layers, topk, dtype=torch.int16)
        self._weights_TLK = torch.empty(0, layers, topk) if weights else None

    def add(self, start: int, experts_LNK: Tensor, weights_LNK: Tensor | None = None) -> None:
        """Record N tokens from token `start` on; those of the prefix cache come without weights."""
        end = start + experts_LNK.shape[1]
        self._experts_TLK = _with_room(self._experts_TLK, end)
        self._experts_TLK[start:end] = experts_LNK.transpose(0, 1)
        if self._weights_TLK is not None:
            self._weights_TLK = _with_room(self._weights_TLK, end)
            if weights_LNK is not None:
                self._weights_TLK[start:end] = weights_LNK.transpose(0, 1)
            else:  # after a preemption, tokens that are found again keep theirs
                self._weights_TLK[max(start, self.num_tokens) : end] = torch.nan
        self.num_tokens = max(self.num_tokens, end)

    def truncate(self, tokens: int) -> None:
        """Keep the first tokens alone."""
        self.num_tokens = min(self.num_tokens, tokens)

    def experts(self) -> Tensor:
        """Ids (L, T, K) int16, of the tokens so far."""
        tokens = self.num_tokens  # read first: the tensor has room for so many, whatever is added meanwhile
        return self._experts_TLK[:tokens].transpose(0, 1)

    def weights(self) -> Tensor | None:
        """Their weights (L, T, K) float32; NaN for tokens found in the prefix cache."""
        tokens = self.num_tokens
        return None if self._weights_TLK is None else self._weights_TLK[:tokens].transpose(0, 1)


class PageRouting:
    """The routing of cached pages whose requests recorded it.

    What is kept of a page is overwritten when such a request registers it anew, before which none can find it.
    """

    salt = b"with routing"
    """Part of such pages' digests: a request that returns its routing matches these pages alone."""

    def __init__(self) -> None:
        self._experts: dict[int, Tensor] = {}

    def save(self, record: RoutingRecord, pages: Sequence[int], first: int, last: int, page_size: int) -> None:
        """Keep the routing of a sequence's pages `first` to `last` - 1, which are full."""
        experts_LTK = record.experts()
        for index in range(first, last):
            self._experts[pages[index]] = experts_LTK[:, index * page_size : (index + 1) * page_size].clone()

    def load(self, record: RoutingRecord, pages: Sequence[int]) -> None:
        """Record the routing of the first pages of a sequence, which were found in the prefix cache."""
        if pages:
            record.add(0, torch.cat([self._experts[page] for page in pages], dim=1))


def _with_room(tensor: Tensor, tokens: int) -> Tensor:
    """A tensor of at least so many rows that begins with these; at least twice as many, so that growing is cheap."""
    if tokens <= len(tensor):
        return tensor
    larger = tensor.new_empty(max(tokens, 2 * len(tensor)), *tensor.shape[1:])
    larger[: len(tensor)] = tensor
    return larger
