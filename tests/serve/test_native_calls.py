"""Chats in the models' own formats through the openai client, and the prompts that their histories become."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fathom.data.chat_template import ChatTemplate
from fathom.data.tokenizer import load_tokenizer
from tests.serve.native_templates import TEMPLATES, TOKENS
from tests.serve.random_model import save_random_model
from tests.serve.running import Running, running

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("llguidance", reason="the server needs llguidance")
pytestmark = [pytest.mark.oracle, pytest.mark.slow]

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "count", "parameters": PARAMETERS}}]
TALK: Any = [{"role": "user", "content": "größer?"}]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Running]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_random_model(folder / "model", template=TEMPLATES[request.param], added=TOKENS[request.param])
    with running(model, folder / "server.txt", "--dtype", "float32", "--name", "small") as server:
        yield request.param, model, server


def client_of(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


@pytest.mark.nightly
def test_streams_add_up_to_several_calls(served: tuple[str, Path, Running]) -> None:
    """Whole and streamed the same, by a seed; names before arguments, arguments in pieces that are JSON together."""
    name, model, server = served
    tokenizer = load_tokenizer(model)
    several, pieces = 0, 0
    # Random weights hardly ever end reasoning by themselves.
    end = tokenizer.token_id("</think>")
    bias = {} if end is None else {str(end): 4}
    for seed in range(4):
        body: dict[str, Any] = {"model": "small", "messages": TALK, "tools": TOOLS, "tool_choice": "required"}
        body |= {"seed": seed, "max_tokens": 300, "logit_bias": bias}
        whole = client_of(server).chat.completions.create(**body).choices[0]
        calls: list[dict[str, str]] = []
        reasoning, content, reason = "", "", None
        for chunk in client_of(server).chat.completions.create(**body, stream=True):
            [choice] = chunk.choices
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(calls) and call.type == "function" and call.function.arguments == ""
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                else:
                    calls[call.index]["arguments"] += call.function.arguments
                    pieces += 1
        assert reason == whole.finish_reason
        assert content == (whole.message.content or "") and reasoning == (
            getattr(whole.message, "reasoning_content", None) or ""
        )
        expected = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or []]
        assert [(call["name"], call["arguments"]) for call in calls] == expected
        if reason == "tool_calls":
            assert calls and content == ""
            assert all(call["name"] == "count" and 0 <= json.loads(call["arguments"])["a"] <= 9 for call in calls)
            several = max(several, len(calls))
        if name == "kimi":
            assert all(call["id"].startswith("functions.count:") for call in calls)
    assert several > 1 and pieces > 0


def test_a_history_of_calls_is_rendered_in_the_models_format(served: tuple[str, Path, Running]) -> None:
    """The answer's own `model_dump()`, with results; the ids are those of the template."""
    name, model, server = served
    call = {"id": "functions.count:0", "type": "function", "function": {"name": "count", "arguments": '{"a": 1}'}}
    said = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [call, call | {"id": "functions.count:1"}],
    }
    history = [*TALK, said, {"role": "tool", "tool_call_id": "functions.count:0", "content": "12"}]
    reply = httpx.post(f"{server.address}/tokenize", json={"messages": history}, timeout=60).json()
    text = ChatTemplate(load_tokenizer(model)).render(history)
    ids = reply["tokens"]
    tokenizer = load_tokenizer(model)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    marks = [tokenizer.token_id(mark) for mark in TOKENS[name] if "call" in mark and "begin" in mark]
    assert marks and [ids.count(mark) for mark in marks if mark is not None][1:] == [2] * (len(marks) - 1)


def test_reasoning_is_apart_and_counted(served: tuple[str, Path, Running]) -> None:
    """Cut off, all of it is reasoning where the prompt has opened it, none where the prompt has closed it."""
    name, _, server = served
    body: dict[str, Any] = {"model": "small", "messages": TALK, "max_tokens": 12, "seed": 3}
    answer = client_of(server).chat.completions.create(**body)
    message, usage = answer.choices[0].message, answer.usage
    if name == "r1":
        assert message.content == "" and message.reasoning_content
        assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens
    else:
        assert message.content and usage.completion_tokens_details.reasoning_tokens == 0
    if name == "v3.1":
        body["extra_body"] = {"chat_template_kwargs": {"thinking": True}}
        assert client_of(server).chat.completions.create(**body).choices[0].message.reasoning_content
