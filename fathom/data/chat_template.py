"""From a conversation to token ids, by the model's own chat template, in a sandbox.

A template is code that came with a checkpoint, and what users write is put into it. So the template runs without
access to Python (jinja2's immutable sandbox), with a limit on time and on the sizes it can make, and what users write
never becomes a control token: every spelling of one inside a message is broken apart by a mark before the template
sees it, the template's own control tokens are then found in the result, and the marks are taken out of the rest.
"""

import contextvars
import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from fathom.data.tokenizer import Tokenizer

_SECONDS = 2.0
"""The time limit of a template; real ones take milliseconds."""

_LARGEST = 1 << 24
"""Characters or elements that one operation of a template may make."""

_WIDEST = 10_000
"""The largest number that a template may hand to a filter or a method of a text: a width to fill, a count."""

_WIDE = re.compile(r"\d{5}")
"""Such a width in a format string."""

_LARGEST_PRODUCT = 1 << 28
"""The same for filters and methods, which may substitute one operand for every character of another."""

_MARKS = [chr(code) for code in range(0xE000, 0xE100)]
"""Private code points, of which one that no message holds serves as the mark."""

Message = dict[str, Any]
"""A message of OpenAI's protocol: role, content, and the fields of tool calls."""


class ChatError(ValueError):
    """The conversation cannot be rendered by this model's template."""


class ChatTemplate:
    """Renders conversations as the model's chat template has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatError where the tokenizer has no template, or none that can be compiled."""
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((each.get("template") for each in source if each.get("name") == "default"), None)
        if not isinstance(source, str):
            raise ChatError("the model directory has no chat template; use completions, or add chat_template.jinja")
        self._tokenizer = tokenizer
        self._spellings = special_spellings(tokenizer)
        self._specials = re.compile("|".join(map(re.escape, self._spellings)) or r"(?!)")
        self.supports_tools = "tools" in source
        """Whether the template itself renders tools."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_count_output
        )
        environment.filters = {name: _bounded(each) for name, each in environment.filters.items() if name != "format"}
        environment.filters["tojson"] = _bounded(_to_json)
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text that the model is to continue, control tokens spelled out, as `transformers` renders it.

        Raises ChatError where the template refuses the messages, or takes too long.
        """
        config = self._tokenizer.config
        spelled = {name: _spelling(config[name]) for name in config if name.endswith("_token") and config[name]}
        with _Deadline(_SECONDS):
            _written.set(0)
            try:
                return self._template.render(
                    **spelled, messages=list(messages), tools=tools, documents=None, add_generation_prompt=True
                )
            except _TooMuchError as error:
                raise ChatError(f"the model's chat template {error}") from None
            except jinja2.TemplateError as error:
                raise ChatError(f"the model's chat template does not take these messages: {error}") from error
            except (
                TypeError,
                ValueError,
                ArithmeticError,
                LookupError,
                AttributeError,
                RuntimeError,
                MemoryError,
            ) as error:
                kind = type(error).__name__
                raise ChatError(f"the model's chat template does not take these messages ({kind}: {error})") from error

    def encode(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids of the conversation, up to where the answer begins. Raises ChatError as `render` does."""
        mark = self._free_mark(messages, tools)
        broken_tools = None if tools is None else _mapped(tools, lambda text: self._broken(text, mark))
        marked = self.render(_mapped(list(messages), lambda text: self._broken(text, mark)), broken_tools)
        ids: list[int] = []
        start = 0
        for found in self._specials.finditer(marked):
            ids += self._plain(marked[start : found.start()], mark)
            ids.append(cast(int, self._tokenizer.token_id(found[0])))
            start = found.end()
        return ids + self._plain(marked[start:], mark)

    def _plain(self, text: str, mark: str) -> list[int]:
        text = text.replace(mark, "")
        return self._tokenizer.encode(text, bos=False) if text else []

    def _broken(self, text: str, mark: str) -> str:
        # Also the beginning of a spelling at the end of a text, which the template's next characters could complete.
        text = self._specials.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        for spelling in self._spellings:
            for length in range(min(len(spelling) - 1, len(text)), 0, -1):
                if text.endswith(spelling[:length]):
                    return text + mark
        return text

    def _free_mark(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        used = set("".join(_strings([*messages, *(tools or [])])))
        free = next((mark for mark in _MARKS if mark not in used), None)
        if free is None:
            raise ChatError("the messages use all of the private characters U+E000 to U+E0FF")
        return free


def special_spellings(tokenizer: Tokenizer) -> list[str]:
    """How the added tokens are spelled, longest first."""
    added = json.loads(tokenizer.tokenizer_json)["added_tokens"]
    return sorted((token["content"] for token in added if token["content"]), key=len, reverse=True)


def _spelling(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, content in value.items():
            yield name
            yield from _strings(content)
    elif isinstance(value, list):
        for content in value:
            yield from _strings(content)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        # The template looks fields up by name; users choose names in schemas alone.
        return {change(name): _mapped(content, change) for name, content in value.items()}
    return [_mapped(content, change) for content in value] if isinstance(value, list) else value


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # jinja2's own escapes what HTML needs escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _TooMuchError(Exception):
    """The template exceeds its limit of time or size."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds `range`, with bounds on the operators whose results can be huge."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """`a ~ b` becomes the sum of two strings, which is bounded like any other."""
        return _Sums().visit(super()._parse(source, name, filename)).set_environment(self)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and _size([left, right]) > _LARGEST:
            raise _TooMuchError(f"makes something of more than {_LARGEST} elements")
        if operator == "*":
            size = max(len(each) if isinstance(each, str | list | tuple) else 0 for each in (left, right))
            times = max(each if isinstance(each, int) else 0 for each in (left, right))
            if size * times > _LARGEST:
                raise _TooMuchError(f"makes something of {size * times} elements")
        if operator == "**" and not (abs(left) < 1e6 and abs(right) < 64):
            raise _TooMuchError("raises to a large power")
        if operator == "%" and isinstance(left, str):
            raise _TooMuchError("formats with %, which has no bound on what it makes")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, as jinja2 names them
        """String methods can pad to any width."""
        method = getattr(__obj, "__wrapped__", __obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_sizes(*args, *kwargs.values())
            _check_growth(method.__name__, text, *args, *kwargs.values())
            if method.__name__ in ("format", "format_map") and _WIDE.search(text):
                raise _TooMuchError("formats to a large width")
        return super().call(__context, __obj, *args, **kwargs)


def _bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, which refuses large numbers."""

    @functools.wraps(filter_)  # jinja2 marks filters with the arguments they take
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes(*args[1:], *kwargs.values())
        _check_growth(filter_.__name__, *args, *kwargs.values())
        return filter_(*args, **kwargs)

    return checked


def _check_sizes(*values: Any) -> None:
    large = next((value for value in values if isinstance(value, int) and abs(value) > _WIDEST), None)
    if large is not None:
        raise _TooMuchError(f"asks for a size of {large}; the limit is {_WIDEST}")


def _check_growth(name: str, *operands: Any) -> None:
    sizes = sorted(
        1 + (_size(each) if isinstance(each, str | list | tuple | dict) else abs(each))
        for each in operands
        if isinstance(each, str | list | tuple | dict) or (isinstance(each, int) and name != "do_truncate")
    )
    largest, second = (*reversed(sizes), 1, 1)[:2]
    if largest > _LARGEST or largest * second > _LARGEST_PRODUCT:
        raise _TooMuchError(f"could make more than {_LARGEST_PRODUCT} characters at once")


def _size(value: Any) -> int:
    """Characters and elements, however often they are repeated in it; counting stops at the limit."""
    size, waiting = 0, [value]
    while waiting and size <= _LARGEST:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, list | tuple | dict):
            size += len(one)
            waiting += [*one, *one.values()] if isinstance(one, dict) else one if size <= _LARGEST else []
        else:
            size += 1
    return size


_written: contextvars.ContextVar[int] = contextvars.ContextVar("written", default=0)
"""Characters the template has put out, blocks and macros included."""


def _count_output(value: Any) -> Any:
    _written.set(_written.get() + _size(value))
    if _written.get() > _LARGEST:
        raise _TooMuchError(f"puts out more than {_LARGEST} characters")
    return value


class _Sums(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802, as jinja2 names them
        """Without `~`."""
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(each, "string", [], [], None, None) for each in node.nodes]
        return functools.reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), texts)


class _Deadline:
    """Raises, once the time is over, at the next line that runs inside it on this thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._end = time.monotonic() + self._seconds
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *failure: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > self._end:
            raise _TooMuchError(f"took longer than {self._seconds:g} s")
        return self._trace
