"""Which format a template and its tokenizer have, and that what a grammar enforces is what the parser reads."""

import json
import random
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("llguidance", reason="the server needs llguidance")

from fathom.data.chat_template import ChatTemplate
from fathom.data.tokenizer import Tokenizer, train_tokenizer
from fathom.serve.grammar import Grammars
from fathom.serve.message_parser import MessageParser
from fathom.serve.output_format import DEEPSEEK_V3, DEEPSEEK_V31, JSON, KIMI_K2, TAGS, OutputFormat, Reasoning
from tests.serve.native_templates import TEMPLATES, TOKENS
from tests.serve.random_model import TEXT, with_tokens

FORMATS = {"v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "r1": DEEPSEEK_V3, "kimi": KIMI_K2, "tags": TAGS, "plain": JSON}
TAG_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def tokenizer(name: str, special: bool = False) -> Tokenizer:
    base = train_tokenizer([TEXT * 40], 380)
    if name == "plain":
        return base
    if name == "tags":
        return with_tokens(base, TAG_TEMPLATE, ["<tool_call>", "</tool_call>"], special)
    return with_tokens(base, TEMPLATES[name], TOKENS[name], special)


def output_format(name: str, special: bool = False) -> OutputFormat:
    tokens = tokenizer(name, special)
    return OutputFormat(ChatTemplate(tokens), tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_follows_from_the_template(name: str) -> None:
    found = output_format(name)
    assert found.calls == FORMATS[name]
    assert found.thinks == (name in ("v3", "v3.1", "r1"))


def test_a_template_whose_tokens_the_tokenizer_lacks_has_calls_in_json() -> None:
    tokens = with_tokens(train_tokenizer([TEXT * 40], 380), TEMPLATES["v3"], [])
    assert OutputFormat(ChatTemplate(tokens), tokens).calls == JSON


def test_reasoning_follows_from_the_prompt() -> None:
    talk = [{"role": "user", "content": "a <think> b"}]
    for name, variables, expected in [
        ("r1", {}, "begun"),
        ("v3", {}, "possible"),
        ("v3.1", {}, "none"),
        ("v3.1", {"thinking": True}, "begun"),
        ("kimi", {}, "none"),
    ]:
        tokens = tokenizer(name)
        template = ChatTemplate(tokens)
        ids = template.encode(talk, None, variables)
        assert OutputFormat(template, tokens).reasoning(ids, None) == expected
        if name == "v3":
            assert OutputFormat(template, tokens).reasoning(ids, "<think>because") == "begun"
            assert OutputFormat(template, tokens).reasoning(ids, "<think>because</think>so") == "none"
            assert OutputFormat(template, tokens, "none").reasoning(ids, None) == "none"
        if name == "kimi":
            assert OutputFormat(template, tokens, "think").reasoning(ids, None) == "possible"


def test_marks_are_spelled_also_where_they_are_special() -> None:
    for special in (False, True):
        found = output_format("v3", special)
        text = "<｜tool▁calls▁begin｜><think>"
        ids = [found.tokenizer.token_id(token) for token in TOKENS["v3"]]
        assert found.tokenizer.decode([ids[0], ids[-2], found.tokenizer.eos_id]) == text  # type: ignore[list-item]


PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["größer", "x]}</s>"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "count", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "add-2.x"}},
]


def drawn(tokens: Tokenizer, grammar: str, rng: random.Random, first: str, most: int = 400) -> list[int] | None:
    """Tokens at random that the grammar allows, up to EOS; None where there are too many. `first`: how they begin."""
    [constraint] = Grammars(tokens, 400).constraints(grammar)
    ids: list[int] = []
    for token in tokens.encode(first, bos=False):
        assert constraint.allowed([])[0, token]
        ids.append(token)
        constraint.take([token])
    while len(ids) < most:
        allowed = constraint.allowed([])[0].nonzero()[:, 0].tolist()
        weights = [40 if token in (tokens.eos_id,) or token >= 380 else 1 for token in allowed]
        [token] = rng.choices(allowed, weights)
        if token == tokens.eos_id:
            return ids
        ids.append(token)
        constraint.take([token])
    return None


@pytest.mark.parametrize("reasoning", ["none", "possible", "begun"])
@pytest.mark.parametrize("or_text", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_allows_is_read_as_calls(name: str, or_text: bool, reasoning: Reasoning) -> None:
    """Arguments match their schema; several calls, or, where only one is allowed, one."""
    found, rng, calls_seen = output_format(name), random.Random(0), set()
    tokens = found.tokenizer
    # By chance nobody spells the tag letter by letter.
    first = "hm</think>" if reasoning == "begun" and tokens.token_id("</think>") is None else ""
    for several in (True, False):
        grammar = Grammars(tokens, 400).of_calls(found.calls, TOOLS, or_text, several, reasoning)
        for _ in range(6):
            ids = drawn(tokens, grammar, rng, first)
            if ids is None:
                continue
            parts = MessageParser(found.calls, reasoning).feed(tokens.decode(ids), final=True)
            names = [part.text for part in parts if part.kind == "call"]
            calls_seen.add(len(names))
            assert {*names} <= {"count", "add-2.x"} and (or_text or names)
            assert several or len(names) <= 1
            for number, function in enumerate(names):
                text = "".join(part.text for part in parts if part.kind == "arguments" and part.call == number)
                value = json.loads(text)
                assert function != "count" or (type(value["a"]) is int and value["b"] in ("größer", "x]}</s>"))
            content = "".join(part.text for part in parts if part.kind == "content")
            assert or_text or not content
            assert not any(mark in content for mark in ("tool▁", "tool_call"))
    assert max(calls_seen, default=0) >= 1 or or_text


@pytest.mark.parametrize("name", ["v3", "plain"])
@pytest.mark.parametrize("reasoning", ["possible", "begun"])
def test_json_of_a_schema_behind_reasoning(name: str, reasoning: Reasoning) -> None:
    """By the token that ends reasoning where there is one, and by its spelling."""
    tokens, rng = tokenizer(name), random.Random(1)
    grammar = Grammars(tokens, 400).of_schema(PARAMETERS, reasoning)
    for first in ("hm</think>" if reasoning == "begun" else "<think>hm</think>\n", "")[: 1 + (reasoning == "possible")]:
        ids = next(ids for _ in range(50) if (ids := drawn(tokens, grammar, rng, first)) is not None)
        parts = MessageParser(None, reasoning).feed(tokens.decode(ids), final=True)
        value = json.loads("".join(part.text for part in parts if part.kind == "content"))
        assert set(value) == {"a", "b"}
        assert first == "" or "".join(part.text for part in parts if part.kind == "reasoning") == "hm"
