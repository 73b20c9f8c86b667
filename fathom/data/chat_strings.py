"""The strings that a chat template works with, in the process that renders it (`chat_renderer.py`).

What users write must not become a control token, and templates may still compare, split and measure it. So it is the
template's own strings that are marked. Where they are put out or joined to others, every character that may belong to a
control token is replaced by a private one, its code, which no message contains. What consists of codes in the result is
the template's, and everything else is text.

For training, what the messages say can be marked as well (`Said`): a private character and numbers where each string
begins and ends, which are taken out of the result, so that the places are known.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

_PRIVATE = range(0xF0000, 0x10FFFE)
"""The private planes of Unicode."""


class Codes:
    """Private characters for those that control tokens are spelled with."""

    def __init__(self, spellings: Sequence[str], avoid: str) -> None:
        """`avoid`: a text whose characters are no codes."""
        self._longest_first = sorted(spellings, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, self._longest_first)) or r"(?!)")
        self._joined = "\0".join(spellings)
        self._starts = {spelling[:end] for spelling in spellings for end in range(len(spelling))}
        self._ends = {spelling[start:] for spelling in spellings for start in range(1, len(spelling) + 1)}
        self._longest = max(map(len, spellings), default=0)
        characters, free = {*map(ord, self._joined)}, sorted({*_PRIVATE} - {*map(ord, avoid)})
        if len(free) < 2 * len(characters):
            raise ValueError("the messages use nearly all of Unicode's private characters")
        # By chance: what users write, or a template unescapes, cannot aim at them.
        mark, *codes = random.SystemRandom().sample(free, 1 + len(characters))
        self._codes = dict(zip(characters, codes, strict=True))
        self._plain = {code: chr(character) for character, code in self._codes.items()}
        self.mark = chr(mark)
        """What encloses the numbers of a mark."""

    def collide(self, text: str) -> bool:
        """Whether any of them is in the text."""
        private = set(re.findall("[\U000f0000-\U0010ffff]", text))
        return self.mark in private or not self._plain.keys().isdisjoint(map(ord, private))

    def encode(self, text: str) -> str:
        """The text with its control tokens in codes, and what may end one at its beginning or begin one at its end."""
        if text in self._joined:
            return text.translate(self._codes)
        lengths = range(1, min(len(text), self._longest) + 1)
        head = max((length for length in lengths if text[:length] in self._ends), default=0)
        tail = len(text) - max((length for length in lengths if text[-length:] in self._starts), default=0)
        coded = self._found.sub(lambda found: found[0].translate(self._codes), text)
        coded = text[:head].translate(self._codes) + coded[head:]
        return coded[:tail] + text[tail:].translate(self._codes)

    def decode(self, coded: str) -> str:
        """The text itself."""
        return coded.translate(self._plain)

    def split(self, coded: str) -> list[str]:
        """Texts and, between any two of them, a control token of the template."""
        alternatives = "|".join(spelling.translate(self._codes) for spelling in self._longest_first)
        return [self.decode(piece) for piece in re.split(f"({alternatives or '(?!)'})", coded)]


class Literal(str):
    """A string of the template. Compared it is plain, put out or joined to another it is in codes."""

    _codes: ClassVar[Codes]  # out of a template's reach, like every name with an underscore

    def __str__(self) -> str:
        return self._codes.encode(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: Any) -> Any:
        return Literal(super().__add__(other)) if isinstance(other, Literal) else str(self) + other

    def __radd__(self, other: Any) -> Any:
        return other + str(self)

    def __mod__(self, values: Any) -> str:
        return str(self) % values

    def join(self, parts: Iterable[Any]) -> str:
        """As of a string."""
        return str(self).join(map(str, parts))

    def replace(self, old: Any, new: Any, count: Any = -1) -> str:
        """As of a string."""
        return str(new).join(str(Literal(part)) for part in self.split(old, count))


def _still_literal(name: str) -> Callable[..., Literal]:
    def method(self: Literal, *arguments: Any) -> Literal:
        return Literal(getattr(str, name)(self, *arguments))

    method.__name__ = name
    return method


for _name in (
    "strip",
    "lstrip",
    "rstrip",
    "upper",
    "lower",
    "capitalize",
    "title",
    "__mul__",
    "__rmul__",
    "__getitem__",
):
    setattr(Literal, _name, _still_literal(_name))  # no character of another string gets in


class Said(str):
    """A string of a message. Compared, measured and cut it is plain; put out or joined to others it stands in marks."""

    _mark: str

    def __str__(self) -> str:
        # Blanks at the ends stay outside, where a template that strips what it has joined finds them.
        rest = str.lstrip(self)
        body = str.rstrip(rest)
        start = len(self) - len(rest)
        opening = self._mark if body else ""
        return str.__getitem__(self, slice(start)) + opening + body + self._mark + rest[len(body) :]

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: Any) -> Any:
        return str(self) + str(other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return str(other) + str(self) if isinstance(other, str) else NotImplemented


def said(value: Any, mark: str) -> Any:
    """The value with every string in it marked."""
    if isinstance(value, str):
        marked = Said(str.__str__(value))  # plain: a part may be the whole, with its marks
        marked._mark = mark
        return marked
    if isinstance(value, dict):
        return {key: said(item, mark) for key, item in value.items()}
    return [said(item, mark) for item in value] if isinstance(value, (list, tuple)) else value


def _still_said(name: str) -> Callable[..., Any]:
    def method(self: Said, *arguments: Any, **named: Any) -> Any:
        return said(getattr(str, name)(self, *arguments, **named), self._mark)

    method.__name__ = name
    return method


for _name in (
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "__getitem__"),
    *("split", "rsplit", "splitlines", "partition", "rpartition"),
    *("upper", "lower", "capitalize", "title"),
):
    setattr(Said, _name, _still_said(_name))


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object for templates that iterate, their JSON text for those that join it."""

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text))
        self._text = str(text)

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> Any:
        return self._text + other

    def __radd__(self, other: Any) -> Any:
        return other + self._text
