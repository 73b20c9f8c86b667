"""Texts out of files, by what the files hold and what they are called.

A file is one text, or rows with a text each: JSON Lines, a JSON array, CSV or Parquet. Any of them may be compressed.
What cannot be read is an error that says where, or is skipped and counted.
"""

import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

_COMPRESSIONS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
"""Formats by the bytes that their files begin with."""
# Longer marks first: UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_UNREADABLE = (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error)
_EXAMPLES = 20
"""Reasons that are kept of what is skipped."""


@dataclass
class Skipped:
    """What could not be read: errors are counted and kept, or, if `strict`, raised."""

    strict: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first messages."""

    @contextmanager
    def noted(self, path: Path | str) -> Iterator[None]:
        """The block reads `path`, or a part of it; where it cannot, it ends."""
        try:
            yield
        except _UNREADABLE as error:
            message = str(error)
            if str(path) not in message:
                message = f"{path} cannot be read: {message}"
            if self.strict:
                raise ValueError(message) from error
            self.count += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(message)


def read_file(path: Path, column: str, skipped: Skipped) -> Iterator[tuple[int | None, str]]:
    """The texts of a file, each with the number of its row, or None where the whole file is one text.

    Rows are numbered as is usual for their format: lines of JSON from 1, other rows from 0.
    """
    with skipped.noted(path), _decompressed(path) as content:
        kind = _kind(path)
        if kind == ".parquet" or content.peek(4)[:4] == b"PAR1":
            yield from _read_parquet(content, path, column, skipped)
            return
        encoding = _skip_byte_order_mark(content)
        if kind in (".jsonl", ".ndjson"):
            yield from _read_lines(_lines(content, encoding), path, column, skipped)
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(content, encoding, path, column, skipped)
        else:
            data = content.read()
            rows = _json_rows(data, encoding, path, column) if kind == ".json" else None
            if rows is None:
                yield None, _text(data, encoding, path)
            else:
                yield from _texts_of(rows, path, column, skipped)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, compressed or not, each with the number of its line, from 1.

    Raises ValueError for a line that holds none, and OSError where the file cannot be read.
    """
    with _decompressed(path) as content:
        encoding = _skip_byte_order_mark(content)
        for number, line in enumerate(_lines(content, encoding), start=1):
            if line.strip():
                yield number, _parse_line(line, where=f"{path}:{number}")


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a row; null counts as empty, as data sets often have it. Raises ValueError where there is none."""
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; there are {', '.join(map(str, row))}: set text_column")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not text: set text_column")
    # JSON can escape half a surrogate pair, which no UTF-8 file can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: column {column!r} holds an unpaired surrogate, which is not Unicode text")
    return text


def optional_module(module: str, needed_for: str) -> Any:
    """Import a module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"reading {needed_for} needs the package {package}: pip install {package}") from error


# --- bytes


def _decompressed(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        head = file.read(6)
    found = next((suffix for magic, suffix in _COMPRESSIONS.items() if head.startswith(magic)), None)
    if found is None:
        return path.open("rb")
    if found == ".zst":
        return io.BufferedReader(optional_module("pyarrow", str(path)).CompressedInputStream(str(path), "zstd"))
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[found](path))


def _kind(path: Path) -> str:
    """The extension that says what a file holds, in lower case; that of a compression is passed over."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in (*_COMPRESSIONS.values(), ".zstd") else name.suffix


def _skip_byte_order_mark(content: io.BufferedReader) -> str:
    """The encoding that the text's first bytes mark, past which it is then read; UTF-8 without a mark."""
    head = content.peek(4)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            content.read(len(mark))
            return encoding
    return "utf-8"


def _text(data: bytes, encoding: str, path: Path) -> str:
    if encoding == "utf-8" and b"\0" in data[:8192]:  # as git recognises them
        raise ValueError(f"{path} is a binary file: it has NUL bytes")
    # Decoding bytes, unlike opening as text, leaves the line endings as they are.
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {encoding.upper()} text: byte {error.start} is 0x{data[error.start]:02x}; "
            "convert it to UTF-8 or leave it out"
        ) from error


# --- rows


def _texts_of(rows: list[dict[str, Any]], path: Path, column: str, skipped: Skipped) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(rows):
        with skipped.noted(path):
            yield number, text_of(row, column, f"{path}:{number}")


def _lines(content: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Lines in UTF-8; in another encoding a newline is not the byte of that value."""
    if encoding == "utf-8":
        return iter(content)
    return (line.encode() for line in io.TextIOWrapper(content, encoding, newline="\n"))


def _read_lines(lines: Iterator[bytes], path: Path, column: str, skipped: Skipped) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with skipped.noted(path):
                where = f"{path}:{number}"
                yield number, text_of(_parse_line(line, where), column, where)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; every line should be an object")
    return row


def _json_rows(data: bytes, encoding: str, path: Path, column: str) -> list[dict[str, Any]] | None:
    """The objects of a JSON file that is an array of them, a line each, or one with the column; else None: a text."""
    text = data.decode(encoding, errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("[") and text.lstrip()[1:].lstrip().startswith("{"):
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            return None
    if isinstance(found, dict):
        return [found] if column in found else None
    return found if isinstance(found, list) and all(isinstance(row, dict) for row in found) else None


def _read_csv(content: BinaryIO, encoding: str, path: Path, column: str, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """Rows below a header; of the separators in use it is the one with which the header has the column."""
    csv.field_size_limit(1 << 30)
    # Bytes that are no text become unpaired surrogates, so that they cost one row and not the rest of the file.
    lines = iter(io.TextIOWrapper(content, encoding, errors="surrogateescape", newline=""))
    first = next(lines, "")
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ",\t;|"}
    mark = max(headers, key=lambda mark: (column in headers[mark], len(headers[mark])))
    rows = csv.DictReader(chain([first], lines), delimiter=mark, strict=True)
    text_of(dict.fromkeys(rows.fieldnames or [], ""), column, str(path))  # raises for a file without the column
    for number in count():
        with skipped.noted(f"{path}:{number}"):
            row = next(rows, None)
            if row is None:
                return
            yield number, text_of(row, column, f"{path}:{number}")


def _read_parquet(content: BinaryIO, path: Path, column: str, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """One row group in memory at a time."""
    parquet = optional_module("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(content)
    except ValueError as error:  # pyarrow's own ArrowInvalid is one
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    text_of(dict.fromkeys(file.schema_arrow.names, ""), column, str(path))  # raises for a file without the column
    row = 0
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group, columns=[column]).column(0).to_pylist():
            with skipped.noted(path):
                yield row, text_of({column: text}, column, where=f"{path}:{row}")
            row += 1
