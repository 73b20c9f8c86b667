"""Fields that clients send and that change no token are accepted; what would change the response is refused by name."""

from typing import Any, get_args

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
from pydantic import BaseModel, ValidationError

from fathom.serve.messages import CountTokensRequest, MessagesRequest
from fathom.serve.protocol import Body, ChatRequest, CompletionRequest, InfillRequest, Message
from fathom.serve.responses import ResponsesRequest

MESSAGES: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"prompt": "x"}


BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatRequest, CHAT),
    (CompletionRequest, COMPLETION),
    (InfillRequest, {}),
    (ResponsesRequest, {"input": "x"}),
    (MessagesRequest, MESSAGES),
    (CountTokensRequest, {"model": "m", "messages": MESSAGES["messages"]}),
]


@pytest.mark.parametrize(("model", "body"), BODIES, ids=[model.__name__ for model, _ in BODIES])
def test_null_and_the_empty_list_are_as_good_as_absent(model: type[Body], body: dict[str, Any]) -> None:
    plain = model.model_validate(body)
    optional = [name for name in model.model_fields if name not in body]
    assert len(optional) > 5
    for name in (*optional, *model.ignored, "functions", "audio"):
        for value in (None, []):
            assert model.model_validate(body | {name: value}) == plain, name
    for name in body:
        with pytest.raises(ValidationError, match=name):
            model.model_validate(body | {name: None})


def bodies_within(model: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """The models of all objects in a body."""
    waiting = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
            found.add(kind)
            bodies_within(kind, found)
        waiting += get_args(kind)
    return found


WITHIN = sorted(
    {inner for model, _ in BODIES for inner in bodies_within(model, set())}, key=lambda inner: inner.__qualname__
)
EXAMPLES: dict[str, Any] = {
    "text": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "1", "name": "f",
    "arguments": "{}", "role": "user", "content": "x", "schema": {}, "input_schema": {},
}  # fmt: skip
TYPES = {
    "TextPart": "text", "TextBlock": "text", "ContentBlock": "text", "ContentPart": "text", "InputItem": "message",
    "ResponseFormat": "text", "TextFormat": "text", "InputTool": "custom", "InputToolChoice": "auto",
    "Thinking": "disabled", "JsonFormat": "json_schema",
}  # fmt: skip


@pytest.mark.parametrize("model", WITHIN, ids=lambda model: model.__name__)
def test_null_is_as_good_as_absent_in_every_object_of_a_body(model: type[BaseModel]) -> None:
    names = {field.alias or name: field for name, field in model.model_fields.items()}
    body = {name: EXAMPLES[name] for name, field in names.items() if field.is_required()}
    if "type" in body or model.__name__ == "InputItem":
        body["type"] = TYPES.get(model.__name__, "function")
    if model.__name__ in ("Tool", "ToolChoice"):
        body["function"] = {"name": "f"}
    if model.__name__ in ("Message", "InputItem"):
        body |= {"role": "user", "content": "x"}
    plain = model.model_validate(body)
    for name in names.keys() - body.keys():
        assert model.model_validate(body | {name: None}) == plain, name


NEUTRAL: dict[str, list[Any]] = {
    "store": [True, False],
    "metadata": [{"a": "b"}],
    "user": ["u"],
    "service_tier": ["auto"],
    "safety_identifier": ["s"],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["24h"],
    "prediction": [{"type": "content", "content": "x"}],
    "verbosity": ["low"],
    "top_k": [-1, 0],
    "best_of": [1],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "skip_special_tokens": [True],
    "include_stop_str_in_output": [False],
    "priority": [0],
    "stream_options": [],
    "logit_bias": [{}],
}
IN_CHAT = {
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "add_generation_prompt": [True],
    "echo": [False],
    "function_call": ["none", "auto"],
    "tool_choice": ["none", "auto"],
    "reasoning_effort": ["low"],
    "top_logprobs": [0],
    "chat_template_kwargs": [{}],
}


@pytest.mark.parametrize("name", NEUTRAL | IN_CHAT)
def test_neutral_values_are_accepted_and_change_nothing_else(name: str) -> None:
    requests = [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)] if name in NEUTRAL else [(ChatRequest, CHAT)]
    for model, body in requests:
        plain = model.model_validate(body).model_dump(exclude={name})
        for value in (NEUTRAL | IN_CHAT)[name]:
            assert model.model_validate(body | {name: value}).model_dump(exclude={name}) == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("use_beam_search", True),
        ("length_penalty", 2),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("priority", 1),
        ("top_k", -2),
        ("modalities", ["text", "audio"]),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("echo", True),
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("guided_json", {"type": "object"}),
        ("web_search_options", {}),
        ("tool_choice", "required"),
    ],
)
def test_what_would_change_the_response_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        ChatRequest.model_validate(CHAT | {name: value})


def test_an_answer_is_the_history_of_the_next_request() -> None:
    """With every field that the openai client's `model_dump()` has, as vLLM's answers have them, and as streams do."""
    nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    said = Message.model_validate({"role": "assistant", "content": "yes", **nothing, "reasoning_content": None})
    assert said.plain() == {"role": "assistant", "content": "yes"}
    said = Message.model_validate({"role": "assistant", "content": "yes", "tool_calls": [], "reasoning": "because"})
    assert said.plain() == {"role": "assistant", "content": "yes", "reasoning_content": "because"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}]})
    assert said.plain() == {"role": "assistant", "content": None, "tool_calls": [call]}
    parts = [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}]
    result = Message.model_validate({"role": "tool", "tool_call_id": "1", "content": parts})
    assert result.plain() == {"role": "tool", "content": "34", "tool_call_id": "1"}
    for refused in ({"role": "user", "content": None}, {"role": "assistant", "content": None, "tool_calls": []}):
        with pytest.raises(ValidationError, match="content"):
            Message.model_validate(refused)
