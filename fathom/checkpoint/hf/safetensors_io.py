"""Safetensors files, read and written a few rows at a time.

The format is small (github.com/huggingface/safetensors, README): eight bytes with the length of a JSON header, the
header with each tensor's type, shape and place, then the numbers. The `safetensors` package maps whole files into
memory; here rows are read where they lie, so that a model of any size passes through a little memory. Nothing of a
file is believed before it is checked, and nothing in it is executed.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The types that weights come in, under the names in the header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2}
_BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_SPARE = 64 * 2**20
"""Bytes of disk beyond the tensors: headers, index, tokenizer."""
_LONGEST_HEADER = 100_000_000  # the `safetensors` package reads no longer one


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the tensor."""


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: str
    """As the header says it; weights are of the types in `DTYPES`."""
    shape: tuple[int, ...]
    begin: int
    """The first byte's place in the file."""

    @property
    def bytes(self) -> int:
        """How many bytes its numbers take."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included) of the tensor as a matrix of its last dimension: (rows, columns).

        A vector is a matrix of one column. The type must be one of `DTYPES`. Raises CheckpointError where the file
        cannot be read.
        """
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        out = torch.empty(last - first, columns, dtype=DTYPES[self.dtype])
        width = columns * _BYTES[self.dtype]
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin + first * width)
                _fill(file, _bytes_of(out))
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {error}") from error
        return out


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, every one checked to lie whole within the file.

    Raises CheckpointError for a file that is no complete safetensors file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} is not a complete safetensors file: it has {size} bytes, and its header claims {length} "
                    f"(at most {_LONGEST_HEADER})"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One tensor of the header; `data` is where the numbers begin."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has no dtype, shape and data_offsets: {entry!r:.80}") from error
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype!r:.80}; known are {', '.join(_BYTES)}")
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape!r:.80} and data_offsets {[begin, end]!r:.80}; both must be lists "
            "of whole numbers from 0"
        )
    stored = StoredTensor(name, path, dtype, tuple(shape), data + begin)
    if end - begin != stored.bytes:
        raise CheckpointError(
            f"{path}: tensor {name} has {end - begin} bytes, {dtype} of shape {stored.shape} needs {stored.bytes}"
        )
    return stored


def _check_cover(path: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Tensors must lie one behind the other to the file's end: else the file is cut, or two share their bytes."""
    at = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.bytes)):
        if tensor.begin != at:
            raise CheckpointError(f"{path}: tensor {tensor.name} begins at byte {tensor.begin}, not behind byte {at}")
        at += tensor.bytes
        if at > size:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: tensor {tensor.name} ends at byte {at} of {size}"
            )
    if at != size:
        raise CheckpointError(f"{path} is not a complete safetensors file: tensors end at byte {at} of {size}")


# -------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """A new safetensors file whose tensors are filled in any order, from several threads if need be."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        """Makes the file with its header; the numbers are zero until `write` brings them."""
        # Wide types first: then every tensor begins at a multiple of its type's size, which some readers need.
        ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dtype, shape in ordered:
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._begins = {name: data + header[name]["data_offsets"][0] for name, _, _ in ordered}
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        self._file.truncate(data + at)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put (rows, columns) of the tensor `name` in their place, `first` being the first one's number."""
        width = rows[:1].numel() * rows.element_size()
        self._put(_bytes_of(rows.contiguous()), self._begins[name] + first * width)

    def _put(self, data: bytes | memoryview, at: int) -> None:
        rest = memoryview(data)
        while len(rest):
            done = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[done:], at + done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            if error[0] is None:
                os.fsync(self._file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    flat: NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return flat.data


def _fill(file: Any, into: memoryview) -> None:
    while len(into):
        done = file.readinto(into)
        if not done:
            raise EOFError(f"the file ends {len(into)} bytes too early")
        into = into[done:]


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk(target: Path, needed: int) -> None:
    """Raise ValueError where the disk that `target` will be on has less than `needed` bytes and some to spare."""
    there = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise ValueError(
            f"{target} needs {(needed + _SPARE) / 1e9:.2f} GB of disk, and {there} has {free / 1e9:.2f} GB free"
        )
