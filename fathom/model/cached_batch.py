"""Which tokens a forward pass brings, and where the latents of all the tokens before them lie: values, passed in.

A step of the engine brings tokens of several sequences, here many of one (a prompt), there one of each (decoding). All
but attention treats tokens alone, so they pass as one row; attention takes them by the piece. Latents lie in slots that
the caller assigns as it likes. The model remembers nothing: a rejected draft is undone by writing its slots again.

Shapes: N tokens of the pass, B sequences, S new tokens of each, T tokens of each in all (of all of them, in a ragged
piece), M slots, L layers, W = C+R, K experts per token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.ops.attention import SeqLens


@dataclass(frozen=True)
class DecodeBatch:
    """B sequences that bring S tokens each. They attend in the absorbed form."""

    positions_BS: Tensor
    """Where each new token stands in its sequence."""
    slots_BT: Tensor
    """Where the latents of tokens 0 … T−1 lie, the new ones among them; a shorter sequence may name any slot."""

    @property
    def positions(self) -> Tensor:
        return self.positions_BS.flatten()


@dataclass(frozen=True)
class VarlenBatch:
    """Sequences of any lengths, one after another. They attend in the expanded form, which pays for many new tokens.

    The new tokens are the last ones of each.
    """

    positions: Tensor
    """Where each new token stands in its sequence, (new tokens)."""
    slots_T: Tensor
    """Where the latents of every token of every sequence lie."""
    lengths: SeqLens
    """How many new tokens (queries), and tokens in all (keys), each sequence has."""


@dataclass(frozen=True)
class CachedBatch:
    """What one pass brings, and where it finds and leaves its latents."""

    sub_batches: tuple[DecodeBatch | VarlenBatch, ...]
    slot_mapping_N: Tensor
    """The slot each new token's latent is written to, piece after piece, sequence after sequence."""
    cache_LMW: Tensor
    """One layer after another, those of the MTP modules last."""

    @property
    def positions(self) -> Tensor:
        """Positions of all new tokens, (1, N)."""
        return torch.cat([piece.positions for piece in self.sub_batches])[None]

    def layer(self, index: int) -> "LayerCache":
        """What one layer's attention sees of it."""
        return LayerCache(self.sub_batches, self.slot_mapping_N, self.cache_LMW[index])


class LayerCache(NamedTuple):
    """A layer's part of a batch."""

    sub_batches: tuple[DecodeBatch | VarlenBatch, ...]
    slot_mapping_N: Tensor
    latents_MW: Tensor


def prefer_expanded(queries: int, keys: int, nope: int, rope: int, value: int, latent: int) -> bool:
    """Whether building `keys` keys and values per head costs less than `queries` queries against the latents.

    Multiplications per head: expanded, every latent is projected up, then narrow keys are attended; absorbed, every
    query and result is projected, and the wide latents are attended.
    """
    expanded = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    return expanded < absorbed
