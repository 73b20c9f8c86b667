"""Structured output by llguidance: JSON, JSON of a schema, and tool calls.

The matcher follows the output token by token and computes a mask of the tokens allowed next. With drafts it advances
over them for one mask each, and is rolled back. Masks are computed between the engine's steps, where all other requests
wait, so that a request has a budget for them.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from fathom.data.tokenizer import Tokenizer
from fathom.serve.output_format import END_THINK, THINK, CallFormat, Reasoning

_WHITESPACE = r"\n?[ \t]{0,16}"
"""Between the parts of a JSON text. Without a bound a weak model generates blanks forever."""

_FREE = r"/(.|\n)*/"
"""Any text without control tokens."""

_SECONDS_PER_MASK, _RESERVE_SECONDS = 0.002, 0.1
"""Budget of a request: what its masks may take on average, ten times what usual ones do, and by how much exceed."""

_FIRST_SECONDS = 2.0
"""Budget of the first mask, which is computed before the engine has the request."""

_LIMITS = LLParserLimits(step_lexer_fuel=100_000, verbose_errors=False)
"""Of llguidance, for one mask: some ten milliseconds."""


class GrammarError(ValueError):
    """A schema that cannot be compiled or enforced, or only too slowly."""


class Grammars:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: the model's; may exceed the tokenizer's."""
        content = json.loads(tokenizer.tokenizer_json)
        for token in content["added_tokens"]:
            token["special"] = True  # no grammar may produce a control token
        self._tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(json.dumps(content), n_vocab=vocab_size, eos_token=tokenizer.eos_id)

    def of_schema(self, schema: dict[str, Any] | bool, reasoning: Reasoning = "none") -> str:
        """The grammar of JSON texts that match a JSON schema, behind the reasoning."""
        if reasoning == "none":
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE})
        return self._behind_reasoning([f"answer: {_json(schema)}"], reasoning)

    def of_calls(
        self,
        format_: CallFormat,
        tools: Sequence[dict[str, Any]],
        or_text: bool,
        several: bool = True,
        reasoning: Reasoning = "none",
    ) -> str:
        """The grammar of calls of `tools`, spelled as the model does, behind the reasoning.

        `or_text`: a text may come before them or instead. `several`: not one call alone.
        """
        functions = [tool["function"] for tool in tools]
        rules = [f"function: {' | '.join(f'function_{number}' for number in range(len(functions)))}"]
        for number, function in enumerate(functions):
            name = self._spelled(format_.before_name + function["name"])
            counted = " /:[0-9]{1,4}/" if format_.numbered else ""
            arguments = _json(function.get("parameters") or {"type": "object"})
            rules.append(f"function_{number}: {name}{counted} {self._spelled(format_.before_arguments)} {arguments}")
        rules.append(f"call: {self._spelled(format_.call_begin)} function {self._spelled(format_.call_end)}")
        more = f" ({self._spelled(format_.between)} call)*" if several and not format_.single else ""
        rules.append(f"calls: {self._spelled(format_.begin)} call{more} {self._spelled(format_.end)}")
        if not or_text:
            answer = ["answer: calls"]
        elif format_.single:  # a text differs from a call in its first character: it does not start with a brace
            answer = ["answer: calls | text", "text: /\\s*([^{\\s](.|\\n)*)?/"]
        else:
            answer = ["answer: text calls?", f"text: {_FREE}"]
        return self._behind_reasoning([*answer, *rules], reasoning)

    def _behind_reasoning(self, rules: Sequence[str], reasoning: Reasoning) -> str:
        """The grammar of the rule `answer`, and of the reasoning in front of it."""
        if reasoning == "none":
            return LLMatcher.grammar_from_lark("\n".join(["start: answer", *rules]))
        thinking = "thought blanks answer"
        start = thinking if reasoning == "begun" else f"answer | blanks {self._spelled(THINK)} {thinking}"
        end = self._tokens.get(END_THINK)
        thought = (
            [f"thought[suffix={json.dumps(END_THINK)}]: {_FREE}"]
            if end is None
            else [f"thought: unspoken <[{end}]>", f"unspoken: {_FREE}"]
        )
        return LLMatcher.grammar_from_lark(
            "\n".join([f"start: {start}", *rules, *thought, "blanks: /[ \\t\\n]{0,16}/"])
        )

    def _spelled(self, text: str) -> str:
        """A text in a grammar: tokens that the vocabulary has for it, and texts."""
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(self._tokens, key=len, reverse=True))) or '(?!)'})", text)
        each = [
            f"<[{self._tokens[piece]}]>" if piece in self._tokens else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        ]
        return " ".join(each)

    def constraints(self, grammar: str, count: int = 1) -> list["GrammarConstraint"]:
        """For the choices of one request: compiled, and with the first mask, once for all of them.

        Raises GrammarError where that is not possible. May take long: not for the engine's thread.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        first_TO = GrammarConstraint(matcher, self._vocab_size, _Budget(_FIRST_SECONDS)).allowed([])
        if not first_TO.any():
            raise GrammarError("nothing matches it")
        matchers, budget = [matcher, *(matcher.deep_copy() for _ in range(count - 1))], _Budget(_RESERVE_SECONDS)
        return [GrammarConstraint(each, self._vocab_size, budget, first_TO) for each in matchers]


class _Budget:
    """Processor time that the masks of one request may still take."""

    def __init__(self, reserve: float) -> None:
        self._left = self._reserve = reserve

    def spend(self, seconds: float) -> None:
        self._left += _SECONDS_PER_MASK - seconds
        if self._left < 0:
            raise GrammarError("following it takes too long")
        self._left = min(self._left, self._reserve)


class GrammarConstraint:
    """Follows one output; a verify.Constraint."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, budget: _Budget, first_TO: Tensor | None = None) -> None:
        """`first_TO`: what `allowed([])` returns until a token has been taken, if it is known."""
        self._matcher, self._vocab_size = matcher, vocab_size
        self._words = (vocab_size + 31) // 32
        self._budget, self._first_TO = budget, first_TO

    def allowed(self, drafts: Sequence[int]) -> Tensor:
        """As verify.Constraint.allowed."""
        if self._first_TO is not None and not drafts:
            return self._first_TO
        began = time.thread_time()
        rows_TW = torch.zeros(len(drafts) + 1, self._words, dtype=torch.int32)
        tried = 0
        for place in range(len(drafts) + 1):
            row_W = rows_TW[place]
            self._matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), row_W.numel() * 4)
            if place == len(drafts) or self._matcher.try_consume_tokens([drafts[place]]) == 0:
                break
            tried += 1
        if tried:
            self._matcher.rollback(tried)
        self._raise()
        self._budget.spend(time.thread_time() - began)
        bits_TW32 = (rows_TW[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
        return bits_TW32.flatten(1)[:, : self._vocab_size].bool()

    def take(self, tokens: Sequence[int]) -> None:
        """As verify.Constraint.take."""
        self._first_TO = None
        for token in tokens:
            # An end token that came after a complete text has stopped the matcher; it takes no more.
            if self._matcher.is_stopped():
                return
            self._matcher.consume_token(token)
        self._raise()

    def _raise(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(" ".join(self._matcher.get_error().split())[:300])


def _json(schema: dict[str, Any] | bool) -> str:
    schema = {"type": "object"} if schema is True else {"not": {}} if schema is False else schema
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _WHITESPACE}})}"
