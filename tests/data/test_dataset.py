"""Rows cover the stream, each target once; orders are permutations that any slicing agrees on."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.data.dataset import TokenRows
from fathom.ops.loss import IGNORE

EOS_ID = 1


def write_tokens(directory: Path, count: int, dtype: str = "uint16") -> Path:
    """Distinct tokens from 10 on, an end token after every seven."""
    tokens = np.arange(10, 10 + count, dtype=dtype)
    tokens[7::8] = EOS_ID
    path = directory / f"{count}-{dtype}.bin"
    tokens.tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_lie_end_to_end(tmp_path: Path, dtype: str) -> None:
    path = write_tokens(tmp_path, 103, dtype)
    stream = torch.from_numpy(np.fromfile(path, dtype=dtype).astype(np.int64))
    rows = TokenRows(path, dtype, sequence_length=10, lookahead=2, eos_id=EOS_ID)
    assert len(rows) == 10
    batch = rows.sequential(0, 10)
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.tokens_BT.shape == (10, 12)
    assert torch.equal(batch.inputs.flatten(), stream[:100])
    for row, tokens_T in enumerate(batch.tokens_BT):
        assert torch.equal(tokens_T, stream[row * 10 : row * 10 + 12])
        assert torch.equal(batch.targets_HBS[0, row], stream[row * 10 + 1 : row * 10 + 11])


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("count", range(14, 40))
def test_rows_and_tail_predict_every_token_once(tmp_path: Path, count: int, lookahead: int) -> None:
    path = write_tokens(tmp_path, count)
    length = 10
    rows = TokenRows(path, "uint16", length, lookahead, EOS_ID)
    batches = [rows.sequential(0, len(rows)), *filter(None, [rows.tail()])]
    targets = []
    for batch in batches:
        assert batch.tokens_BT.shape[1] == length + lookahead
        targets += batch.targets_HBS[0][batch.targets_HBS[0] != IGNORE].tolist()
    assert targets == np.fromfile(path, dtype="uint16")[1:].tolist()


def test_tail_is_padded_with_marked_end_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.array([5, 6, 7, 8, EOS_ID, 9], dtype="uint16").tofile(path)
    tail = TokenRows(path, "uint16", sequence_length=3, lookahead=1, eos_id=EOS_ID).tail()
    assert tail is not None
    assert tail.tokens_BT.tolist() == [[8, EOS_ID, 9, EOS_ID]]
    assert tail.targets_HBS.tolist() == [[[EOS_ID, 9, IGNORE]], [[IGNORE, IGNORE, IGNORE]]]
    assert tail.padding_BT is not None and tail.padding_BT.tolist() == [[False, False, False, True]]


def test_tail_is_none_when_rows_cover_all(tmp_path: Path) -> None:
    assert TokenRows(write_tokens(tmp_path, 31), "uint16", 10, 0, EOS_ID).tail() is None


# --- order


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), 200)


def order(path: Path, first: int, count: int, seed: int = 0) -> list[int]:
    """Row numbers; every row starts with a distinct token."""
    rows = TokenRows(path, "uint16", sequence_length=10, lookahead=0, eos_id=2, seed=seed)
    whole = {tuple(tokens): row for row, tokens in enumerate(rows.sequential(0, len(rows)).tokens_BT.tolist())}
    return [whole[tuple(tokens)] for tokens in rows.shuffled(first, count).tokens_BT.tolist()]


def test_epochs_are_different_permutations(path: Path) -> None:
    first, second = order(path, 0, 19), order(path, 19, 19)
    assert sorted(first) == sorted(second) == list(range(19))
    assert len({tuple(first), tuple(second), tuple(range(19))}) == 3


def test_seeds_differ_and_repeat(path: Path) -> None:
    assert order(path, 0, 19, seed=1) == order(path, 0, 19, seed=1)
    assert order(path, 0, 19, seed=1) != order(path, 0, 19, seed=2)


@given(cuts=st.lists(st.integers(1, 79), max_size=6, unique=True).map(sorted))
def test_any_slicing_gives_the_same_order(path: Path, cuts: list[int]) -> None:
    rows = TokenRows(path, "uint16", 10, 1, EOS_ID, seed=4)
    whole = rows.shuffled(0, 80)
    edges = [0, *cuts, 80]
    # Last slices first: the order must not depend on earlier calls.
    slices = [rows.shuffled(a, b - a) for a, b in reversed(list(itertools.pairwise(edges)))]
    assert torch.equal(torch.cat([batch.tokens_BT for batch in reversed(slices)]), whole.tokens_BT)
    assert torch.equal(torch.cat([batch.targets_HBS for batch in reversed(slices)], dim=1), whole.targets_HBS)


# --- bad input


def test_bad_input_is_explained(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, 20)
    with pytest.raises(ValueError, match=r"has 20 tokens.*takes 22; a sequence_length of at most 18 fits"):
        TokenRows(path, "uint16", sequence_length=20, lookahead=1, eos_id=EOS_ID)
    with pytest.raises(ValueError, match="use a larger corpus"):
        TokenRows(path, "uint16", sequence_length=5, lookahead=30, eos_id=EOS_ID)
    with pytest.raises(ValueError, match="sequence_length is 0"):
        TokenRows(path, "uint16", sequence_length=0, lookahead=1, eos_id=EOS_ID)
    with pytest.raises(ValueError, match="seed -1"):
        TokenRows(path, "uint16", 4, 0, EOS_ID, seed=-1)
    rows = TokenRows(path, "uint16", 4, 0, EOS_ID)
    for first, count in ((-1, 1), (0, 0), (0, 5)):
        with pytest.raises(ValueError, match="not within the 4 rows"):
            rows.sequential(first, count)
    with pytest.raises(ValueError, match="first is -1 and count 0"):
        rows.shuffled(-1, 0)
