"""Where the text comes from, and which part of it is never trained on.

A corpus is a stream of `Document`s in a fixed order: the standard library of the running Python (always at
hand, so a first run needs no download), files (`readers.py`) or a streamed Hugging Face data set.
What is held out is decided by hashing each document's *group*, so the split does not move when documents are
added or the order changes, and files that quote one another (those of one package) stay on one side of it.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.data.readers import Skipped, optional_module, read_file, text_of

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
    """`python-stdlib`, a file, a directory or a glob (quote it) of text, JSON Lines, JSON arrays, CSV or Parquet, each
    plain or as gz, bz2, xz or zst; or `hf:NAME`, `hf:OWNER/NAME`, `hf:OWNER/NAME/CONFIG`, each with an optional
    `:SPLIT` (default train)."""
    text_column: str = "text"
    """Field of JSON, CSV, Parquet and Hugging Face rows that holds the text."""
    strict: bool = False
    """Refuse a corpus of which something cannot be read; otherwise that is skipped, counted and listed."""
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
    skipped: int
    """How many files, or rows of files, cannot be read."""
    skipped_examples: tuple[str, ...]
    """Of the first of them, why."""
    by_document: bool
    """Whether whole documents are held out; otherwise the end of every document is (see `split_corpus`)."""


def read_corpus(config: DataConfig, skipped: Skipped | None = None) -> Iterator[Document]:
    """All documents in a fixed order; empty ones are left out, and in `skipped` stands what cannot be read.

    Raises ValueError for it instead where `skipped` is None or strict, and where the corpus is not there at all.
    """
    skipped = skipped or Skipped(strict=True)
    if config.corpus == STDLIB:
        documents = _read_stdlib()
    elif config.corpus.startswith(HUGGING_FACE):
        documents = _read_hugging_face(config.corpus, config.text_column, skipped)
    else:
        documents = _read_paths(config.corpus, config.text_column, skipped)
    return (document for document in documents if document.text)


def is_heldout(group: str, fraction: float) -> bool:
    """True for about `fraction` of all groups, always the same; a larger fraction includes a smaller one."""
    digest = hashlib.sha256(f"{HELDOUT_SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def scan_corpus(config: DataConfig) -> CorpusStats:
    """Read the whole corpus once, for its hash, its size and how it can be split."""
    digest = hashlib.sha256()
    documents = heldout = text_bytes = 0
    skipped = Skipped(config.strict)
    for document in read_corpus(config, skipped):
        name, text = document.name.encode(), document.text.encode()
        # Lengths first: otherwise ("ab", "c") and ("a", "bc") would hash alike.
        digest.update(f"{len(name)} {len(text)} ".encode() + name + text)
        documents += 1
        heldout += is_heldout(document.group, config.heldout)
        text_bytes += len(text)
    if documents == 0:
        why = "no documents, or only empty ones"
        if skipped.count:
            why = "; ".join([f"{skipped.count} of its texts cannot be read", *skipped.examples[:3]])
        raise ValueError(f"corpus {config.corpus!r} holds no text: {why}")
    return CorpusStats(
        sha256=digest.hexdigest(),
        text_bytes=text_bytes,
        skipped=skipped.count,
        skipped_examples=tuple(skipped.examples),
        by_document=0 < heldout < documents,
    )


def split_corpus(config: DataConfig, stats: CorpusStats) -> Iterator[tuple[Document, bool]]:
    """Documents, each with whether it is held out.

    In a corpus of few documents none, or all, may be chosen. Then the end of every document is held out instead: the
    last `heldout` of its text becomes a document of its own.
    """
    for document in read_corpus(config, Skipped(config.strict)):
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
        text = (stdlib_root() / name).read_bytes().decode()
        yield Document(name, text, group=name.split("/")[0].removesuffix(".py"))


# --- files


def _read_paths(corpus: str, column: str, skipped: Skipped) -> Iterator[Document]:
    base, paths = _find_files(corpus)
    for path in paths:
        name = path.relative_to(base).as_posix()
        for row, text in read_file(path, column, skipped):
            own = name if row is None else f"{name}:{row}"
            yield Document(own, text, group=own)


def _find_files(corpus: str) -> tuple[Path, list[Path]]:
    """The files that a corpus names, without hidden ones, sorted; and the directory their names are relative to."""
    path = Path(corpus).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        found = [f for f in path.rglob("*") if f.is_file()]
        files = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
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


# --- Hugging Face data sets


def _read_hugging_face(corpus: str, column: str, skipped: Skipped) -> Iterator[Document]:
    datasets = optional_module("datasets", corpus)
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
        with skipped.noted(where):
            yield Document(where, text_of(row, column, where), group=where)


def _parse_hugging_face(corpus: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hf:OWNER/NAME/CONFIG:SPLIT`."""
    path, _, split = corpus.removeprefix(HUGGING_FACE).partition(":")
    parts = path.split("/", 2)
    if not all(parts):
        raise ValueError(f"corpus {corpus!r} should read {HUGGING_FACE}NAME, {HUGGING_FACE}OWNER/NAME[/CONFIG][:SPLIT]")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"
