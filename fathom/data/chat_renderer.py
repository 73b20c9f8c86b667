"""Renders one chat template, in a process of its own, which `chat_template.py` starts and sends requests to.

A template is code that came with a checkpoint, and what users write is put into it. It runs in jinja2's immutable
sandbox, without access to Python, and in a process that the kernel ends where a rendering takes too much time or
memory: no list of costly operations would be complete.

What users write must not become a control token, and templates may still compare, split and measure it. So it is the
template's own strings that are marked. Where they are put out or joined to others, every character that may belong to a
control token is replaced by a private one, its code, which no message contains. What consists of codes in the result is
the template's, and everything else is text.

Each line of standard input and output is a JSON text: first what the template is, then requests. This file imports
jinja2 and the standard library alone, so that the process starts in a tenth of a second.
"""

import contextlib
import datetime
import json
import random
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MEMORY = 1 << 30
"""Bytes that the process may allocate."""

_LARGEST = 1 << 24
"""Characters of a rendering."""

_PRIVATE = range(0xF0000, 0x10FFFE)
"""The private planes of Unicode."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Templates spell control tokens with them: '<|' + message.role + '|>'."""


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
        self._codes = dict(zip(characters, random.SystemRandom().sample(free, len(characters)), strict=True))
        self._plain = {code: chr(character) for character, code in self._codes.items()}

    def collide(self, text: str) -> bool:
        """Whether any of them is in the text."""
        return not self._plain.keys().isdisjoint(map(ord, re.findall("[\U000f0000-\U0010ffff]", text)))

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


class Arguments(dict[str, Any]):
    """The arguments of a tool call: an object for templates that iterate, their JSON text for those that join it."""

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text))
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> Any:
        return self._text + other

    def __radd__(self, other: Any) -> Any:
        return other + self._text


class _Sandbox(ImmutableSandboxedEnvironment):
    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Literals().visit(super()._parse(source, name, filename)).set_environment(self)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What is formatted is no literal any more."""
        literal = getattr(value, "__self__", None)
        return super().wrap_str_format(getattr(str(literal), value.__name__) if type(literal) is Literal else value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, as jinja2 names them
        """Strings of the template that go into others are put in codes."""
        if isinstance(getattr(__obj, "__self__", None), str) and args:
            if __obj.__name__ == "join":
                args = (map(str, args[0]),)
            elif __obj.__name__ == "replace" and len(args) > 1:
                args = (args[0], str(args[1]), *args[2:])
        return super().call(__context, __obj, *args, **kwargs)


class _Literals(NodeTransformer):
    """Wraps the strings of a template that may hold parts of control tokens in `Literal`."""

    def visit_Const(self, node: nodes.Const) -> nodes.Expr:  # noqa: N802, as jinja2 names them
        return self._wrapped(node, node.value) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:  # noqa: N802
        return self._wrapped(node, node.data)

    def _wrapped(self, node: nodes.Expr, text: str) -> nodes.Expr:
        if Literal._codes.encode(text) == text:
            return node
        return nodes.Filter(nodes.Const(text), "literal", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which trainers find what the assistant says."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _RefusalError(Exception):
    """Raised by the template."""


def _refuse(message: str) -> None:
    raise _RefusalError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # As in transformers; jinja2's own escapes what HTML needs escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    return (text if isinstance(text, str) else str(text)).replace(old, str(new), count)


@jinja2.pass_context  # so that it is not evaluated when the template is compiled
def _literal(context: Any, text: str) -> Literal:
    return Literal(text)


class Renderer:
    """One template."""

    def __init__(self, source: str, spellings: Sequence[str], tokens: dict[str, str]) -> None:
        """`tokens`: control tokens by the template's names for them. Raises jinja2.TemplateError."""
        self._source, self._spellings, self._tokens = source, spellings, tokens
        Literal._codes = Codes(spellings, source)
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters.update(tojson=_to_json, replace=_replace, literal=_literal)
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self.variables = sorted(meta.find_undeclared_variables(environment.parse(source)))
        self._template = environment.from_string(source)

    def pieces(self, line: str) -> list[str]:
        """The rendering of a request (a line of JSON), as `Codes.split` returns it."""
        if Literal._codes.collide(line):
            Literal._codes = Codes(self._spellings, self._source + line)
        request = json.loads(line)
        messages = [self._message(message) for message in request["messages"]]
        try:
            text = self._render(messages, request)
        except _RefusalError:
            raise
        except Exception:  # of whatever kind: many templates take a text where others test for none
            if all(message.get("content") is not None for message in messages):
                raise
            text = self._render([message | {"content": message.get("content") or ""} for message in messages], request)
        if request["continue_final"]:
            text = _up_to(text, messages[-1]["content"])
        if len(text) > _LARGEST:
            raise ValueError(f"the rendering has {len(text)} characters; the limit is {_LARGEST}")
        return Literal._codes.split(text)

    def _render(self, messages: list[dict[str, Any]], request: dict[str, Any]) -> str:
        tokens = {name: Literal(token) for name, token in self._tokens.items()}
        return self._template.render(
            request["variables"] | tokens,
            messages=messages,
            tools=request["tools"],
            documents=None,
            add_generation_prompt=not request["continue_final"],
        )

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") in _ROLES:
            message["role"] = Literal(message["role"])
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            text = function.get("arguments")
            if isinstance(text, str) and text.lstrip().startswith("{"):
                with contextlib.suppress(ValueError):  # what is not JSON stays a text
                    function["arguments"] = Arguments(text)
        return message


def _up_to(rendered: str, content: str) -> str:
    """The rendering up to the end of the final message, with the blanks behind it unless the template strips them."""
    start = rendered.rfind(content.strip())
    if start < 0:
        raise ValueError("the template does not put out the final message, so it cannot be continued")
    whole = rendered.startswith(content.lstrip(), start)
    return rendered[: start + len(content.lstrip() if whole else content.strip())]


def main() -> None:
    seconds = float(sys.argv[1])
    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit memory; time it does
            resource.setrlimit(limit, (value, value))
    # Ends the process, whatever it is doing and whatever its parent does with the signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="surrogatepass")  # type: ignore[union-attr]
    renderer: Renderer | None = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if renderer is None:
                renderer = Renderer(**json.loads(line))
                answer: dict[str, Any] = {"variables": renderer.variables}
            else:
                answer = {"pieces": renderer.pieces(line)}
        except Exception as error:  # a template can raise anything
            kind = "" if isinstance(error, (_RefusalError, jinja2.TemplateError)) else f"{type(error).__name__}: "
            message = f"{kind}{error}"
            answer = {"error": Literal._codes.decode(message)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
