"""A micro-batch of training: everything that a loss needs of the data, made once where the rows are read.

Shapes: B rows, S inputs of a row, M tokens of lookahead (one per MTP module), T = S + M, W = T + 1 tokens of a row as
read (inputs, target of the last, lookahead), H = 1 + M heads (the main one first).
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fathom.ops.loss import IGNORE

PADDING_DOCUMENT = -1
"""Document of a token that is padding."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Input tokens, and what each head is to predict after each of them."""

    tokens_BT: Tensor
    """int64: the inputs, then the lookahead that MTP modules take as inputs for the last ones."""
    targets_HBS: Tensor
    """int64: at [k, b, i] token i + k + 1 of row b, or IGNORE where head k has nothing to predict."""
    weights_HBS: Tensor | None = None
    """Float: the weight of each target in the loss; None: all are 1."""
    positions_BS: Tensor | None = None
    """int64: the position of each input; None: counted from 0 in each row, or in each segment."""
    cu_seqlens: Tensor | None = None
    """int32 (1 + G): boundaries, over the flattened B·S inputs, of segments that do not attend to each other; None:
    each row is one segment. A batch of segments has no lookahead: what follows a segment belongs to another."""
    padding_BT: Tensor | None = None
    """bool: tokens that only fill a row; None: there are none."""

    def target_weights(self) -> Tensor:
        """The sum of the weights of each head's targets, (H) float64; without weights, how many there are."""
        valid_HBS = self.targets_HBS != IGNORE
        if self.weights_HBS is None:
            return valid_HBS.sum((1, 2)).double()
        return self.weights_HBS.double().masked_fill(~valid_HBS, 0).sum((1, 2))

    @property
    def inputs(self) -> Tensor:
        """The tokens that the main model takes, (B, S)."""
        return self.tokens_BT[:, : self.targets_HBS.shape[2]]

    @property
    def lookahead(self) -> Tensor:
        """The tokens after them that MTP modules take, (B, M)."""
        return self.tokens_BT[:, self.targets_HBS.shape[2] :]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; on its way to a GPU through pinned memory, so that the host need not wait."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: _to(tensor, device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def next_token_batch(tokens_BW: Tensor, modules: int, documents_BW: Tensor | None = None) -> Batch:
    """Rows of text in which the main head predicts the next token and MTP module k the one k places further.

    `documents_BW` is the document each token belongs to, `PADDING_DOCUMENT` for padding (None: each row is of one).
    The main head predicts across documents, MTP modules do not; padding is never a target.

    Raises ValueError for rows too short to hold one input.
    """
    length = tokens_BW.shape[1] - 1 - modules
    if length < 1:
        raise ValueError(
            f"rows have {tokens_BW.shape[1]} tokens; a model with {modules} MTP modules needs at least {modules + 2}: "
            "an input, its target, and one more per module"
        )
    heads = range(modules + 1)
    targets_HBS = torch.stack([tokens_BW[:, k + 1 : k + 1 + length] for k in heads])
    if documents_BW is None:
        return Batch(tokens_BW[:, :-1], targets_HBS)
    documents_HBS = torch.stack([documents_BW[:, k + 1 : k + 1 + length] for k in heads])
    padding_BW = documents_BW == PADDING_DOCUMENT
    ignored_HBS = documents_HBS == PADDING_DOCUMENT
    ignored_HBS[1:] |= documents_HBS[1:] != documents_BW[:, :length]
    padding_BT = padding_BW[:, :-1] if bool(padding_BW.any()) else None
    return Batch(tokens_BW[:, :-1], targets_HBS.masked_fill(ignored_HBS, IGNORE), padding_BT=padding_BT)


def packed_batch(tokens_BS: Tensor, cu_seqlens: Tensor, modules: int) -> Batch:
    """Rows of segments that are isolated from each other: no head predicts beyond the segment of its input.

    `cu_seqlens` (1 + G) int32 are the segments' boundaries over the flattened tokens, each row's end among them.
    """
    tokens = tokens_BS.numel()
    index_N = torch.arange(tokens, device=tokens_BS.device)
    ends_N = cu_seqlens[torch.searchsorted(cu_seqlens, index_N, right=True)]
    targets = []
    for ahead in range(1, modules + 2):
        inside_N = index_N + ahead < ends_N
        target_N = tokens_BS.flatten()[(index_N + ahead).clamp_max(tokens - 1)]
        targets.append(target_N.masked_fill(~inside_N, IGNORE).view_as(tokens_BS))
    return Batch(tokens_BS, torch.stack(targets), cu_seqlens=cu_seqlens)


def document_ids(tokens_BW: Tensor, eos_id: int) -> Tensor:
    """The document of each token, counted from 0 within its row; an end token belongs to the document it ends."""
    ends_BW = (tokens_BW == eos_id).long()
    return ends_BW.cumsum(dim=1) - ends_BW
