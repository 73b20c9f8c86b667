"""Everything in a request body has a limit: the largest value passes, one more is refused, and quickly."""

import json
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
from pydantic import BaseModel, ValidationError

from fathom.serve import protocol, schema_limits
from fathom.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MESSAGE = {"role": "user", "content": "x"}


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(depth: int) -> Any:
    return {} if depth == 1 else {"items": nested(depth - 1)}


def completion(**changes: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return CompletionRequest, {"prompt": "x"} | changes


def chat(**changes: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return ChatRequest, {"messages": [MESSAGE]} | changes


def schema(content: dict[str, Any]) -> tuple[type[BaseModel], dict[str, Any]]:
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": content}})


LIMITS: dict[str, Any] = {
    "n": (protocol.MAX_CHOICES, lambda most: completion(n=most)),
    "logprobs": (protocol.MAX_LOGPROBS, lambda most: completion(logprobs=most)),
    "top_logprobs": (protocol.MAX_LOGPROBS, lambda most: chat(logprobs=True, top_logprobs=most)),
    "stops": (protocol.MAX_STOPS, lambda most: completion(stop=["a"] * most)),
    "stop's length": (protocol.MAX_STOP_CHARS, lambda most: completion(stop="a" * most)),
    "stop ids": (protocol.MAX_STOPS, lambda most: completion(stop_token_ids=[1] * most)),
    "biases": (protocol.MAX_BIASES, lambda most: completion(logit_bias={str(token): 1 for token in range(most)})),
    "prompts": (protocol.MAX_PROMPTS, lambda most: completion(prompt=["a"] * most)),
    "prompts of ids": (protocol.MAX_PROMPTS, lambda most: completion(prompt=[[1]] * most)),
    "a prompt's ids": (protocol.MAX_PROMPT_TOKENS, lambda most: completion(prompt=[1] * most)),
    "a prompt's text": (protocol.MAX_TEXT_CHARS, lambda most: completion(prompt="a" * most)),
    "messages": (protocol.MAX_MESSAGES, lambda most: chat(messages=[MESSAGE] * most)),
    "parts": (
        protocol.MAX_PARTS,
        lambda most: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * most}]),
    ),
    "tools": (protocol.MAX_TOOLS, lambda most: chat(tools=[tool()] * most)),
    "a schema's depth": (schema_limits.MAX_SCHEMA_DEPTH, lambda most: schema(nested(most))),
    "a tool's depth": (schema_limits.MAX_SCHEMA_DEPTH, lambda most: chat(tools=[tool(**nested(most))])),
    "a schema's size": (schema_limits.MAX_SCHEMA_CHARS, lambda most: schema({"description": "a" * (most - 12)})),
    "a pattern": (schema_limits.MAX_PATTERN_CHARS, lambda most: schema({"pattern": "a" * most})),
    "a property's pattern": (
        schema_limits.MAX_PATTERN_CHARS,
        lambda most: schema({"patternProperties": {"a" * most: {"type": "string"}}}),
    ),
    "detokenized ids": (protocol.MAX_PROMPT_TOKENS, lambda most: (DetokenizeRequest, {"tokens": [1] * most})),
    "tokenized text": (protocol.MAX_TEXT_CHARS, lambda most: (TokenizeRequest, {"prompt": "a" * most})),
    "seed": (2**63 - 1, lambda most: completion(seed=most)),
    "max_tokens": (2**31 - 1, lambda most: completion(max_tokens=most)),
    "a token id": (2**31 - 1, lambda most: completion(prompt=[most])),
    "top_k": (2**31 - 1, lambda most: completion(top_k=most)),
    "temperature": (2, lambda most: completion(temperature=most)),
    "top_p": (1, lambda most: completion(top_p=most)),
    "min_p": (1, lambda most: completion(min_p=most)),
    "a bias": (100, lambda most: completion(logit_bias={"1": most})),
    "presence_penalty": (2, lambda most: completion(presence_penalty=most)),
    "frequency_penalty": (2, lambda most: completion(frequency_penalty=most)),
    "repetition_penalty": (10, lambda most: completion(repetition_penalty=most)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_exact(name: str) -> None:
    most, body = LIMITS[name]
    model, within = body(most)
    model.model_validate(within)
    model, beyond = body(most + 1)
    with pytest.raises(ValidationError):
        model.model_validate(beyond)


@pytest.mark.parametrize("field", ["n", "top_k", "seed", "max_tokens", "logprobs", "min_tokens"])
@pytest.mark.parametrize("value", [-(2**70), 2**70, 1.5, "1", True, [1], {}, float("nan"), float("inf")])
def test_integers_are_strict_and_bounded(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": "x", field: value})


MANY = 300_000
MISTAKES: dict[str, tuple[type[BaseModel], Any]] = {
    "numbers that are no ids": completion(prompt=[0.5] * MANY),
    "empty prompts": completion(prompt=[[]] * MANY),
    "ids that are texts": completion(prompt=[["a"] * MANY]),
    "parts of messages": chat(messages=[{"role": "user", "content": [1] * 250}] * (MANY // 250)),
    "biases": completion(logit_bias={str(token): "x" for token in range(MANY)}),
    "unknown fields": completion(**{f"unknown{number}": 1 for number in range(MANY)}),
    "unknown fields below": chat(messages=[MESSAGE | {f"unknown{number}": 1 for number in range(MANY)}]),
    "no ids": (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    "no body": (ChatRequest, [1] * MANY),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_many_errors_give_few_messages(name: str) -> None:
    """A message for each of them would take minutes and gigabytes."""
    model, body = MISTAKES[name]
    body = json.loads(json.dumps(body))
    began = time.process_time()
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() < 10
    assert time.process_time() - began < 0.5
