"""Safetensors files, read and written a few rows at a time.

The format is small (github.com/huggingface/safetensors, README): eight bytes with the length of a JSON header, the
header with each tensor's type, shape and offsets, then the data. The `safetensors` package maps whole files into
memory; here rows are read from the file directly, so that a model of any size can be converted in little memory.
Everything in a file is validated before it is used, and nothing in it is executed.
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
"""The types that weights may have, by their names in the header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_SPARE_BYTES = 64 * 2**20
"""Disk space beyond the tensors: headers, index, tokenizer."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the `safetensors` package


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the tensor."""


class StoredTensor(NamedTuple):
    """A tensor in a file, by the file's header."""

    name: str
    file: Path
    dtype: str
    """The header's name for the type; weights have one of `DTYPES`."""
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def rows(self, first: int, last: int) -> Tensor:
        """Read rows `first` to `last` (not included): (rows, columns).

        A tensor of more than two dimensions is read as a matrix of its last one, a vector as a matrix of one column.
        The type must be one of `DTYPES`. Raises CheckpointError where the file cannot be read.
        """
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        out = torch.empty(last - first, columns, dtype=DTYPES[self.dtype])
        row_bytes = columns * _ITEM_BYTES[self.dtype]
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin + first * row_bytes)
                _read_into(_byte_view(out), file)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {error}") from error
        return out


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, each checked to lie completely within the file.

    Raises CheckpointError for a file that is not a complete safetensors file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is not a complete safetensors file: it has {size} bytes, and its header claims {length} "
                    f"(at most {_MAX_HEADER_BYTES})"
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
    tensors = {name: _parse_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_contiguous(path, tensors, 8 + length, size)
    return tensors


def _parse_tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One tensor of the header; `data` is the offset of the file's data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has no dtype, shape and data_offsets: {entry!r:.80}") from error
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype!r:.80}; it must be {', '.join(_ITEM_BYTES)}")
    integers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in integers):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape!r:.80} and data_offsets {[begin, end]!r:.80}; both must be lists "
            "of non-negative integers"
        )
    stored = StoredTensor(name, path, dtype, tuple(shape), data + begin)
    if end - begin != stored.bytes:
        raise CheckpointError(
            f"{path}: tensor {name} has {end - begin} bytes, {dtype} of shape {stored.shape} needs {stored.bytes}"
        )
    return stored


def _check_contiguous(path: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Tensors must follow one another up to the file's end; otherwise the file is truncated, or two overlap."""
    offset = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.bytes)):
        if tensor.begin != offset:
            raise CheckpointError(f"{path}: tensor {tensor.name} begins at byte {tensor.begin}, not at byte {offset}")
        offset += tensor.bytes
        if offset > size:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: tensor {tensor.name} ends at byte {offset} of {size}"
            )
    if offset != size:
        raise CheckpointError(f"{path} is not a complete safetensors file: tensors end at byte {offset} of {size}")


# -------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """A new safetensors file whose tensors are written in any order, possibly from several threads."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        """Create the file with its header; the data is zero until `write` is called."""
        # Wide types first, so that every tensor begins at a multiple of its item size, which some readers require.
        ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, dtype, shape in ordered:
            end = begin + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        self._begins = {name: data + header[name]["data_offsets"][0] for name, _, _ in ordered}
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._write_at(0, len(text).to_bytes(8, "little") + text)
        self._file.truncate(data + begin)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Write (rows, columns) of the tensor `name` from row `first` on."""
        row_bytes = rows[:1].numel() * rows.element_size()
        self._write_at(self._begins[name] + first * row_bytes, _byte_view(rows.contiguous()))

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            if error[0] is None:
                os.fsync(self._file.fileno())


def _byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    flat: NDArray[np.uint8] = tensor.detach().flatten().view(torch.uint8).numpy()
    return flat.data


def _read_into(buffer: memoryview, file: Any) -> None:
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise EOFError(f"the file ends {len(buffer)} bytes too early")
        buffer = buffer[count:]


def check_disk_space(target: Path, needed: int) -> None:
    """Raise ValueError where the disk that `target` will be on has less than `needed` bytes and some to spare."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise ValueError(
            f"{target} needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB of disk, and {existing} has {free / 1e9:.2f} GB "
            "free"
        )
