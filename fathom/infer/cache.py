"""The latent cache: C+R numbers per token and layer, and nothing else (DeepSeek-V3 report, section 2.1.1).

One allocation holds every layer of the main model and, after them, of every MTP module. Row b keeps one
sequence, slot t its token t. The generation loop advances positions; a rejected draft is undone by not
advancing, and its numbers are written over before anything reads them.

Shapes: L layers and MTP modules, B rows, T slots, W = C+R cache width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.model.config import ModelConfig


class LatentCache:
    """Slots for `rows` sequences of at most `slots` tokens each."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        for name, size in (("rows", rows), ("slots", slots)):
            if size < 1:
                raise ValueError(f"{name} is {size}; a cache needs at least 1")
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        # Zeros, not empty memory: slots behind the last token are masked, but a masked NaN still spreads.
        self.latents_LBTW = torch.zeros(layers, rows, slots, config.cache_width, dtype=dtype, device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes, in all layers and MTP modules."""
        layers, _, _, width = self.latents_LBTW.shape
        return layers * width * self.latents_LBTW.element_size()

    def view(self, rows: slice, length: int) -> Tensor:
        """The first `length` slots of some rows, (L, rows, length, W), sharing the cache's memory."""
        slots = self.latents_LBTW.shape[2]
        if not 1 <= length <= slots:
            raise ValueError(f"length is {length}; this cache has slots for 1 to {slots} tokens")
        return self.latents_LBTW[:, rows, :length]

    def keep(self, rows: Sequence[int]) -> None:
        """Close ranks: the given rows, in ascending order, become rows 0, 1, 2, …; the others are lost."""
        for place, row in enumerate(rows):
            if place != row:
                self.latents_LBTW[:, place] = self.latents_LBTW[:, row]
