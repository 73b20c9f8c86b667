"""Targets by their definition, one position at a time; padding and documents; what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.data.batch import PADDING_DOCUMENT, document_ids, next_token_batch, packed_batch
from fathom.ops.loss import IGNORE

EOS_ID = 1


def test_documents_end_with_their_end_token() -> None:
    tokens_BW = torch.tensor([[5, 6, EOS_ID, 7, EOS_ID, EOS_ID, 8, 9]])
    assert document_ids(tokens_BW, EOS_ID).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]


@given(modules=st.integers(0, 3), length=st.integers(1, 8), padded=st.integers(0, 6), seed=st.integers(0, 99))
def test_targets_are_those_of_the_definition(modules: int, length: int, padded: int, seed: int) -> None:
    width = length + 1 + modules
    tokens_BW = torch.randint(1, 5, (3, width), generator=torch.Generator().manual_seed(seed))
    documents_BW = document_ids(tokens_BW, EOS_ID)
    documents_BW[2, max(1, width - padded) :] = PADDING_DOCUMENT
    batch = next_token_batch(tokens_BW, modules, documents_BW)
    assert torch.equal(batch.tokens_BT, tokens_BW[:, :-1])
    assert torch.equal(torch.cat((batch.inputs, batch.lookahead), 1), batch.tokens_BT)
    assert batch.inputs.shape == (3, length)
    count = [0] * (modules + 1)
    for k in range(modules + 1):
        for b in range(3):
            for i in range(length):
                here, there = documents_BW[b, i], documents_BW[b, i + k + 1]
                predicted = there != PADDING_DOCUMENT and (k == 0 or here == there)
                assert batch.targets_HBS[k, b, i] == (tokens_BW[b, i + k + 1] if predicted else IGNORE)
                count[k] += bool(predicted)
    assert batch.target_weights().tolist() == count
    expected = documents_BW[:, :-1] == PADDING_DOCUMENT
    assert torch.equal(batch.padding_BT if batch.padding_BT is not None else torch.zeros_like(expected), expected)


def test_rows_of_one_document_have_every_target() -> None:
    tokens_BW = torch.arange(2 * 7).view(2, 7)
    batch = next_token_batch(tokens_BW, modules=2)
    assert batch.targets_HBS.tolist() == [[[k + 1 + i + 7 * b for i in range(4)] for b in range(2)] for k in range(3)]
    assert batch.padding_BT is None


def test_rows_too_short_for_one_input_are_refused() -> None:
    with pytest.raises(ValueError, match="rows have 2 tokens; a model with 1 MTP modules needs at least 3"):
        next_token_batch(torch.zeros(1, 2, dtype=torch.int64), modules=1)


def test_no_target_lies_beyond_its_segment() -> None:
    tokens_BS = torch.tensor([[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])
    batch = packed_batch(tokens_BS, torch.tensor([0, 3, 5, 6, 10], dtype=torch.int32), modules=1)
    none = IGNORE
    assert batch.targets_HBS.tolist() == [
        [[11, 12, none, 14, none], [none, 17, 18, 19, none]],
        [[12, none, none, none, none], [none, 18, 19, none, none]],
    ]
    assert torch.equal(batch.inputs, tokens_BS) and batch.lookahead.numel() == 0
    assert batch.target_weights().tolist() == [6, 3]
