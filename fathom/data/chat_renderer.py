"""Renders one chat template, in a process of its own, which `chat_template.py` starts and sends requests to.

A template is code that came with a checkpoint, and what users write is put into it. It runs in jinja2's immutable
sandbox, without access to Python, and in a process that the kernel ends where a rendering takes too much time or
memory: no list of costly operations would be complete.

What the template's strings and those of the messages are made into before they meet: `chat_strings.py`.

Each line of standard input and output is a JSON text: first what the template is, then requests. Both files
import jinja2 and the standard library alone, so that the process starts in a tenth of a second.
"""

import contextlib
import copy
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from fathom.data.chat_strings import Arguments, Codes, Literal, Said, said

_MEMORY = 1 << 30
"""Bytes that the process may allocate."""

_LARGEST = 1 << 24
"""Characters of a rendering."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Templates spell control tokens with them: '<|' + message.role + '|>'."""


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
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    mark = _mark_in(value)
    return text if mark is None else said(text, mark)


def _mark_in(value: Any) -> str | None:
    """The mark of the last string in the value that has one."""
    if isinstance(value, Said):
        return value._mark
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((mark for mark in map(_mark_in, reversed(list(items))) if mark is not None), None)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    return (text if isinstance(text, str) else str(text)).replace(old, str(new), count)


@jinja2.pass_context  # so that it is not evaluated when the template is compiled
def _literal(context: Any, text: str) -> Literal:
    return Literal(text)


class Renderer:
    """One template."""

    def __init__(self, source: str, spellings: Sequence[str], tokens: dict[str, str], seconds: float) -> None:
        """`tokens`: control tokens by the template's names for them; `seconds`: what a rendering may take.

        Raises jinja2.TemplateError.
        """
        self._source, self._spellings, self._tokens, self._seconds = source, spellings, tokens, seconds
        Literal._codes = Codes(spellings, source)
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters.update(tojson=_to_json, replace=_replace, literal=_literal)
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self.variables = sorted(meta.find_undeclared_variables(environment.parse(source)))
        self._template = environment.from_string(source)

    def answer(self, line: str) -> dict[str, Any]:
        """The rendering of a request (a line of JSON): its `pieces`, as `Codes.split` returns them.

        If the request has `prefixes`, lists of how many of the first messages and whether a generation prompt follows
        them, also the `marks` of the whole and the `tails` of these prefixes (see `_take_marks` and `_tail`).
        """
        if Literal._codes.collide(line):
            Literal._codes = Codes(self._spellings, self._source + line)
        request = json.loads(line)
        if "prefixes" not in request:
            text = self._text(request["messages"], request, not request["continue_final"])
            return {"pieces": Literal._codes.split(text)}
        plain = self._text(copy.deepcopy(request["messages"]), request, False)
        answer: dict[str, Any] = {"pieces": Literal._codes.split(plain), "tails": []}
        marked = self._text(_marked(copy.deepcopy(request["messages"])), request, False)
        pieces, answer["marks"] = _take_marks(Literal._codes.split(marked))
        if pieces != answer["pieces"]:
            raise _RefusalError("contents that are marked, as for training they must be, change the text")
        for count, generation_prompt in request["prefixes"]:
            signal.setitimer(signal.ITIMER_PROF, self._seconds)  # each may take as long
            messages = _marked(copy.deepcopy(request["messages"][:count]))
            answer["tails"].append(_tail(self._text(messages, request, generation_prompt)))
        return answer

    def _text(self, messages: list[dict[str, Any]], request: dict[str, Any], generation_prompt: bool) -> str:
        messages = [self._message(message) for message in messages]
        try:
            text = self._render(messages, request, generation_prompt)
        except _RefusalError:
            raise
        except Exception:  # of whatever kind: many templates take a text where others test for none
            if all(message.get("content") is not None for message in messages):
                raise
            messages = [
                message | {"content": ""} if message.get("content") is None else message for message in messages
            ]
            text = self._render(messages, request, generation_prompt)
        if request.get("continue_final"):
            text = _up_to(text, messages[-1]["content"])
        if len(text) > _LARGEST:
            raise ValueError(f"the rendering has {len(text)} characters; the limit is {_LARGEST}")
        return text

    def _render(self, messages: list[dict[str, Any]], request: dict[str, Any], generation_prompt: bool) -> str:
        tokens = {name: Literal(token) for name, token in self._tokens.items()}
        return self._template.render(
            request["variables"] | tokens,
            messages=messages,
            tools=request["tools"],
            documents=None,
            add_generation_prompt=generation_prompt,
        )

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") in _ROLES:
            message = message | {"role": Literal(message["role"])}
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            text = function.get("arguments")
            if isinstance(text, str) and text.lstrip().startswith("{"):
                with contextlib.suppress(ValueError):  # what is not JSON stays a text
                    function["arguments"] = Arguments(text)
        return message


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every string marked by the numbers of its message and its field.

    Instructions are not: some templates move them to the front, and they are never between two parts of one turn.
    """
    marked = []
    for number, message in enumerate(messages):
        if message.get("role") not in ("system", "developer"):
            fields = enumerate(message.items())
            code = Literal._codes.mark
            mark = f"{code}{number}.%d{code}"
            message = {name: value if name == "role" else said(value, mark % field) for field, (name, value) in fields}
        marked.append(message)
    return marked


def _take_marks(pieces: list[str]) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The pieces without marks, and these: the position, the number of the message, and that of its field.

    Positions count characters of texts; a control token counts as one.
    """
    code = Literal._codes.mark
    plain, marks, position = [], [], 0
    for index, piece in enumerate(pieces):
        if index % 2:
            plain.append(piece)
            position += 1
            continue
        texts = re.split(f"{code}([0-9]+)[.]([0-9]+){code}", piece)
        for text, message, field in zip(texts[::3], texts[1::3], texts[2::3], strict=False):
            position += len(text)
            marks.append((position, int(message), int(field)))
        position += len(texts[-1])
        plain.append("".join(texts[::3]))
    return plain, marks


def _tail(text: str) -> tuple[int, int, list[str]]:
    """The numbers of the last mark in a rendering, −1 where there is none, and the pieces of what follows it."""
    code = Literal._codes.mark
    before, _, behind = text.rpartition(code)
    message, field = before.rpartition(code)[2].split(".") if before else ("-1", "-1")
    return int(message), int(field), Literal._codes.split(behind)


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
                renderer = Renderer(**json.loads(line), seconds=seconds)
                answer: dict[str, Any] = {"variables": renderer.variables}
            else:
                answer = renderer.answer(line)
        except Exception as error:  # a template can raise anything
            kind = "" if isinstance(error, (_RefusalError, jinja2.TemplateError)) else f"{type(error).__name__}: "
            message = f"{kind}{error}"
            answer = {"error": Literal._codes.decode(message)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
