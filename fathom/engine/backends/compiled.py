"""What the compiled backends have in common: few tokens take one compiled step, more go to plain torch.

Shapes: N tokens, D hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.engine.backends.eager import EagerBackend
from fathom.engine.batch import ForwardOutput, SequenceChunk, num_tokens
from fathom.engine.kv_cache import LatentCache
from fathom.model.transformer import Model


class CompiledBackend(ABC):
    """A backend that runs passes of up to `max_tokens` tokens by `_run`, and others by an `EagerBackend`."""

    compile_seconds = 0.0
    max_tokens: int
    max_cache_write_tokens: int
    """The same for `write_mtp_kv_cache`."""

    def __init__(self, model: Model, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._eager = EagerBackend(model, cache)

    @abstractmethod
    def _run(
        self,
        module: int | None,
        chunks: Sequence[SequenceChunk],
        logits_indices: Sequence[int],
        prev_hidden_ND: Tensor | None,
        cache_only: bool = False,
    ) -> ForwardOutput:
        """Run the main model, or MTP module number `module`.

        With `cache_only` the module writes its latents and stops: h_ND is empty.
        """

    @torch.no_grad()
    def forward(self, chunks: Sequence[SequenceChunk], logits_indices: Sequence[int]) -> ForwardOutput:
        if num_tokens(chunks) > self.max_tokens:
            return self._eager.forward(chunks, logits_indices)
        return self._run(None, chunks, logits_indices, None)

    @torch.no_grad()
    def forward_mtp(
        self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor, logits_indices: Sequence[int]
    ) -> ForwardOutput:
        if num_tokens(chunks) > self.max_tokens:
            return self._eager.forward_mtp(chunks, prev_hidden_ND, logits_indices)
        return self._run(0, chunks, logits_indices, prev_hidden_ND)

    @torch.no_grad()
    def write_mtp_kv_cache(self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor) -> None:
        if num_tokens(chunks) > self.max_cache_write_tokens:
            self._eager.write_mtp_kv_cache(chunks, prev_hidden_ND)
        else:
            self._run(0, chunks, (), prev_hidden_ND, cache_only=True)

    def warm_up(self, tokens: int) -> None:  # noqa: B027 (what most backends do)
        """Nothing: the kernels are compiled once, for all models."""

    def refresh_weights(self) -> None:  # noqa: B027
        """Nothing: the model's parameters are read where they lie."""
