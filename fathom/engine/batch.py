"""What one forward pass of the engine takes and returns: chunks of sequences in, hidden states and logits out.

Shapes: N tokens of all chunks, D hidden, O vocabulary, L MoE layers, K experts per token.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fathom.model.router import RouterOutput


class SequenceChunk(NamedTuple):
    """Consecutive tokens of one sequence that go through the model."""

    tokens: Sequence[int]
    start: int
    """Slot of the first one; in the main model, its position."""
    pages: Sequence[int]
    """The sequence's block table: slot t lies in pages[t // page_size]."""
    write_from: int = 0
    """Slots before this one are not written: they lie in a page shared with other sequences."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Routed(NamedTuple):
    """Which experts the N tokens of a pass took in each of L MoE layers, and with what weights."""

    experts_LNK: Tensor
    weights_LNK: Tensor

    @staticmethod
    def of(layers: Sequence[RouterOutput], h_ND: Tensor, experts_per_token: int) -> "Routed":
        """The layers' routing of the tokens of `h_ND`, stacked."""
        if not layers:
            none_LNK = h_ND.new_empty(0, len(h_ND), experts_per_token)
            return Routed(none_LNK.long(), none_LNK.float())
        experts_LNK = torch.stack([layer.topk_ids_BSK[0] for layer in layers])
        return Routed(experts_LNK, torch.stack([layer.weights_BSK[0] for layer in layers]))


class ForwardOutput(NamedTuple):
    """What a forward pass computed."""

    h_ND: Tensor
    """Every token's final hidden state, float32 or wider."""
    logits_NO: Tensor
    """Logits of the tokens at `logits_indices`, float32 or wider. They are valid until the backend's next pass."""
    routed: Routed
    """The experts of every token in the main model's L MoE layers; L = 0 after an MTP module's pass."""


def num_tokens(chunks: Sequence[SequenceChunk]) -> int:
    """N, of all chunks together."""
    return sum(len(chunk.tokens) for chunk in chunks)


def _int64() -> "array[int]":
    return array("q")


@dataclass
class BatchMetadata:
    """The chunks as flat int64 arrays, as the compiled backends read them; one entry per token but for the tables."""

    max_blocks_per_seq: int
    """Length of one row of `block_tables`."""
    token_ids: "array[int]" = field(default_factory=_int64)
    positions: "array[int]" = field(default_factory=_int64)
    """Each token's slot in its sequence."""
    slot_mapping: "array[int]" = field(default_factory=_int64)
    """The slot of the cache its latent is written to."""
    seq_indices: "array[int]" = field(default_factory=_int64)
    """Which row of `block_tables` is its sequence's."""
    block_tables: "array[int]" = field(default_factory=_int64)
    """Pages of each sequence, row after row, padded with 0."""

    @classmethod
    def of(cls, chunks: Sequence[SequenceChunk], page_size: int, null_slot: int) -> Self:
        """Slots that must not be written map to `null_slot`. Plain Python: for few tokens faster than arrays."""
        width = max(len(chunk.pages) for chunk in chunks)
        metadata = cls(width)
        for row, (tokens, start, pages, write_from) in enumerate(chunks):
            positions = range(start, start + len(tokens))
            metadata.token_ids.extend(tokens)
            metadata.positions.extend(positions)
            metadata.slot_mapping.extend(
                [pages[t // page_size] * page_size + t % page_size if t >= write_from else null_slot for t in positions]
            )
            metadata.seq_indices.extend([row] * len(tokens))
            metadata.block_tables.extend(pages)
            metadata.block_tables.extend([0] * (width - len(pages)))
        return metadata
