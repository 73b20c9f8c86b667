"""Grammars: drafts are tried and taken back, and no schema that passes the limits can stall a step."""

import json
import random
import string
import time
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="the server needs llguidance")
pytest.importorskip("starlette", reason="the server needs starlette")
import torch

from fathom.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from fathom.serve.grammar import GrammarError, Grammars
from fathom.serve.schema_limits import check_schema
from tests.serve.random_model import CONFIG, TEXT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 40], CONFIG.vocab_size - 8)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, CONFIG.vocab_size)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["größer", "x"]}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_masks_of_drafts_do_not_advance_the_matcher(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    """With drafts each row says what a follower says that was given them for good; afterwards nothing has changed."""
    rng = random.Random(seed)
    grammar = grammars.of_schema(SCHEMA)
    ours, taken = grammars.constraints(grammar)[0], []
    while len(taken) < 60:
        plain, drafts, rows = grammars.constraints(grammar)[0], [], []
        plain.take(taken)
        for _ in range(rng.randint(0, 4)):
            rows.append(plain.allowed([])[0])
            drafts.append(rng.choice(rows[-1].nonzero()[:, 0].tolist()))
            plain.take(drafts[-1:])
            if tokenizer.eos_id in drafts:
                break
        found = ours.allowed(drafts)
        assert found.shape == (len(drafts) + 1, CONFIG.vocab_size)
        assert torch.equal(found[: len(drafts)], torch.stack(rows) if rows else found[:0])
        assert torch.equal(ours.allowed([])[0], found[0])
        choice = rng.choice(found[0].nonzero()[:, 0].tolist())
        taken.append(choice)
        ours.take([choice])
        if choice == tokenizer.eos_id:
            break
    assert tokenizer.eos_id not in taken or set(json.loads(tokenizer.decode(taken))) == {"a", "b"}


def test_no_grammar_allows_control_tokens_or_unused_ids(grammars: Grammars, tokenizer: Tokenizer) -> None:
    follower = grammars.constraints(grammars.of_schema({"type": "string"}))[0]
    follower.take(tokenizer.encode('"', bos=False))
    allowed = follower.allowed([])[0]
    assert allowed.sum() > 150
    assert not allowed[: len(SPECIAL_TOKENS)].any() and not allowed[tokenizer.vocab_size :].any()


COSTLY: dict[str, dict[str, Any]] = {
    "repetition of repetition": {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
    "many states": {"type": "string", "pattern": "^.*a.{0,200}b.{0,200}c.{0,200}$"},
    "exponential automaton": {"type": "string", "pattern": "^(.*a.{900})$"},
    "backtracking": {"type": "string", "pattern": "^(a|aa)+(b|bb)+(a*)*(a*)*.*a.{20}$"},
    "huge strings": {"type": "string", "maxLength": 10**9},
    "huge arrays": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}},
    "fine numbers": {"type": "number", "multipleOf": 1e-9, "minimum": 0, "maximum": 1e15},
    "endless references": {
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}},
        "$ref": "#/$defs/a",
    },
    "many words": {"enum": [f"v{number}" for number in range(5000)]},
    "intersections": {"allOf": [{"type": "string", "pattern": f"^.*{a}.*$"} for a in string.ascii_lowercase]},
    "many patterns": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string", "pattern": ".*a.{90}"} for number in range(500)},
    },
}


@pytest.mark.parametrize("name", COSTLY)
def test_complex_schemas_do_not_stall_a_step(grammars: Grammars, name: str) -> None:
    """They compile soon, cost little per step, or are given up with a reason. The clock is the processor's."""
    check_schema(COSTLY[name], name)
    rng, worst = random.Random(0), 0.0
    began = time.thread_time()
    try:
        follower = grammars.constraints(grammars.of_schema(COSTLY[name]))[0]
        assert time.thread_time() - began < 1.0
        for _ in range(100):
            began = time.thread_time()
            allowed = follower.allowed([])[0].nonzero()[:, 0].tolist()
            follower.take([rng.choice(allowed)])
            worst = max(worst, time.thread_time() - began)
    except GrammarError as error:
        assert str(error)
    assert worst < 0.2


def test_choices_share_a_compiled_grammar_and_a_budget(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Each follows its own text; together they do not stop the engine: one that costs too much is given up."""
    first, second = grammars.constraints(grammars.of_schema(SCHEMA), 2)
    brace = tokenizer.encode("{", bos=False)
    assert torch.equal(first.allowed([]), second.allowed([])) and first.allowed([])[0, brace].all()
    first.take(brace)
    assert not first.allowed([])[0, brace].any() and second.allowed([])[0, brace].all()
    pattern = {"type": "string", "pattern": "^((a|ab|b){1,60}c?){1,60}$"}
    followers, spent = grammars.constraints(grammars.of_schema(pattern), 16), 0.0
    steps = 0
    with pytest.raises(GrammarError):
        for token in tokenizer.encode('"' + "a" * 400, bos=False):
            for follower in followers:
                began = time.thread_time()
                follower.allowed([])
                spent += time.thread_time() - began
                follower.take([token])
            steps += 1
    assert spent < 0.2 + 0.002 * 16 * (steps + 1)
