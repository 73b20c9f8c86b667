"""Segments: sequences packed into a batch's rows and isolated from each other.

`cu_seqlens` has the meaning it has in flash attention's varlen interface: int32 boundaries over the flattened B·S
tokens. Segment g is tokens cu_seqlens[g] … cu_seqlens[g+1] − 1; a row's end is always a boundary.

Shapes: B rows, S tokens each, N = B·S tokens, G segments, X tokens that have a k-th successor in their segment.
"""

from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, length: int) -> None:
    """Raises ValueError unless it cuts `rows` rows of `length` tokens each. Values on a GPU are not read: the host
    would wait for them."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        shape = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} of shape {shape}; it must be int32 of shape (1 + segments)")
    if cu_seqlens.is_cuda:
        return
    ends = cu_seqlens.tolist()
    tokens = rows * length
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens is {ends}; it must increase strictly from 0 to the {tokens} tokens of the batch")
    missing = set(range(length, tokens, length)) - set(ends)
    if missing:
        raise ValueError(f"cu_seqlens is {ends}; it must contain {min(missing)}, the end of a row of {length} tokens")


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
