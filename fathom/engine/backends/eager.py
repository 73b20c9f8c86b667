"""From chunks of tokens to states and logits: the tensor side of the engine.

Two ways lead through the same weights and the same cache. The model's own modules take any number of tokens on any
device: all of them pass as one row, in attention each chunk goes on its own, but on a GPU many together. Few tokens,
the usual step, take a single call instead: of compiled C++ on the CPU (fathom/engine/backends/cpu.py), of a recorded
graph on a GPU (fathom/engine/backends/cuda_graph.py).

Shapes: N tokens of all chunks, B chunks of one length, S length, T tokens of a sequence, D hidden, O vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fathom.engine.backends import cpu as native
from fathom.engine.batch import BatchMetadata
from fathom.engine.kv_cache import LatentCache
from fathom.model.cached_batch import CachedBatch, DecodeBatch, Routed, VarlenBatch, prefer_expanded
from fathom.model.layers import at_least_float32
from fathom.model.transformer import Model
from fathom.ops import gpu
from fathom.ops.attention import SeqLens
from fathom.runtime.precision import bfloat16_is_emulated

if TYPE_CHECKING:
    from fathom.engine.backends import cuda_graph as graphed

_SHORT = 8
"""Stretches up to this length attend together with others of the same length."""
_FEW_KEYS = 256
"""On a GPU the latents of sequences up to this length are expanded in any case: to begin takes longer than to do."""
_MOST_KEYS = 1 << 14
"""On a GPU sequences that are expanded attend together while they have no more tokens than that in all."""


class SequenceChunk(NamedTuple):
    """Consecutive tokens of one sequence that go through the model."""

    tokens: Sequence[int]
    start: int
    """Slot of the first one: its position, in the main model."""
    pages: Sequence[int]
    """Where the sequence's slots lie."""
    write_from: int = 0
    """Slots before it stay as they are: they belong to others too."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Output(NamedTuple):
    """What a pass computed."""

    h_ND: Tensor
    """Every token's final state, float32 at least."""
    logits_NO: Tensor
    """Logits of the tokens that were asked for, float32 at least."""
    routed: Routed
    """The experts that every token took in the main model; of no layer where a drafting module ran."""


class Runner:
    """A model with its cache."""

    def __init__(self, model: Model, pages: int, page_size: int, positions: int, eager: bool = False) -> None:
        """`positions`: slots that one sequence may take at most. With `eager` everything goes through plain torch."""
        weight = model.embed_tokens.weight
        self.model = model
        self.cache = LatentCache(model.config, pages, page_size, weight.dtype, weight.device)
        self._compute = _compute_dtype(weight)
        # Triton's kernels go to the current device.
        self._current = partial(torch.cuda.device, weight.device) if weight.is_cuda else nullcontext
        self._gathers = weight.is_cuda
        self.few = None if eager else _for_few(model, self.cache.latents_LMW, page_size, positions)

    def prepare(self, tokens: int) -> None:
        """Compile and record now, on a GPU, what steps of up to so many tokens need."""
        if self.few is not None:
            with self._current():
                self.few.prepare(tokens)

    @property
    def compile_seconds(self) -> float:
        """Spent so far on that, whenever it was needed."""
        return 0.0 if self.few is None else self.few.compile_seconds

    @torch.no_grad()
    def main(self, chunks: Sequence[SequenceChunk], logits_indices: Sequence[int]) -> Output:
        """Run the main model over the chunks; logits of the tokens at the places `logits_indices` among all of them."""
        with self._current():
            return self._run(None, chunks, logits_indices, None)

    @torch.no_grad()
    def draft(self, chunks: Sequence[SequenceChunk], h_ND: Tensor, logits_indices: Sequence[int]) -> Output:
        """Run the first MTP module: every token with the state of the one before it."""
        with self._current():
            return self._run(0, chunks, logits_indices, h_ND)

    @torch.no_grad()
    def write_mtp_kv_cache(self, chunks: Sequence[SequenceChunk], h_ND: Tensor) -> None:
        """Let the first MTP module write its latents of every token with the state of the one before it."""
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        with self._current():
            if self.few is not None and tokens <= self.few.max_cache_write_tokens:
                self.few.run(0, self._flat(chunks), (), h_ND, cache_only=True)
                return
            ids_N = self._indices(chain.from_iterable(chunk.tokens for chunk in chunks))
            self.model.write_mtp_kv_cache(0, ids_N, h_ND.to(self._compute), self._batch(chunks, 1))

    def _run(
        self,
        module: int | None,
        chunks: Sequence[SequenceChunk],
        logits_indices: Sequence[int],
        prev_hidden_ND: Tensor | None,
    ) -> Output:
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        if self.few is not None and tokens <= self.few.max_tokens_per_call:
            return Output(*self.few.run(module, self._flat(chunks), logits_indices, prev_hidden_ND))
        ids_N = self._indices(chain.from_iterable(chunk.tokens for chunk in chunks))
        if prev_hidden_ND is None or module is None:
            h_ND, routed = self.model.forward_with_cache(ids_N, self._batch(chunks, 0), self._compute)
        else:
            # No pair of a state and the token after it ends in a sequence's first token: slot 0 is never written.
            h_ND = self.model.forward_mtp_with_cache(
                module, ids_N, prev_hidden_ND.to(self._compute), self._batch(chunks, 1)
            )
            nothing_LNK = ids_N.new_empty(0, tokens, self.model.config.num_experts_per_tok)
            routed = Routed(nothing_LNK, nothing_LNK.float())
        logits_NO = self.model.logits(h_ND.index_select(0, self._indices(logits_indices)))
        return Output(at_least_float32(h_ND), at_least_float32(logits_NO), routed)

    def _flat(self, chunks: Sequence[SequenceChunk]) -> BatchMetadata:
        """Every token's place, and the chunks' pages, padded. Plain Python: for few tokens faster than arrays."""
        size, nowhere = self.cache.page_size, self.cache.nowhere
        most_pages = max(len(chunk.pages) for chunk in chunks)
        metadata = BatchMetadata(most_pages)
        for row, (tokens, start, pages, write_from) in enumerate(chunks):
            places = range(start, start + len(tokens))
            metadata.token_ids.extend(tokens)
            metadata.positions.extend(places)
            metadata.slot_mapping.extend(
                [pages[at // size] * size + at % size if at >= write_from else nowhere for at in places]
            )
            metadata.seq_indices.extend([row] * len(tokens))
            metadata.block_tables.extend(pages)
            metadata.block_tables.extend([0] * (most_pages - len(pages)))
        return metadata

    def _batch(self, chunks: Sequence[SequenceChunk], first: int) -> CachedBatch:
        """The same for plain torch, in sub_batches; slots before `first` are out of sight."""
        groups: list[list[SequenceChunk]] = []
        for chunk in chunks:
            if groups and self._joins(chunk, groups[-1], first):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        writes = np.concatenate([self._writes(chunk) for chunk in chunks])
        sub_batches = tuple(self._piece(group, first) for group in groups)
        return CachedBatch(sub_batches, self._on_device(writes), self.cache.latents_LMW)

    def _joins(self, chunk: SequenceChunk, group: list[SequenceChunk], first: int) -> bool:
        """Whether it attends together with those before it."""
        if self._gathers and self._expands(group[0], first):
            return self._expands(chunk, first) and sum(one.end - first for one in (chunk, *group)) <= _MOST_KEYS
        return len(chunk.tokens) == len(group[0].tokens) <= _SHORT

    def _expands(self, chunk: SequenceChunk, first: int) -> bool:
        config, keys = self.model.config, chunk.end - first
        widths = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)
        few = self._gathers and keys <= _FEW_KEYS
        return few or prefer_expanded(len(chunk.tokens), keys, *widths)

    def _piece(self, group: list[SequenceChunk], first: int) -> DecodeBatch | VarlenBatch:
        positions = [np.arange(chunk.start, chunk.end) - first for chunk in group]
        slots = [self._slots(chunk, first) for chunk in group]
        if (len(group) == 1 or self._gathers) and self._expands(group[0], first):
            lengths = SeqLens.of([len(p) for p in positions], [len(s) for s in slots], self.cache.latents_LMW.device)
            every = [self._on_device(np.concatenate(arrays)) for arrays in (positions, slots)]
            return VarlenBatch(every[0], every[1], lengths)
        padded = np.full((len(group), max(map(len, slots))), self.cache.nowhere)
        for row, own in enumerate(slots):
            padded[row, : len(own)] = own
        return DecodeBatch(self._on_device(np.stack(positions)), self._on_device(padded))

    def _slots(self, chunk: SequenceChunk, first: int) -> np.ndarray:
        """Where slots `first` … of the chunk's sequence lie, up to its end."""
        at, size = np.arange(first, chunk.end), self.cache.page_size
        return np.asarray(np.array(chunk.pages)[at // size] * size + at % size)

    def _indices(self, numbers: Iterable[int]) -> Tensor:
        return self._on_device(np.fromiter(numbers, np.int64))

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.cache.latents_LMW.device)

    def _writes(self, chunk: SequenceChunk) -> np.ndarray:
        slots = self._slots(chunk, chunk.start)
        slots[: max(chunk.write_from - chunk.start, 0)] = self.cache.nowhere
        return slots


def _for_few(
    model: Model, latents_LMW: Tensor, page_size: int, positions: int
) -> "native.NativeModel | graphed.GraphedModel | None":
    """What takes few tokens at once, where this machine has it."""
    if native.usable(model):
        return native.NativeModel(model, latents_LMW, page_size, positions)
    if latents_LMW.is_cuda and gpu.INSTALLED:
        from fathom.engine.backends import cuda_graph as graphed  # Triton comes with torch's CUDA builds alone

        if graphed.usable(model):
            return graphed.GraphedModel(model, latents_LMW, page_size, positions)
    return None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The activations' type: the weights', but where a processor has no bfloat16 products, float32.

    Emulated, they take several times as long as widening the weights at every use.
    """
    emulated = weight.dtype == torch.bfloat16 and bfloat16_is_emulated(weight.device)
    return torch.float32 if emulated else weight.dtype
