"""Rows of tokens for training and evaluation, cut from one file of token ids.

The file is one long stream of documents; row r is its tokens [r S, r S + S + 1 + lookahead): S inputs, the
target of the last, and `lookahead` more for the multi-token-prediction modules. Rows start S apart, so they
share those last tokens and every token but the stream's first is predicted by the main head exactly once.
The order of rows depends on (seed, epoch) alone: a resumed run continues exactly, and ranks read different slices.

Shapes: B rows, W = S + 1 + lookahead tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fathom.data.batch import PADDING_DOCUMENT, Batch, document_ids, next_token_batch


class TokenRows:
    """The rows of one token file, which stays on disk and is read as needed."""

    def __init__(
        self, path: Path, dtype: str, sequence_length: int, lookahead: int, eos_id: int, seed: int = 0
    ) -> None:
        if sequence_length < 1 or lookahead < 0 or seed < 0:
            raise ValueError(
                f"sequence_length is {sequence_length}, lookahead {lookahead} and seed {seed}; "
                "they must be at least 1, 0 and 0"
            )
        tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
        width = sequence_length + 1 + lookahead
        if len(tokens) < width:
            fitting = len(tokens) - 1 - lookahead
            raise ValueError(
                f"{path} has {len(tokens)} tokens, but sequence_length {sequence_length} takes {width}; "
                + (f"a sequence_length of at most {fitting} fits" if fitting > 0 else "use a larger corpus")
            )
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._lookahead = lookahead
        self._width = width
        self._eos_id = eos_id
        self._seed = seed
        self._order: tuple[int, np.ndarray[Any, Any]] = (0, self._permutation(epoch=0))

    def __len__(self) -> int:
        """The number of whole rows."""
        return (len(self._tokens) - self._width) // self._sequence_length + 1

    def shuffled(self, first: int, count: int) -> Batch:
        """Rows number `first` to `first + count` of the endless training order, one permutation per epoch."""
        if first < 0 or count < 1:
            raise ValueError(f"first is {first} and count {count}; they must be at least 0 and at least 1")
        rows = [self._row_at(position) for position in range(first, first + count)]
        return self._batch(self._gather(self._tokens, rows))

    def sequential(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` as they lie in the file."""
        if first < 0 or count < 1 or first + count > len(self):
            raise ValueError(f"rows {first} to {first + count} are not within the {len(self)} rows of the file")
        return self._batch(self._gather(self._tokens, range(first, first + count)))

    def tail(self) -> Batch | None:
        """What the whole rows leave unpredicted, padded; None if nothing is.

        Together with all `sequential` rows it has every token but the stream's first as a main target exactly
        once. Missing tokens are end tokens marked as padding. A second row is needed when the last whole row
        fell short only by its lookahead.
        """
        start = len(self) * self._sequence_length
        targets = len(self._tokens) - 1 - start
        if targets == 0:
            return None
        rows = -(-targets // self._sequence_length)
        missing = (rows - 1) * self._sequence_length + self._width - (targets + 1)
        stream = np.pad(self._tokens[start:], (0, missing), constant_values=self._eos_id)
        tokens_BW = self._gather(stream, range(rows))
        position_BW = torch.arange(rows)[:, None] * self._sequence_length + torch.arange(self._width)
        documents_BW = document_ids(tokens_BW, self._eos_id).masked_fill(position_BW > targets, PADDING_DOCUMENT)
        return next_token_batch(tokens_BW, self._lookahead, documents_BW)

    def _batch(self, tokens_BW: torch.Tensor) -> Batch:
        return next_token_batch(tokens_BW, self._lookahead, document_ids(tokens_BW, self._eos_id))

    def _gather(self, stream: np.ndarray[Any, Any], rows: Iterable[int]) -> torch.Tensor:
        starts = [row * self._sequence_length for row in rows]
        return torch.from_numpy(np.stack([stream[s : s + self._width] for s in starts]).astype(np.int64))

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self))
        if epoch != self._order[0]:
            self._order = (epoch, self._permutation(epoch))
        return int(self._order[1][index])

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(len(self))
