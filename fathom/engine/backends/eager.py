"""Plain torch: the model's own modules, for any number of tokens on any device.

All tokens pass as one row; attention takes them in sub-batches. On a GPU, sequences whose keys and values are expanded
attend together in one variable-length call; otherwise short chunks of one length attend together and the others alone.

Shapes: N tokens of all chunks, B chunks of one length, S length, T tokens of a sequence, D hidden, O vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fathom.engine.batch import ForwardOutput, Routed, SequenceChunk
from fathom.engine.kv_cache import LatentCache
from fathom.model.cached_batch import CachedBatch, DecodeBatch, VarlenBatch, prefer_expanded
from fathom.model.layers import at_least_float32
from fathom.model.router import RouterOutput
from fathom.model.transformer import Model
from fathom.ops.attention import SeqLens
from fathom.runtime.precision import bfloat16_is_emulated

_SHORT = 8
"""Chunks up to this length attend together with others of the same length."""
_FEW_KEYS = 256
"""On a GPU the latents of sequences up to this length are always expanded: the launches cost more than the work."""
_MOST_KEYS = 1 << 14
"""On a GPU expanded sequences attend together up to this many tokens in all."""


class EagerBackend:
    """See `backends.Backend`."""

    compile_seconds = 0.0

    def __init__(self, model: Model, cache: LatentCache) -> None:
        weight = model.embed_tokens.weight
        self.model, self.cache = model, cache
        self._compute_dtype = _compute_dtype(weight)
        # Triton's kernels go to the current device.
        self.on_device = partial(torch.cuda.device, weight.device) if weight.is_cuda else nullcontext
        self._varlen = weight.is_cuda

    @torch.no_grad()
    def forward(self, chunks: Sequence[SequenceChunk], logits_indices: Sequence[int]) -> ForwardOutput:
        with self.on_device():
            batch = self._batch(chunks, 0)
            h_ND, routing = self.model.forward_with_cache(self._token_ids(chunks), batch, self._compute_dtype)
            return self._output(h_ND, routing, logits_indices)

    @torch.no_grad()
    def forward_mtp(
        self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor, logits_indices: Sequence[int]
    ) -> ForwardOutput:
        with self.on_device():
            ids_N, batch = self._token_ids(chunks), self._batch(chunks, 1)
            h_ND = self.model.forward_mtp_with_cache(0, ids_N, prev_hidden_ND.to(self._compute_dtype), batch)
            return self._output(h_ND, [], logits_indices)

    @torch.no_grad()
    def write_mtp_kv_cache(self, chunks: Sequence[SequenceChunk], prev_hidden_ND: Tensor) -> None:
        with self.on_device():
            ids_N, batch = self._token_ids(chunks), self._batch(chunks, 1)
            self.model.write_mtp_kv_cache(0, ids_N, prev_hidden_ND.to(self._compute_dtype), batch)

    def warm_up(self, tokens: int) -> None:
        """Nothing: there is nothing to compile."""

    def refresh_weights(self) -> None:
        """Nothing: the model's parameters are read where they lie."""

    def _output(self, h_ND: Tensor, routing: list[RouterOutput], logits_indices: Sequence[int]) -> ForwardOutput:
        routed = Routed.of(routing, h_ND, self.model.config.num_experts_per_tok)
        logits_NO = self.model.logits(h_ND.index_select(0, self._indices(logits_indices)))
        return ForwardOutput(at_least_float32(h_ND), at_least_float32(logits_NO), routed)

    def _token_ids(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        return self._indices(chain.from_iterable(chunk.tokens for chunk in chunks))

    def _batch(self, chunks: Sequence[SequenceChunk], first: int) -> CachedBatch:
        """The chunks in sub-batches. Slots before `first` are not attended: no pair of a hidden state and the token
        after it ends in a sequence's first token, so an MTP module never writes slot 0."""
        groups: list[list[SequenceChunk]] = []
        for chunk in chunks:
            if groups and self._joins(chunk, groups[-1], first):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        slot_mapping = np.concatenate([self._slot_mapping(chunk) for chunk in chunks])
        sub_batches = tuple(self._sub_batch(group, first) for group in groups)
        return CachedBatch(sub_batches, self._tensor(slot_mapping), self.cache.latents_LMW)

    def _joins(self, chunk: SequenceChunk, group: list[SequenceChunk], first: int) -> bool:
        """Whether it attends together with those before it."""
        if self._varlen and self._expands(group[0], first):
            return self._expands(chunk, first) and sum(one.end - first for one in (chunk, *group)) <= _MOST_KEYS
        return len(chunk.tokens) == len(group[0].tokens) <= _SHORT

    def _expands(self, chunk: SequenceChunk, first: int) -> bool:
        config, keys = self.model.config, chunk.end - first
        widths = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)
        few = self._varlen and keys <= _FEW_KEYS
        return few or prefer_expanded(len(chunk.tokens), keys, *widths)

    def _sub_batch(self, group: list[SequenceChunk], first: int) -> DecodeBatch | VarlenBatch:
        positions = [np.arange(chunk.start, chunk.end) - first for chunk in group]
        slots = [self._slots(chunk, first) for chunk in group]
        if (len(group) == 1 or self._varlen) and self._expands(group[0], first):
            lengths = SeqLens.of([len(p) for p in positions], [len(s) for s in slots], self.cache.latents_LMW.device)
            return VarlenBatch(self._tensor(np.concatenate(positions)), self._tensor(np.concatenate(slots)), lengths)
        longest = max(map(len, slots))
        # Behind its last token a row repeats that one's slot: masked, but others' values may be NaN, which spreads.
        padded = np.stack([np.append(own, own[-1:].repeat(longest - len(own))) for own in slots])
        return DecodeBatch(self._tensor(np.stack(positions)), self._tensor(padded))

    def _slots(self, chunk: SequenceChunk, first: int) -> np.ndarray:
        """The cache's slots for the sequence's slots `first` to the chunk's end."""
        positions, size = np.arange(first, chunk.end), self.cache.page_size
        return np.asarray(np.array(chunk.pages)[positions // size] * size + positions % size)

    def _slot_mapping(self, chunk: SequenceChunk) -> np.ndarray:
        slots = self._slots(chunk, chunk.start)
        slots[: max(chunk.write_from - chunk.start, 0)] = self.cache.null_slot
        return slots

    def _indices(self, values: Iterable[int]) -> Tensor:
        return self._tensor(np.fromiter(values, np.int64))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.cache.latents_LMW.device)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The activations' type: the weights', but float32 where a processor has no bfloat16 matmuls.

    Emulated ones take several times as long as widening the weights at every use.
    """
    emulated = weight.dtype == torch.bfloat16 and bfloat16_is_emulated(weight.device)
    return torch.float32 if emulated else weight.dtype
