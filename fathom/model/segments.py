"""Segments: sequences packed into a batch's rows and isolated from each other.

`cu_seqlens` has the meaning it has in flash attention's varlen interface: int32 boundaries over the flattened B·S
tokens. Segment g is tokens cu_seqlens[g] … cu_seqlens[g+1] − 1; a row's end is always a boundary.

Shapes: B rows, S tokens each, N = B·S tokens, G segments, X tokens that have a k-th successor in their segment.
"""

import torch
from torch import Tensor


def segment_lengths(cu_seqlens: Tensor) -> Tensor:
    """Tokens of each segment, (G) int64."""
    return cu_seqlens.diff().long()


def segment_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The segment of each of the `tokens` tokens, (N) int64."""
    lengths_G = segment_lengths(cu_seqlens)
    ids_G = torch.arange(len(lengths_G), device=cu_seqlens.device)
    return ids_G.repeat_interleave(lengths_G, output_size=tokens)


def segment_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's position in its segment, (N) int64."""
    starts_N = cu_seqlens.long()[segment_ids(cu_seqlens, tokens)]
    return torch.arange(tokens, device=cu_seqlens.device) - starts_N


def with_successor(cu_seqlens: Tensor, tokens: int, ahead: int) -> tuple[Tensor, Tensor]:
    """The tokens whose `ahead`-th successor lies in their segment: their indices (X) int64, and the `cu_seqlens` of
    their segments when they alone are put one after another."""
    left_G = (segment_lengths(cu_seqlens) - ahead).clamp_min(0)
    keeps_N = segment_positions(cu_seqlens, tokens) < left_G[segment_ids(cu_seqlens, tokens)]
    ends_G = left_G[left_G > 0].cumsum(0)
    return keeps_N.nonzero()[:, 0], torch.cat((ends_G.new_zeros(1), ends_G)).to(torch.int32)
