"""Where the text comes from, and which part of it is never trained on.

A corpus is a stream of `Document`s in a fixed order: the standard library of the running Python (always at
hand, so a first run needs no download), text files, JSON Lines, Parquet or a streamed Hugging Face data set.
What is held out is decided by hashing each document's *group*, so the split does not move when documents are
added or the order changes, and files that quote one another (those of one package) stay on one side of it.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STDLIB = "python-stdlib"
HUGGING_FACE = "hf:"

# Left out: tests, installed packages, build products and generated tables.
STDLIB_SKIPPED_PARTS = frozenset(
    [
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"),
        *("encodings", "pydoc_data", "lib2to3"),
    ]
)
STDLIB_SKIPPED_PREFIXES = ("test_", "config-", "_sysconfigdata")
STDLIB_SKIPPED_FILES = frozenset(["html/entities.py", "stringprep.py", "sitecustomize.py", "usercustomize.py"])

# Packages are few and uneven (asyncio weighs as much as fifty small modules), so most salts hold out far more
# or far less than the requested fraction. This one, chosen by sizes alone, holds out 4.9 to 5.5 % of the bytes
# of Python 3.11 to 3.13 at the default fraction: json, argparse, ctypes, concurrent, smtplib and others.
HELDOUT_SALT = "fathom-3654"


@dataclass(frozen=True)
class DataConfig:
    """What to train on. Two equal configs over an unchanged corpus give byte-identical token files."""

    corpus: str = STDLIB
    """`python-stdlib`, a text file, a directory, a glob (quote it), *.jsonl, *.jsonl.gz, *.parquet, or
    `hf:NAME`, `hf:OWNER/NAME`, `hf:OWNER/NAME/CONFIG`, each with an optional `:SPLIT` (default train)."""
    text_column: str = "text"
    """Field of JSON Lines, Parquet and Hugging Face rows that holds the text."""
    heldout: float = 0.05
    """Fraction of the corpus held out for evaluation, between 0 and 1."""
    fim_rate: float = 0.0
    """Fraction of training documents rearranged to fill-in-the-middle; DeepSeek-V3 used 0.1."""
    tokenizer: str | None = None
    """Directory of an existing tokenizer to use; None: train one on the training documents."""

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError(f"corpus is empty; name a file, a directory, a glob, {HUGGING_FACE}NAME or {STDLIB}")
        if not self.text_column:
            raise ValueError("text_column is empty; name the column that holds the text, such as 'text'")
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout is {self.heldout}; it must lie strictly between 0 and 1, such as 0.05")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate is {self.fim_rate}; it must lie between 0 and 1, such as 0.1")


@dataclass(frozen=True)
class Document:
    """One text; in the token stream it stands between BOS and EOS."""

    name: str
    """Path relative to the corpus, followed by `:row` where a file holds many."""
    text: str
    """Never empty."""
    group: str
    """What is held out together: a top-level module of the standard library, elsewhere the name."""


@dataclass(frozen=True)
class CorpusStats:
    """What one pass over the whole corpus finds."""

    sha256: str
    """Over all names and texts, in order."""
    text_bytes: int
    """UTF-8 bytes."""
    by_document: bool
    """Whether whole documents are held out; otherwise the end of every document is (see `split_corpus`)."""


def read_corpus(config: DataConfig) -> Iterator[Document]:
    """All documents in a fixed order; empty ones are left out."""
    if config.corpus == STDLIB:
        documents = _read_stdlib()
    elif config.corpus.startswith(HUGGING_FACE):
        documents = _read_hugging_face(config.corpus, config.text_column)
    else:
        documents = _read_paths(config.corpus, config.text_column)
    return (document for document in documents if document.text)


def is_heldout(group: str, fraction: float) -> bool:
    """True for about `fraction` of all groups, always the same; a larger fraction includes a smaller one."""
    digest = hashlib.sha256(f"{HELDOUT_SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def scan_corpus(config: DataConfig) -> CorpusStats:
    """Read the whole corpus once, for its hash, its size and how it can be split."""
    digest = hashlib.sha256()
    documents = heldout = text_bytes = 0
    for document in read_corpus(config):
        name, text = document.name.encode(), document.text.encode()
        # Lengths first: otherwise ("ab", "c") and ("a", "bc") would hash alike.
        digest.update(f"{len(name)} {len(text)} ".encode() + name + text)
        documents += 1
        heldout += is_heldout(document.group, config.heldout)
        text_bytes += len(text)
    if documents == 0:
        raise ValueError(f"corpus {config.corpus!r} holds no text: no documents, or only empty ones")
    return CorpusStats(digest.hexdigest(), text_bytes, by_document=0 < heldout < documents)


def split_corpus(config: DataConfig, stats: CorpusStats) -> Iterator[tuple[Document, bool]]:
    """Documents, each with whether it is held out.

    In a corpus of few documents none, or all, may be chosen. Then the end of every document is held out instead: the
    last `heldout` of its text becomes a document of its own.
    """
    for document in read_corpus(config):
        if stats.by_document:
            yield document, is_heldout(document.group, config.heldout)
            continue
        cut = tail_start(document.text, config.heldout)
        for text, heldout in ((document.text[:cut], False), (document.text[cut:], True)):
            if text:
                yield Document(document.name, text, document.group), heldout


def tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: after a newline, if one is near enough to keep half of it."""
    at = min(max(int(len(text) * (1 - fraction)), 1), len(text))
    reach = (len(text) - at) // 2
    before = text.rfind("\n", max(at - reach, 0), at) + 1
    after = text.find("\n", at, at + reach) + 1
    candidates = [cut for cut in (before, after) if cut]
    return min(candidates, key=lambda cut: abs(cut - at), default=at)


# --- the running interpreter's standard library


def stdlib_files() -> list[str]:
    """The library's source files to train on, as sorted POSIX paths relative to it."""
    root = stdlib_root()
    return sorted(name for path in root.rglob("*.py") if _is_included(name := path.relative_to(root).as_posix()))


def stdlib_root() -> Path:
    # Inside a virtual environment this is still the base installation.
    return Path(sysconfig.get_paths()["stdlib"])


def _is_included(name: str) -> bool:
    parts = name.split("/")
    skipped = any(part in STDLIB_SKIPPED_PARTS or part.startswith(STDLIB_SKIPPED_PREFIXES) for part in parts)
    return not skipped and name not in STDLIB_SKIPPED_FILES


def _read_stdlib() -> Iterator[Document]:
    names = stdlib_files()
    if not names:
        raise FileNotFoundError(
            f"{stdlib_root()} holds no .py files: this Python ships its standard library without source; "
            "set data.corpus to a text corpus of your own"
        )
    for name in names:
        yield Document(name, _read_text(stdlib_root() / name), group=name.split("/")[0].removesuffix(".py"))


# --- files


def _read_paths(corpus: str, column: str) -> Iterator[Document]:
    base, paths = _find_files(corpus)
    for path in paths:
        name = path.relative_to(base).as_posix()
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            rows = _read_jsonl(path, column)
        elif path.suffix == ".parquet":
            rows = _read_parquet(path, column)
        else:
            yield Document(name, _read_text(path), group=name)
            continue
        for row, text in rows:
            yield Document(f"{name}:{row}", text, group=f"{name}:{row}")


def _find_files(corpus: str) -> tuple[Path, list[Path]]:
    """The files a corpus names, sorted, and the directory their names are relative to.

    In a directory hidden files and binary ones (a NUL byte among the first 8192, as git has it) are left out.
    """
    path = Path(corpus).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(path))]
        files = [f for f in files if f.name.endswith((".gz", ".parquet")) or not _is_binary(f)]
        base = path
    else:
        files = [f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file()]
        fixed = [not glob.has_magic(part) for part in path.parts]
        base = Path(*path.parts[: fixed.index(False)]) if not all(fixed) else path.parent
    if not files:
        raise FileNotFoundError(
            f"corpus {corpus!r} matches no files; it should be a file, a directory of text files, a glob, "
            f"{HUGGING_FACE}NAME or {STDLIB}"
        )
    return base, sorted(files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _read_text(path: Path) -> str:
    # Decoding bytes, unlike opening as text, leaves the line endings as they are.
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert it to UTF-8 or leave it out"
        ) from error


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every line that is not blank."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line, column, where=f"{path}:{number}")


def _parse_line(line: bytes, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; every line should be an object with {column!r}")
    return _text_of(row, column, where)


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a row; null counts as empty, as data sets often have it."""
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; there are {', '.join(row)}: set text_column")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not text: set text_column")
    # JSON can escape half a surrogate pair, which no UTF-8 file can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: column {column!r} holds an unpaired surrogate, which is not Unicode text")
    return text


def _read_parquet(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Row number, from 0, and text; one row group in memory at a time."""
    parquet = _optional_module("pyarrow.parquet", package="pyarrow", needed_for=str(path))
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own ArrowInvalid is one
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    columns = file.schema_arrow.names
    if column not in columns:
        raise ValueError(f"{path}: no column {column!r}; there are {', '.join(columns)}: set text_column")
    row = 0
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group, columns=[column]).column(0).to_pylist():
            yield row, _text_of({column: text}, column, where=f"{path}:{row}")
            row += 1


# --- Hugging Face data sets


def _read_hugging_face(corpus: str, column: str) -> Iterator[Document]:
    datasets = _optional_module("datasets", package="datasets", needed_for=corpus)
    name, config, split = _parse_hugging_face(corpus)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # its errors, and those of its HTTP client, share no base class
        raise ValueError(
            f"cannot open data set {name!r} (configuration {config or 'default'}, split {split!r}): "
            f"{error}; check the name and the network"
        ) from error
    for number, row in enumerate(rows):
        where = f"{corpus}:{number}"
        yield Document(where, _text_of(row, column, where), group=where)


def _parse_hugging_face(corpus: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf:OWNER/NAME/CONFIG:SPLIT`."""
    path, _, split = corpus.removeprefix(HUGGING_FACE).partition(":")
    parts = path.split("/", 2)
    if not all(parts):
        raise ValueError(f"corpus {corpus!r} should read {HUGGING_FACE}NAME, {HUGGING_FACE}OWNER/NAME[/CONFIG][:SPLIT]")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _optional_module(module: str, package: str, needed_for: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading {needed_for} needs the package {package}: pip install {package}") from error
