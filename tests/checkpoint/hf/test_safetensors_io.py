"""Safetensors files against the `safetensors` package: ours read there, theirs read here, damage refused by name."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.checkpoint.hf.model import CheckpointError, load_model, save_model
from fathom.checkpoint.hf.safetensors_io import DTYPES, ShardWriter, read_header
from fathom.checkpoint.info import model_info
from tests.model.configs import lively_model, tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        found[name] = torch.randn(shape, generator=generator).to(dtype)
    found.pop("__metadata__", None)
    return found


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor[:, None]


@settings(max_examples=40, deadline=None)
@given(tensors(), st.data())
def test_files_mean_the_same_there_and_here(given_tensors: dict[str, Tensor], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        with ShardWriter(ours, [(name, t.dtype, tuple(t.shape)) for name, t in given_tensors.items()]) as writer:
            for name, tensor in given_tensors.items():
                cut = data.draw(st.integers(0, tensor.shape[0]))
                writer.write(name, cut, as_matrix(tensor)[cut:])
                writer.write(name, 0, as_matrix(tensor)[:cut])
        read_there = load_file(ours)
        save_file(given_tensors, theirs)
        read_here = read_header(theirs)
        assert read_there.keys() == read_here.keys() == given_tensors.keys()
        for name, tensor in given_tensors.items():
            stored = read_here[name]
            assert stored.shape == tuple(tensor.shape) and read_there[name].dtype == tensor.dtype
            assert torch.equal(read_there[name].double(), tensor.double())
            rows = tensor.shape[0]
            first = data.draw(st.integers(0, rows))
            last = data.draw(st.integers(first, rows))
            assert torch.equal(stored.rows(first, last).double(), as_matrix(tensor)[first:last].double())


GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def file_of(path: Path, header: Any, data: bytes = b"\0" * 24, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**GOOD["a"], "shape": [2, 4]}},
        {"a": {**GOOD["a"], "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}},
        {"a": {**GOOD["a"], "data_offsets": [24, 0]}},
        {"a": {**GOOD["a"], "data_offsets": [-24, 0]}},
        {"a": {**GOOD["a"], "data_offsets": [0, 24.0]}},
        {"a": {**GOOD["a"], "shape": [True, 6]}},
        {"a": {**GOOD["a"], "shape": [10**4000, 10**4000]}},
        {"a": {**GOOD["a"], "shape": "23"}},
        {"a": {**GOOD["a"], "dtype": "F31"}},
        {"a": {**GOOD["a"], "dtype": ["F32"]}},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {**GOOD, "b": GOOD["a"]},
        {"a": {**GOOD["a"], "shape": [5], "data_offsets": [4, 24]}},
        {"a": {**GOOD["a"], "shape": [5], "data_offsets": [0, 20]}},
        [1],
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_header_that_lies_is_refused_by_its_file(tmp_path: Path, header: Any) -> None:
    file = file_of(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a complete safetensors file: .+"):
        read_header(file)


@pytest.mark.parametrize("length", [3 * 10**12, 2**64 - 1, 101_000_000, 500])
def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path: Path, length: int) -> None:
    file = file_of(tmp_path / "x.safetensors", GOOD, length=length)
    if length < 10**9:
        os.truncate(file, length)  # and a file large enough for some of the claims
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(file)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sharded model."""
    directory = tmp_path_factory.mktemp("good") / "model"
    save_model(lively_model(tiny(num_nextn_predict_layers=1)), directory, max_shard_size=40_000)
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("change", [{"dtype": "I32"}, {"dtype": "U32"}])
def test_a_weight_of_a_type_that_is_none_is_named(tmp_path: Path, change: dict[str, str]) -> None:
    save_model(lively_model(tiny()), tmp_path / "model")
    file = tmp_path / "model" / SINGLE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NORM] |= change
    file_of(file, header, content[8 + length :])
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "model")
    for word in (SINGLE, NORM, change["dtype"], "BF16"):
        assert word in str(error.value)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_is_damaged_loading_answers_with_one_clear_error(
    model_bytes: dict[str, bytes], data: st.DataObject
) -> None:
    """Any bytes anywhere in any file: the model loads, or a CheckpointError says why, and nothing else happens."""
    name = data.draw(st.sampled_from(sorted(model_bytes)))
    content = bytearray(model_bytes[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(content), 3000)))
        end = at + data.draw(st.integers(0, 6))
        content[at:end] = data.draw(st.binary(max_size=6) | st.sampled_from([b"..", b"/", b"-1", b"9" * 20, b"null"]))
    with tempfile.TemporaryDirectory() as folder:
        for other, untouched in model_bytes.items():
            Path(folder, other).write_bytes(untouched)
        Path(folder, name).write_bytes(content)
        for read in (load_model, model_info):
            try:
                read(Path(folder))
            except CheckpointError as error:
                assert folder in str(error) or "tensor" in str(error)


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_model(lively_model(tiny()), tmp_path / "model")
    stored = read_header(tmp_path / "model" / SINGLE)
    last = max(stored.values(), key=lambda tensor: tensor.begin)
    os.truncate(last.file, last.begin + 1)
    with pytest.raises(CheckpointError, match=rf"tensor {last.name} cannot be read: the file ends .* too early"):
        last.rows(0, last.shape[0])


def test_every_tensor_begins_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    """Some readers lay an array over the file where it lies."""
    model = lively_model(tiny(hidden_size=25), dtype=torch.bfloat16)
    save_model(model, tmp_path / "model", storage="fp8")
    found = read_header(tmp_path / "model" / SINGLE)
    assert {tensor.dtype for tensor in found.values()} == {"F32", "BF16", "F8_E4M3"}
    for tensor in found.values():
        assert tensor.begin % DTYPES[tensor.dtype].itemsize == 0, tensor.name
