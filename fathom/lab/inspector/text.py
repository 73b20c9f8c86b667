"""The text to inspect: its source, its tokens and their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fathom.config import ConfigError
from fathom.data.corpus import STDLIB, DataConfig, is_heldout, read_corpus
from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.classes import byte_classes, is_python, token_classes

_BYTES_PER_TOKEN = 16
"""An upper bound on the average, which decides how much of a file is read."""
_DEFAULT_BYTES = 60_000
"""Approximate size of the default text, a file of the standard library."""


@dataclass(frozen=True)
class Source:
    """A text and its source."""

    name: str
    text: str
    python: bool
    """Whether it is classified by Python's tokenizer."""
    whole: bool = True
    """False if only the beginning was read."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of the text."""

    ids: tuple[int, ...]
    token_bytes: tuple[bytes, ...]
    """The bytes of each; joined, they are the text."""
    class_names: tuple[str, ...]
    classes_N: NDArray[np.uint8]
    cut: bool
    """Whether the text was truncated."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(map(len, self.token_bytes))


def given_text(text: str) -> Source:
    """A text from the command line."""
    return Source("--text", text, is_python(text))


def file_text(path: Path, tokens: int) -> Source:
    """A UTF-8 file, or as much of its beginning as `tokens` tokens can take. Raises ConfigError for other bytes."""
    most = tokens * _BYTES_PER_TOKEN
    with path.open("rb") as file:
        content = file.read(most + 1)
    whole = len(content) <= most
    content = content[:most]
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if whole or error.start < len(content) - 3:
            raise ConfigError(
                f"--file {path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
            ) from error
        text = content[: error.start].decode()  # the cut went through a character
    return Source(path.name, text, path.suffix in (".py", ".pyi"), whole)


def default_text() -> Source:
    """A file of the standard library that the presets hold out of training, of about 60 kB."""
    config = DataConfig()
    heldout = [document for document in read_corpus(config) if is_heldout(document.group, config.heldout)]
    if not heldout:
        raise ConfigError(f"{STDLIB} holds out no file of this Python's library: give --text or --file")
    best = min(heldout, key=lambda document: abs(len(document.text) - _DEFAULT_BYTES))
    return Source(f"{best.name} of Python's standard library", best.text, python=True)


def tokenized(source: Source, tokenizer: Tokenizer, vocabulary: int, most: int) -> Tokens:
    """At most `most` tokens of the text, ending between two characters.

    Raises ConfigError for a text without tokens, or with one beyond the model's `vocabulary`.
    """
    every = tokenizer.encode(source.text, bos=False)
    ids, token_bytes = _whole_characters(every[:most], tokenizer)
    if not ids:
        raise ConfigError(f"{source.name} holds no text")
    if max(ids) >= vocabulary:
        raise ConfigError(
            f"the tokenizer produces token {max(ids)}, but vocab_size is {vocabulary}: it is not this model's tokenizer"
        )
    classes = byte_classes(b"".join(token_bytes).decode(), source.python)
    classes_N = token_classes(classes, [len(piece) for piece in token_bytes])
    return Tokens(ids, token_bytes, classes.names, classes_N, cut=len(ids) < len(every) or not source.whole)


def readable(piece: bytes) -> str:
    """A token's bytes as text; bytes that are but a part of a character as \\xNN."""
    return piece.decode(errors="backslashreplace")


def _whole_characters(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Without the last tokens if they end inside a character."""
    token_bytes = [tokenizer.token_bytes(token) for token in ids]
    try:
        b"".join(token_bytes).decode()
        return tuple(ids), tuple(token_bytes)
    except UnicodeDecodeError as error:
        ends = np.cumsum([len(piece) for piece in token_bytes])
        complete = int((ends <= error.start).sum())
        return tuple(ids[:complete]), tuple(token_bytes[:complete])
