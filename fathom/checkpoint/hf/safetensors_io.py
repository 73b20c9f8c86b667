"""Safetensors files, read and written a few rows at a time.

The format is small (github.com/huggingface/safetensors, README): eight bytes with the length of a JSON header, the
header with each tensor's type, shape and offsets, then the data. The `safetensors` package validates a file and maps
it into memory; here rows are read directly, so that a model of any size can be converted in little memory.
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
from safetensors import SafetensorError, safe_open
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
_SPARE_BYTES = 64 * 2**20
"""Disk space beyond the tensors: headers, index, tokenizer."""


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
    bytes: int
    """Its size in the file."""

    def rows(self, first: int, last: int) -> Tensor:
        """Read rows `first` to `last` (not included): (rows, columns).

        A tensor of more than two dimensions is read as a matrix of its last one, a vector as a matrix of one column.
        The type must be one of `DTYPES`. Raises CheckpointError where the file cannot be read.
        """
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        out = torch.empty(last - first, columns, dtype=DTYPES[self.dtype])
        try:
            with open(self.file, "rb") as file:
                file.seek(self.begin + first * columns * out.element_size())
                missing = out.nbytes - file.readinto(_byte_view(out))
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {error}") from error
        if missing:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} cannot be read: the file ends {missing} bytes too early"
            )
        return out


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, each checked to lie completely within the file.

    Raises CheckpointError for a file that is not a complete safetensors file.
    """
    try:
        with safe_open(path, "pt"), open(path, "rb") as file:  # safe_open validates the header
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


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


def check_disk_space(target: Path, needed: int) -> None:
    """Raise ValueError where the disk that `target` will be on has less than `needed` bytes and some to spare."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise ValueError(
            f"{target} needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB of disk, and {existing} has {free / 1e9:.2f} GB "
            "free"
        )
