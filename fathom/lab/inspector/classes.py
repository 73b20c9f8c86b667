"""Classes of tokens: keyword, name, number, indentation, ….

Every character first gets a class by a lexical rule that works for any text; in Python, Python's own tokenizer then
identifies keywords, strings and comments. A token of the model has the class of most of its bytes, where blanks count
only if there is nothing else: « def» is a keyword, «.join» a name.
"""

import ast
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BREAKS, BLANKS = "line breaks and indentation", "blanks"
PYTHON = ("keywords", "names", "numbers", "strings", "comments", "operators", BREAKS, BLANKS)
PLAIN = ("words", "capitalised words", "numbers", "punctuation", BREAKS, BLANKS)

_LEXICAL = re.compile(r"(?P<breaks>\A[ \t]+|\s*\n[ \t]*)|(?P<blanks>\s+)|(?P<numbers>\d+)|(?P<words>\w+)|[^\w\s]+")
_PYTHON_KINDS = {tokenize.COMMENT: "comments", tokenize.STRING: "strings", tokenize.NUMBER: "numbers"} | {
    getattr(tokenize, name): "strings"  # f-strings come in parts from Python 3.12 on
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(tokenize, name)
}


@dataclass(frozen=True)
class ByteClasses:
    """A class for every byte of a text in UTF-8."""

    names: tuple[str, ...]
    of_bytes: NDArray[np.uint8]
    """Indices into `names`."""


def is_python(text: str) -> bool:
    """Whether the text parses as Python and is more than a single name. It is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Module | ast.Expr | ast.Name | ast.Load) for node in ast.walk(tree))


def byte_classes(text: str, python: bool) -> ByteClasses:
    """The class of every byte. Where Python's tokenizer fails, the lexical rule applies from there on."""
    names = PYTHON if python else PLAIN
    of_characters = np.zeros(len(text), np.uint8)
    for start, end, name in _lexical(text, python):
        of_characters[start:end] = names.index(name)
    if python:
        for start, end, name in _tokenized(text):
            of_characters[start:end] = names.index(name)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return ByteClasses(names, np.repeat(of_characters, sizes))


def token_classes(classes: ByteClasses, sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The class of every token; `sizes` are the tokens' lengths in bytes, which add up to the text's."""
    if sum(sizes) != len(classes.of_bytes):
        raise ValueError(f"the tokens have {sum(sizes)} bytes, the text {len(classes.of_bytes)}")
    blank = [classes.names.index(BREAKS), classes.names.index(BLANKS)]
    found, start = np.zeros(len(sizes), np.uint8), 0
    for place, size in enumerate(sizes):
        counts = np.bincount(classes.of_bytes[start : start + size], minlength=len(classes.names))
        solid = counts.copy()
        solid[blank] = 0
        found[place] = (solid if solid.any() else counts).argmax()
        start += size
    return found


def _lexical(text: str, python: bool) -> Iterator[tuple[int, int, str]]:
    """(start, end, class) of spans that cover the whole text."""
    for match in _LEXICAL.finditer(text):
        kind = match.lastgroup
        if kind == "words":
            capital = match.group()[0].isupper()
            name = "names" if python else "capitalised words" if capital else "words"
        elif kind is None:
            name = "operators" if python else "punctuation"
        else:
            name = {"breaks": BREAKS, "blanks": BLANKS, "numbers": "numbers"}[kind]
        yield match.start(), match.end(), name


def _tokenized(text: str) -> Iterator[tuple[int, int, str]]:
    """The same by Python's tokenizer, for the kinds that have a class, up to the first error."""
    starts = np.cumsum([0, *map(len, io.StringIO(text))])
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = _PYTHON_KINDS.get(token.type)
            if token.type == tokenize.NAME:
                name = "keywords" if keyword.iskeyword(token.string) else "names"
            if name is not None:
                (first, left), (last, right) = token.start, token.end
                yield int(starts[first - 1]) + left, int(starts[last - 1]) + right, name
    except (tokenize.TokenError, SyntaxError):
        return
