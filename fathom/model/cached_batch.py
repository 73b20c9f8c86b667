"""The inputs of a forward pass with a latent cache: which tokens are new, and in which slots the latents lie.

One engine step runs tokens of several sequences: many of a sequence in prefill, one or a few of each in decode. Every
operation but attention works on single tokens, so all new tokens form one row; attention runs by sub-batch. The caller
assigns slots as it likes. The model keeps no state: a rejected draft is undone by writing its slots again.

Shapes: N new tokens, B sequences of a sub-batch, S new tokens of each, T tokens of each with the cached ones (summed
over sequences in a varlen sub-batch), M slots, L layers, W = C+R.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.ops.attention import SeqLens


@dataclass(frozen=True)
class DecodeBatch:
    """B sequences with S new tokens each, attended in the absorbed form."""

    positions_BS: Tensor
    """Position of each new token in its sequence."""
    slots_BT: Tensor
    """Slots of tokens 0 … T−1, the new ones included; those past the end of a shorter sequence are any slots."""

    @property
    def positions(self) -> Tensor:
        return self.positions_BS.flatten()


@dataclass(frozen=True)
class VarlenBatch:
    """Sequences of any lengths, concatenated, attended in the expanded form, which is cheaper for many new tokens.

    The new tokens are the last ones of each.
    """

    positions: Tensor
    """Position of each new token in its sequence, (new tokens)."""
    slots_T: Tensor
    """Slots of every token of every sequence."""
    lengths: SeqLens
    """New tokens (queries) and all tokens (keys) of each sequence."""


@dataclass(frozen=True)
class CachedBatch:
    """The new tokens of one forward pass, and the cache it reads and writes."""

    sub_batches: tuple[DecodeBatch | VarlenBatch, ...]
    slot_mapping_N: Tensor
    """The slot each new token's latent is written to, in the order of the sub-batches and of their sequences."""
    cache_LMW: Tensor
    """Layers in order, those of the MTP modules last."""

    @property
    def positions(self) -> Tensor:
        """Positions of all new tokens, (1, N)."""
        return torch.cat([sub_batch.positions for sub_batch in self.sub_batches])[None]

    def layer(self, index: int) -> "LayerCache":
        """The part of layer `index`."""
        return LayerCache(self.sub_batches, self.slot_mapping_N, self.cache_LMW[index])


class LayerCache(NamedTuple):
    """The batch as one layer's attention takes it."""

    sub_batches: tuple[DecodeBatch | VarlenBatch, ...]
    slot_mapping_N: Tensor
    latents_MW: Tensor


def prefer_expanded(queries: int, keys: int, nope: int, rope: int, value: int, latent: int) -> bool:
    """Whether the expanded form takes fewer multiplications than the absorbed one, for so many queries and keys.

    Per head: expanded, every latent is projected up and keys of width P+R are attended; absorbed, every query and
    result is projected and the latents of width C+R are attended.
    """
    expanded = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    return expanded < absorbed
