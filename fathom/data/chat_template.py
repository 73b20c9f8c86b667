"""From a conversation to token ids, by the model's own chat template, which runs in processes of its own.

`chat_renderer.py` says why, and how what users write is kept apart from the template's control tokens.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import jinja2  # noqa: F401 (the renderer's; that it is missing is reported here)

from fathom.data.assistant_mask import Rendering, Tail, TurnError, assistant_spans, prefixes, spans_of_texts, units
from fathom.data.tokenizer import Tokenizer

_SECONDS = 2.0
"""Processor time that a rendering may take; real ones take milliseconds."""

_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
"""The variables of every template."""

Message = dict[str, Any]
"""A message of OpenAI's protocol: role, content, and the fields of tool calls."""


class ChatError(ValueError):
    """The conversation cannot be rendered by this model's template."""


class ChatTemplate:
    """Renders conversations as the model's chat template has them; threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatError where the tokenizer has no template, or none that can be compiled."""
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((each.get("template") for each in source if each.get("name") == "default"), None)
        if not isinstance(source, str):
            raise ChatError("the model directory has no chat template; use completions, or add chat_template.jinja")
        self.source = source
        """The template itself, in Jinja."""
        self._tokenizer = tokenizer
        named = {name: _spelling(token) for name, token in tokenizer.config.items() if name.endswith("_token")}
        tokens = {name: token for name, token in named.items() if token is not None}
        self._setup = {"source": source, "spellings": special_spellings(tokenizer), "tokens": tokens}
        self._eos = tokens["eos_token"]
        self._idle: list[subprocess.Popen[str]] = []
        weakref.finalize(self, _stop, self._idle)
        process, answer = self._start()
        self._idle.append(process)
        self.supports_tools = "tools" in answer["variables"]
        """Whether the template itself renders tools."""
        self._has_prompt = "add_generation_prompt" in answer["variables"]
        self.supports_tool_calls = "tool_calls" in source
        """Whether it puts out the calls in the assistant's messages."""
        self.variables = frozenset(answer["variables"]) - _GIVEN - tokens.keys()
        """Further names that the template reads, such as enable_thinking."""

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The text that the model is to continue, control tokens spelled out, as `transformers` renders it.

        `variables`: values of names in `self.variables`. `continue_final`: the model continues the last message.
        Raises ChatError where the template refuses the messages, or takes too long.
        """
        return "".join(self._pieces(messages, tools, variables, continue_final))

    def encode(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """The token ids of what `render` returns; what is in the messages becomes no control token."""
        pieces = self._pieces(messages, tools, variables, continue_final)
        return [token for ids in self._piece_ids(pieces) for token in ids]

    def encode_training(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        turns: Sequence[int] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The token ids of the whole conversation, and of each whether it is the assistant's, so that it is trained.

        These are its contents, reasoning and tool calls as far as the template puts them out, with the template's own
        text around them, and the end-of-turn token; not the role header or what else is in the generation prompt.
        A token is trained if any part of it is the assistant's. `assistant_mask.py` says how they are found. `turns`:
        the numbers of the messages to train, if not all of the assistant's are.

        Raises ChatError where the template refuses the messages, or does not show which tokens these are.
        """
        roles = [str(message.get("role")) for message in messages]
        if turns is None:
            turns = [number for number, role in enumerate(roles) if role == "assistant"]
        request = {"messages": list(messages), "tools": tools, "variables": variables or {}}
        answer = self._answer(request | {"prefixes": prefixes(turns)})
        pieces, marks = answer["pieces"], [(at, message, field) for at, message, field in answer["marks"]]
        tails = [Tail((message, field), units(behind)) for message, field, behind in answer["tails"]]
        try:
            parts = dict(zip(prefixes(turns), tails, strict=True))
            spans = assistant_spans(turns, roles, Rendering(units(pieces), marks), parts, self._eos, self._has_prompt)
        except TurnError as error:
            raise ChatError(f"the model's chat template does not show what is the assistant's: {error}") from error
        ids, trained = [], []
        inside = spans_of_texts(pieces, spans)
        for index, (piece, piece_ids) in enumerate(zip(pieces, self._piece_ids(pieces), strict=True)):
            ids += piece_ids
            trained += [bool(inside[index])] if index % 2 else self._tokens_in(piece, piece_ids, inside[index])
        return ids, trained

    def _piece_ids(self, pieces: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each piece: of texts by the tokenizer, which finds no control token in them."""
        texts = iter(self._tokenizer.encode_batch(pieces[::2]))
        for index, piece in enumerate(pieces):
            yield [cast(int, self._tokenizer.token_id(piece))] if index % 2 else next(texts)

    def _tokens_in(self, text: str, ids: Sequence[int], spans: list[tuple[int, int]]) -> list[bool]:
        """For each of the text's tokens whether it has a part in the spans of characters."""
        if not spans:
            return [False] * len(ids)
        byte_spans = [tuple(self._tokenizer.byte_position(text, at) for at in span) for span in spans]
        ends = list(accumulate(len(self._tokenizer.token_bytes(token)) for token in ids))
        if ends[-1:] != [self._tokenizer.byte_position(text, len(text))]:
            raise ChatError("the model's tokenizer does not give back the text, so no token can be assigned to a turn")
        tokens = zip([0, *ends], ends, strict=False)
        return [any(begin < stop and end > start for start, stop in byte_spans) for begin, end in tokens]

    def _pieces(self, messages: Sequence[Message], tools: Any, variables: Any, continue_final: bool) -> list[str]:
        """Texts and, between any two of them, a control token."""
        if continue_final and not (messages and str(messages[-1].get("content") or "").strip()):
            raise ChatError("the final message has no text that could be continued")
        request = {"messages": list(messages), "tools": tools, "variables": variables or {}}
        return self._answer(request | {"continue_final": continue_final})["pieces"]

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            process = self._idle.pop()
        except IndexError:
            process, _ = self._start()
        answer = _exchange(process, request)
        self._idle.append(process)
        if "error" in answer:
            raise ChatError(f"the model's chat template does not take these messages: {answer['error']}")
        return answer

    def _start(self) -> tuple["subprocess.Popen[str]", dict[str, Any]]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fathom.data.chat_renderer", str(_SECONDS)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(_paths())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogatepass",
            process_group=0,  # Ctrl-C in a terminal is not for it
        )
        answer = _exchange(process, self._setup)
        if "error" in answer:
            _stop([process])
            raise ChatError(f"the model's chat template cannot be read: {answer['error']}")
        return process, answer


def _paths() -> list[str]:
    """Where the process finds this package, wherever it lies, and what the environment names."""
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]


def special_spellings(tokenizer: Tokenizer) -> list[str]:
    """How the added tokens are spelled, longest first."""
    added = json.loads(tokenizer.tokenizer_json)["added_tokens"]
    return sorted((token["content"] for token in added if token["content"]), key=len, reverse=True)


def _exchange(process: "subprocess.Popen[str]", request: dict[str, Any]) -> dict[str, Any]:
    """Send a request, and wait for the answer. Raises ChatError where the process ends instead."""
    assert process.stdin is not None and process.stdout is not None
    line = ""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if line:
        return json.loads(line)
    _stop([process])
    if process.returncode == -signal.SIGPROF:
        raise ChatError(f"the model's chat template took longer than {_SECONDS:g} s")
    raise ChatError(f"the process of the model's chat template ended with status {process.returncode}")


def _stop(processes: "list[subprocess.Popen[str]]") -> None:
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # which ends it
        process.wait()
        process.stdout.close()


def _spelling(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None
