"""A corpus, tokenised once and laid out on disk for training.

`tokenize_corpus` writes into one directory: the tokenizer, `train.bin` and `valid.bin` (token ids, little-endian,
nothing else; every document is BOS, text, EOS), `valid.txt` (the held-out text, for comparison with gzip and
the like) and `meta.json`. The directory appears complete or not at all. A fraction of the training documents can be
rearranged to fill-in-the-middle (DeepSeek-V3 report, section 3.1): prefix, suffix, middle, each behind its control
token.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from fathom.config import ConfigError, check, load_json, save_json
from fathom.data.corpus import HUGGING_FACE, CorpusStats, DataConfig, scan_corpus, split_corpus
from fathom.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, split_chunks, train_tokenizer
from fathom.files import atomic_directory, remove_leftovers

FORMAT_VERSION = 1
FILES = frozenset(["tokenizer.json", "tokenizer_config.json", "train.bin", "valid.bin", "valid.txt", "meta.json"])

# Merges converge long before this, and training keeps every distinct word in memory.
TOKENIZER_SAMPLE_BYTES = 200_000_000
# Encoded at a time: enough to occupy all cores, little enough for memory.
CHARACTERS_PER_WRITE = 4_000_000
# meta.json names the held-out documents, of millions only the first.
MAX_HELDOUT_NAMES = 10_000

Progress = Callable[[str, float], None]
Segment = int | str
"""A control token's id, or text still to be encoded."""


@dataclass(frozen=True, kw_only=True)
class CorpusMeta:
    """What meta.json holds of a tokenised corpus."""

    format_version: int = FORMAT_VERSION
    config: DataConfig
    seed: int
    requested_vocab_size: int
    """The argument of `tokenize_corpus`; the tokenizer's own `vocab_size` may be smaller."""
    corpus_hash: str
    vocab_size: int
    """The tokenizer's; this and the next two are for readers in other languages."""
    bos_id: int
    eos_id: int
    token_dtype: Literal["uint16", "uint32"]
    train_tokens: int
    train_documents: int
    train_bytes: int
    """UTF-8 bytes of text."""
    valid_tokens: int
    valid_documents: int
    valid_bytes: int
    heldout_documents: tuple[str, ...]
    """Names of the held-out documents, the first 10 000."""
    skipped: int = 0
    """How many files, or rows of files, cannot be read."""
    skipped_examples: tuple[str, ...] = ()
    """Of the first of them, why."""

    def __post_init__(self) -> None:
        check(self.format_version == FORMAT_VERSION, "format_version", self.format_version, str(FORMAT_VERSION))


@dataclass(frozen=True, kw_only=True)
class TokenizedCorpus(CorpusMeta):
    """A tokenised corpus on disk."""

    directory: Path
    tokenizer: Tokenizer

    @property
    def train_path(self) -> Path:
        return self.directory / "train.bin"

    @property
    def valid_path(self) -> Path:
        return self.directory / "valid.bin"

    @property
    def valid_text_path(self) -> Path:
        return self.directory / "valid.txt"


def tokenize_corpus(
    config: DataConfig, vocab_size: int, directory: Path, seed: int = 0, progress: Progress | None = None
) -> TokenizedCorpus:
    """Tokenise the corpus into `directory`, or open what an equal call left there.

    One process at a time may write a directory; what it holds is used again if the corpus is unchanged. The corpus is
    read once to scan it and once to write it, never held in memory; `progress` is called with the name of each stage
    and how much of it is done, from 0 to 1.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    report = progress or (lambda stage, done: None)
    previous = _open_if_equal(config, vocab_size, directory, seed)
    if previous and config.corpus.startswith(HUGGING_FACE):
        return previous  # going by its name: reading it again would mean downloading it again
    report("reading the corpus", 0.0)
    stats = scan_corpus(config)
    report("reading the corpus", 1.0)
    if previous and previous.corpus_hash == stats.sha256:
        return previous
    _refuse_foreign_files(directory)
    remove_leftovers(directory.parent, glob.escape(directory.name))
    with atomic_directory(directory) as staging:
        tokenizer = _make_tokenizer(config, vocab_size, stats, report)
        save_tokenizer(tokenizer, staging)
        meta = CorpusMeta(
            config=config,
            seed=seed,
            requested_vocab_size=vocab_size,
            corpus_hash=stats.sha256,
            skipped=stats.skipped,
            skipped_examples=stats.skipped_examples,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            **_write_splits(config, stats, tokenizer, seed, staging, report),
        )
        save_json(meta, staging / "meta.json")
    return open_tokenized(directory)


def open_tokenized(directory: Path) -> TokenizedCorpus:
    """Open a directory of `tokenize_corpus` after checking that it is complete."""
    path = directory / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no tokenised corpus: meta.json is missing; tokenise it first")
    try:
        meta = load_json(CorpusMeta, path)
    except ConfigError as error:
        raise ValueError(f"{error}; delete {directory} and tokenise the corpus again") from error
    corpus = TokenizedCorpus(**vars(meta), directory=directory, tokenizer=load_tokenizer(directory))
    _check_sizes(corpus)
    return corpus


def _check_sizes(corpus: TokenizedCorpus) -> None:
    width = np.dtype(corpus.token_dtype).itemsize
    expected = {
        corpus.train_path: corpus.train_tokens * width,
        corpus.valid_path: corpus.valid_tokens * width,
        corpus.valid_text_path: corpus.valid_bytes,
    }
    for path, size in expected.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; tokenise the corpus again")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not the {size} of meta.json; tokenise it again")


def _open_if_equal(config: DataConfig, vocab_size: int, directory: Path, seed: int) -> TokenizedCorpus | None:
    """The corpus in `directory`, if it is complete and comes from the same arguments."""
    try:
        corpus = open_tokenized(directory)
    except (ValueError, FileNotFoundError):
        return None
    same = (corpus.config, corpus.requested_vocab_size, corpus.seed) == (config, vocab_size, seed)
    if same and config.tokenizer is not None:
        same = load_tokenizer(Path(config.tokenizer)).tokenizer_json == corpus.tokenizer.tokenizer_json
    return corpus if same else None


# --- the directory


def _refuse_foreign_files(directory: Path) -> None:
    """Tokenising replaces the directory, so nothing but our own files may be in it."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    foreign = sorted(name for name in names if name not in FILES)
    if foreign:
        raise ValueError(
            f"{directory} is to hold a tokenised corpus, which replaces what is there, but holds other files: "
            f"{', '.join(foreign[:3])}; name a new or empty directory"
        )


# --- the tokens


def _make_tokenizer(config: DataConfig, vocab_size: int, stats: CorpusStats, report: Progress) -> Tokenizer:
    if config.tokenizer is None:
        report("training the tokenizer", 0.0)
        tokenizer = train_tokenizer(_training_sample(config, stats), vocab_size)
        report("training the tokenizer", 1.0)
    else:
        tokenizer = load_tokenizer(Path(config.tokenizer))
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the tokenizer in {config.tokenizer} has {tokenizer.vocab_size} tokens"
            )
    if config.fim_rate > 0 and None in (
        tokenizer.fim_prefix_id,
        tokenizer.fim_suffix_id,
        tokenizer.fim_middle_id,
    ):
        raise ValueError(
            f"fim_rate is {config.fim_rate}, but the tokenizer in {config.tokenizer} "
            "lacks fill-in-the-middle tokens; set fim_rate to 0"
        )
    return tokenizer


def _training_sample(config: DataConfig, stats: CorpusStats) -> Iterator[str]:
    """Training documents from the start of the corpus, `TOKENIZER_SAMPLE_BYTES` of them."""
    taken = 0
    for document, heldout in split_corpus(config, stats):
        if taken >= TOKENIZER_SAMPLE_BYTES:
            return
        if not heldout:
            taken += len(document.text.encode())
            yield from split_chunks(document.text)


def _write_splits(
    config: DataConfig, stats: CorpusStats, tokenizer: Tokenizer, seed: int, directory: Path, report: Progress
) -> dict[str, Any]:
    """Write both splits and the held-out text; returns their part of meta.json."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    names: list[str] = []
    read_bytes = 0
    with (
        _SplitWriter(directory / "train.bin", tokenizer, dtype) as train,
        _SplitWriter(directory / "valid.bin", tokenizer, dtype) as valid,
        (directory / "valid.txt").open("wb") as valid_text,
    ):
        for document, heldout in split_corpus(config, stats):
            text = document.text.encode()
            if heldout:
                valid.add(plain_segments(document.text, tokenizer), len(text))
                valid_text.write(text)
                names += [document.name] if len(names) < MAX_HELDOUT_NAMES else []
            elif cuts := choose_fim(len(document.text), config.fim_rate, seed, index=train.documents):
                train.add(fim_segments(document.text, cuts, tokenizer), len(text))
            else:
                train.add(plain_segments(document.text, tokenizer), len(text))
            read_bytes += len(text)
            report("tokenising", read_bytes / stats.text_bytes)
    if not (train.documents and valid.documents):
        raise ValueError(f"corpus {config.corpus!r} is too small to hold anything out: {read_bytes} bytes")
    counts = {**train.counts("train"), **valid.counts("valid")}
    return {"token_dtype": dtype.name, **counts, "heldout_documents": tuple(names)}


class _SplitWriter:
    """Appends documents to one file of token ids, encoding many at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.documents = self._tokens = self._bytes = 0
        self._file, self._tokenizer, self._dtype = path.open("wb"), tokenizer, dtype.newbyteorder("<")
        self._pending: list[Segment] = []
        self._pending_characters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if error is None:
                self._flush()

    def add(self, segments: Iterable[Segment], text_bytes: int) -> None:
        self.documents += 1
        self._bytes += text_bytes
        for segment in segments:
            self._pending.append(segment)
            self._pending_characters += len(segment) if isinstance(segment, str) else 0
            if self._pending_characters >= CHARACTERS_PER_WRITE:
                self._flush()

    def counts(self, split: str) -> dict[str, int]:
        counts = {"tokens": self._tokens, "documents": self.documents, "bytes": self._bytes}
        return {f"{split}_{name}": count for name, count in counts.items()}

    def _flush(self) -> None:
        texts = [segment for segment in self._pending if isinstance(segment, str)]
        encoded = iter(self._tokenizer.encode_batch(texts))
        ids = [[segment] if isinstance(segment, int) else next(encoded) for segment in self._pending]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=self._dtype)
        self._file.write(tokens.tobytes())
        self._tokens += len(tokens)
        self._pending, self._pending_characters = [], 0


def plain_segments(text: str, tokenizer: Tokenizer) -> list[Segment]:
    return [tokenizer.bos_id, *split_chunks(text), tokenizer.eos_id]


def choose_fim(length: int, rate: float, seed: int, index: int) -> tuple[int, int] | None:
    """Where the middle of training document number `index` starts and ends; None if it is not rearranged.

    The draw depends on (seed, index) alone, so the documents before it need not be read to repeat it.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    if random.random() >= rate:
        return None
    start, end = sorted(random.integers(0, length, size=2, endpoint=True).tolist())
    return start, end


def fim_segments(text: str, cuts: tuple[int, int], tokenizer: Tokenizer) -> list[Segment]:
    """Prefix, suffix, middle: the middle is predicted from both sides."""
    start, end = cuts
    parts = (
        (tokenizer.fim_prefix_id, text[:start]),
        (tokenizer.fim_suffix_id, text[end:]),
        (tokenizer.fim_middle_id, text[start:end]),
    )
    segments: list[Segment] = [tokenizer.bos_id]
    for control_id, part in parts:
        assert control_id is not None  # `_make_tokenizer` refuses a tokenizer without them
        segments += [control_id, *split_chunks(part)]
    return [*segments, tokenizer.eos_id]
