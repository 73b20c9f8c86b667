"""The parts of a chat's answer as its text comes: reasoning, content, and tool calls with their arguments.

Text that may be the beginning of a mark is held back until that is decided, so that the parts do not depend on how the
text is cut into chunks.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fathom.serve.output_format import END_THINK, THINK, CallFormat, Reasoning


class Part(NamedTuple):
    """A piece of the answer."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    """Of a call the name of its function; of arguments a piece of their JSON text."""
    call: int = 0
    """Which call, counted from 0."""
    call_id: str = ""


class MessageParser:
    """Follows one answer."""

    def __init__(self, calls: CallFormat | None, reasoning: Reasoning) -> None:
        """`calls`: how tool calls are spelled; None: there are none."""
        self._format = calls
        self._buffer = ""
        self._parts: list[Part] = []
        self._final = False
        self._skip_blanks = reasoning == "begun"
        self.num_calls = 0
        self.reasoned = reasoning == "begun"
        """Whether there is reasoning."""
        states = {"none": self._begin_answer, "possible": self._begin, "begun": self._reasoning}
        self._state: Callable[[], bool] = states[reasoning]

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are decided with this text; with `final` there is no more."""
        self._buffer += text
        self._final = final
        while self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    # The states: each reads on, and returns whether there is another state to go on with.

    def _begin(self) -> bool:
        begun = self._begins_with(THINK)
        if begun is None:
            return False
        if begun:
            self._buffer = self._buffer.lstrip()[len(THINK) :]
            self._skip_blanks = self.reasoned = True
        self._state = self._reasoning if begun else self._begin_answer
        return True

    def _reasoning(self) -> bool:
        if self._skip_blanks:
            self._buffer = self._buffer.lstrip()
            self._skip_blanks = not self._buffer
        # Kimi-K2 calls tools also in the middle of its reasoning.
        marks = [END_THINK, *([self._format.opening] if self._format and not self._format.single else [])]
        text, mark = self._until(marks, hold_blanks=True)
        self._add("reasoning", text)
        if mark is None:
            return False
        self._skip_blanks = True
        self._state = self._begin_answer if mark == END_THINK else self._opened()
        return True

    def _begin_answer(self) -> bool:
        if self._skip_blanks:
            self._buffer = self._buffer.lstrip()
        if self._format is not None and self._format.single:
            begun = self._begins_with(self._format.call_begin)
            if begun is None:
                return False
            if begun:
                self._buffer = self._buffer.lstrip()[len(self._format.call_begin) :]
                self._state = self._header
                return True
        if not self._buffer:
            return False
        self._state = self._content
        return True

    def _content(self) -> bool:
        if self._format is None or self._format.single:
            text, self._buffer = self._buffer, ""
            self._add("content", text)
            return False
        text, mark = self._until([self._format.opening], hold_blanks=not self._final)
        self._add("content", text if mark is None else text.rstrip())
        if mark is None:
            return False
        self._state = self._opened()
        return True

    def _opened(self) -> Callable[[], bool]:
        assert self._format is not None
        return self._between if self._format.begin else self._header

    def _between(self) -> bool:
        """Before a call, or behind the last."""
        assert self._format is not None
        marks = [self._format.call_begin, *([self._format.end] if self._format.end else [])]
        text, mark = self._until(marks, hold_blanks=True)
        self._add("content", text.strip())
        if mark is None:
            return False
        self._state = self._header if mark == self._format.call_begin else self._begin_answer
        self._skip_blanks = True
        return True

    def _header(self) -> bool:
        assert self._format is not None
        header, mark, rest = self._buffer.partition(self._format.before_arguments)
        if not mark:
            if self._final and self._format.single:  # cut off: no call
                self._add("content", self._format.call_begin + self._buffer)
            if self._final:
                self._buffer = ""
            return False
        self._buffer = rest
        name, call_id = self._format.identify(header)
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self._parts.append(Part("call", name, number, call_id or f"call_{secrets.token_hex(12)}"))
        self._state = self._last_arguments if self._format.single else self._arguments
        return True

    def _arguments(self) -> bool:
        assert self._format is not None
        # A model may leave out the line that ends the code block.
        end = self._format.call_end
        short = end[end.rfind("<") :]
        marks = [end, short] if self._format.begin else [end]
        text, mark = self._until(marks)
        if mark is None and self._final:
            text = text[: len(text) - _begun(text, marks)]
        self._add("arguments", text)
        if mark is None:
            return False
        self._state = self._between if self._format.begin else self._begin_answer
        self._skip_blanks = True
        return True

    def _last_arguments(self) -> bool:
        """Up to the end of the output, but for the brace that ends the call."""
        held = re.search(r"\s*}?\s*$", self._buffer)
        assert held is not None
        end = len(self._buffer) if self._final and "}" not in held[0] else held.start()
        self._add("arguments", self._buffer[:end])
        self._buffer = "" if self._final else self._buffer[end:]
        return False

    def _add(self, kind: Literal["reasoning", "content", "arguments"], text: str) -> None:
        if text:
            self._parts.append(Part(kind, text, self.num_calls - 1 if kind == "arguments" else 0))

    def _begins_with(self, mark: str) -> bool | None:
        """Whether the text does, but for blanks; None as long as that is open."""
        text = self._buffer.lstrip()
        if text.startswith(mark):
            return True
        return None if mark.startswith(text) and not self._final else False

    def _until(self, marks: Sequence[str], hold_blanks: bool = False) -> tuple[str, str | None]:
        """Take the text up to the first of the marks out of the buffer, with the mark; else what cannot belong to one.

        `hold_blanks`: blanks at the end are held too, and dropped before a mark and at the end of the output.
        """
        found = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found, key=lambda each: each[0])
            text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            return (text.rstrip() if hold_blanks else text), mark
        end = len(self._buffer) - (0 if self._final else _begun(self._buffer, marks))
        if hold_blanks:
            end = len(self._buffer[:end].rstrip())
        text, self._buffer = self._buffer[:end], "" if self._final else self._buffer[end:]
        return text, None


def _begun(text: str, marks: Sequence[str]) -> int:
    """The length of the text's longest end that one of the marks begins with."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
