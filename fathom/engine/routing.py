"""Which experts the main model's tokens were routed to: totals per expert.

Shapes: N tokens, L MoE layers, E experts, K experts per token.
"""

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
