"""What runs the model for the engine: plain torch, compiled C++ on a CPU, CUDA graphs on a GPU."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fathom.engine.backends.cpu import CpuBackend
from fathom.engine.backends.cpu import supports as cpu_supports
from fathom.engine.backends.eager import EagerBackend
from fathom.engine.batch import ForwardOutput, SequenceChunk
from fathom.engine.kv_cache import LatentCache
from fathom.model.transformer import Model
from fathom.ops import gpu


class Backend(Protocol):
    """Forward passes over chunks of sequences whose latents lie in a paged cache.

    Shapes: N tokens of all chunks, D hidden, O vocabulary.
    """

    cache: LatentCache
    compile_seconds: float
    """Seconds spent so far on compiling kernels and capturing graphs."""

    def forward(self, chunks: Sequence[SequenceChunk], logits_indices: Sequence[int]) -> ForwardOutput:
        """Run the main model; `logits_indices` select, among all N tokens, those whose logits are computed."""

    def forward_mtp(
        self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor, logits_indices: Sequence[int]
    ) -> ForwardOutput:
        """Run the first MTP module: every token with the hidden state of the token before it, (N, D)."""

    def write_mtp_kv_cache(self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor) -> None:
        """Write the latents that `forward_mtp` writes, bit for bit, and compute nothing else."""

    def warm_up(self, tokens: int) -> None:
        """Compile and capture now whatever passes of up to `tokens` tokens need."""

    def refresh_weights(self) -> None:
        """Bring copies of weights up to date, after the model's parameters changed in place."""


def choose(model: Model, pages: int, page_size: int, max_positions: int, eager: bool = False) -> Backend:
    """The fastest backend for this model on this machine, with a new cache of `pages` pages.

    `max_positions`: slots that one sequence may take at most. With `eager`, plain torch alone.
    """
    weight = model.embed_tokens.weight
    cache = LatentCache(model.config, pages, page_size, weight.dtype, weight.device)
    if eager:
        return EagerBackend(model, cache)
    if cpu_supports(model):
        return CpuBackend(model, cache, max_positions)
    if weight.is_cuda and gpu.TRITON_INSTALLED:
        from fathom.engine.backends import cuda_graph  # Triton comes with torch's CUDA builds alone

        if cuda_graph.supports(model):
            return cuda_graph.CudaGraphBackend(model, cache, max_positions)
    return EagerBackend(model, cache)
