"""The tokens of one pass through the model, as flat lists of numbers."""

from array import array
from dataclasses import dataclass, field


def _whole_numbers() -> "array[int]":
    return array("q")


@dataclass
class BatchMetadata:
    """The tokens of a pass: whole numbers of 64 bits, one for each token but for `pages`."""

    max_blocks_per_seq: int
    """Length of the rows of `pages`."""
    token_ids: "array[int]" = field(default_factory=_whole_numbers)
    positions: "array[int]" = field(default_factory=_whole_numbers)
    """In its sequence."""
    slot_mapping: "array[int]" = field(default_factory=_whole_numbers)
    """Where its latent goes."""
    seq_indices: "array[int]" = field(default_factory=_whole_numbers)
    """Which row of `pages` is its sequence's."""
    block_tables: "array[int]" = field(default_factory=_whole_numbers)
    """Row after row."""
