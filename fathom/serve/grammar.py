"""Structured output by llguidance: JSON, JSON of a schema, and tool calls.

The matcher follows the output token by token and computes a mask of the tokens allowed next. With drafts it advances
over them for one mask each, and is rolled back.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from fathom.data.tokenizer import Tokenizer

_WHITESPACE = r"\n?[ \t]{0,16}"
"""Between the parts of a JSON text. Without a bound a weak model generates blanks forever."""


class GrammarError(ValueError):
    """A schema that cannot be compiled or enforced."""


class Grammars:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: the model's; may exceed the tokenizer's."""
        content = json.loads(tokenizer.tokenizer_json)
        for token in content["added_tokens"]:
            token["special"] = True  # no grammar may produce a control token
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(json.dumps(content), n_vocab=vocab_size, eos_token=tokenizer.eos_id)

    def of_schema(self, schema: dict[str, Any] | bool) -> str:
        """The grammar of JSON texts that match a JSON schema. Raises GrammarError for what cannot be compiled."""
        spaced = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE})
        return self._checked(spaced)

    def of_calls(self, tools: Sequence[dict[str, Any]], or_text: bool) -> str:
        """The grammar of a call of one of `tools`: {"name": …, "arguments": {…}}; or, if so, of any text instead.

        A text differs from a call in its first character: it does not start with a brace.
        """
        calls = {"anyOf": [_call_schema(tool["function"]) for tool in tools]}
        if not or_text:
            return self.of_schema(calls)
        lark = f"start: call | text\ncall: %json {json.dumps(calls)}\ntext: /([^{{](.|\\n)*)?/"
        return self._checked(LLMatcher.grammar_from_lark(lark))

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """A new matcher of a grammar that was compiled here."""
        return GrammarConstraint(LLMatcher(self._tokenizer, grammar), self._vocab_size)

    def _checked(self, grammar: str) -> str:
        error = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if error:
            raise GrammarError(" ".join(error.split())[:300])
        return grammar


class GrammarConstraint:
    """Follows one output; a choose.Constraint."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._words = (vocab_size + 31) // 32

    def allowed(self, drafts: Sequence[int]) -> Tensor:
        """As choose.Constraint.allowed."""
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
        bits_TW32 = (rows_TW[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
        return bits_TW32.flatten(1)[:, : self._vocab_size].bool()

    def take(self, tokens: Sequence[int]) -> None:
        """As choose.Constraint.take."""
        for token in tokens:
            # An end token that came after a complete text has stopped the matcher; it takes no more.
            if self._matcher.is_stopped():
                return
            self._matcher.consume_token(token)
        self._raise()

    def _raise(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the output left the grammar: {self._matcher.get_error()}"[:300])


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
