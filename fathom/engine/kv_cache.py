"""The latent cache: C+R values per token and layer, and nothing else (DeepSeek-V3 report, section 2.1.1).

One allocation holds every layer of the main model and, after them, of every MTP module, cut into pages of a few tokens
that sequences take as they grow. A rejected draft needs no undoing: its slots are written again before they are read.
One extra page takes what must not be written anywhere else.

Shapes: L layers and MTP modules, M slots, W = C+R cache width.
"""

import torch

from fathom.model.config import ModelConfig


class LatentCache:
    """`pages` pages of `page_size` tokens; slot s of page p is slot p · page_size + s of the allocation."""

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        slots = (pages + 1) * page_size
        # Zeros, not empty memory: slots behind the last token are masked, but a masked NaN still spreads. (The system
        # hands out zeros page by page as they are touched, so room that is never used takes no memory.)
        self.latents_LMW = torch.zeros(layers, slots, config.cache_width, dtype=dtype, device=device)
        self.pages, self.page_size = pages, page_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes, in all layers and MTP modules."""
        layers, _, width = self.latents_LMW.shape
        return layers * width * self.latents_LMW.element_size()

    @property
    def null_slot(self) -> int:
        """A slot that no sequence reads."""
        return self.pages * self.page_size
