"""Other people's clients against a running server: each is installed by `make clients`, and skipped where it is not.

The models have random weights, a template that shows tools as Kimi-K2's or R1's does, and the tokens of its calls, so
that what is sampled under `tool_choice` "required" is the model's own format.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("llguidance", reason="the server needs llguidance")
from tests.serve.native_templates import TEMPLATES, TOKENS
from tests.serve.random_model import save_random_model
from tests.serve.running import Running, running

pytestmark = [pytest.mark.oracle, pytest.mark.nightly]

KEY = "key-1"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


def start(name: str, folder: Path) -> AbstractContextManager[Running]:
    model = save_random_model(folder / "model", template=TEMPLATES[name], added=TOKENS[name])
    return running(model, folder / "server.txt", "--dtype", "float32", "--name", "small", "--api-key", KEY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start("kimi", tmp_path_factory.mktemp("kimi")) as server:
        yield server


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its answers may begin with reasoning."""
    with start("v3", tmp_path_factory.mktemp("v3")) as server:
        yield server


def post(server: Running, path: str, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
    key = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
    return httpx.post(server.address + path, json=body, headers=key, timeout=60)


def greedy(server: Running, text: str, length: int) -> str:
    """By chat completions, which tests/serve/test_protocol.py compares with the engine."""
    messages = [{"role": "user", "content": text}]
    reply = post(server, "/v1/chat/completions", messages=messages, max_tokens=length, temperature=0)
    return reply.json()["choices"][0]["message"]["content"]


def long_answer(server: Running, length: int) -> tuple[str, str]:
    """A prompt whose greedy answer has no end before `length` tokens, and that answer."""
    for number in range(50):
        messages = [{"role": "user", "content": f"{number}?"}]
        reply = post(server, "/v1/chat/completions", messages=messages, max_tokens=length, temperature=0)
        [choice] = reply.json()["choices"]
        if choice["finish_reason"] == "length":
            return f"{number}?", choice["message"]["content"]
    raise AssertionError("all of them are short")


# --- anthropic -------------------------------------------------------------------------------------------------------


@pytest.fixture
def claude(server: Running) -> Any:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    return anthropic.Anthropic(base_url=server.address, api_key=KEY, max_retries=0)


def anthropic_event(event: dict[str, Any]) -> None:
    from anthropic.types import RawMessageStreamEvent
    from pydantic import TypeAdapter

    TypeAdapter(RawMessageStreamEvent).validate_python(event)


TALK = [{"role": "user", "content": "größer?"}]
CLAUDES_TOOLS = [{"name": "count", "description": "counts", "input_schema": PARAMETERS}]


def test_anthropic_messages(server: Running, claude: Any) -> None:
    """The same text whole, streamed and by chat completions; usage; a stop sequence."""
    prompt, text = long_answer(server, 24)
    messages = [{"role": "user", "content": prompt}]
    shared = {"model": "small", "max_tokens": 24, "messages": messages, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**shared)
    assert [block.text for block in whole.content] == [text] and whole.stop_reason == "max_tokens"
    with claude.messages.stream(**shared) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].text == text and streamed.stop_reason == "max_tokens"
    for usage in (whole.usage, streamed.usage):
        assert usage.output_tokens == 24 and usage.input_tokens + usage.cache_read_input_tokens > 3
    stop = text[4:6]
    ended = claude.messages.create(**shared, stop_sequences=[stop])
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in ended.content) == text[: text.index(stop)]


def test_anthropic_counts_tokens_as_they_are_used(claude: Any) -> None:
    body: dict[str, Any] = {"model": "small", "messages": TALK, "tools": CLAUDES_TOOLS, "system": "Be brief."}
    usage = claude.messages.create(**body, max_tokens=1).usage
    counted = claude.messages.count_tokens(**body).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert counted > claude.messages.count_tokens(model="small", messages=TALK).input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools(claude: Any, stream: bool) -> None:
    """Several calls in one answer, which is the history of the next request as it is."""
    most = 0
    single = {"type": "tool", "name": "count", "disable_parallel_tool_use": True}
    # The protocol has no seed: how many calls there are is by chance.
    for choice in (single, *[{"type": "any"}] * 20):
        if most > 1:
            break
        body: dict[str, Any] = {"model": "small", "max_tokens": 400, "tools": CLAUDES_TOOLS, "tool_choice": choice}
        if stream:
            with claude.messages.stream(**body, messages=TALK) as events:
                answer = events.get_final_message()
        else:
            answer = claude.messages.create(**body, messages=TALK)
        calls = [block for block in answer.content if block.type == "tool_use"]
        most = max(most, len(calls))
        assert answer.stop_reason in ("tool_use", "max_tokens")
        assert "disable_parallel_tool_use" not in choice or len(calls) == 1
        for call in calls[: -1 if answer.stop_reason == "max_tokens" else None]:
            assert call.name == "count" and 0 <= call.input["a"] <= 99
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "12"} for call in calls[:2]]
        content = [block.model_dump(exclude_none=True) for block in answer.content if block.type != "tool_use"]
        content += [call.model_dump() for call in calls[:2]]
        again = [*TALK, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        assert claude.messages.create(model="small", max_tokens=2, messages=again).usage.output_tokens == 2
    assert most > 1


def test_anthropic_events_are_as_its_types_say(thinking: Running) -> None:
    pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    body = {"model": "small", "max_tokens": 300, "messages": TALK, "stream": True, "tools": CLAUDES_TOOLS}
    raw = post(thinking, "/v1/messages", headers={"x-api-key": KEY}, **body, tool_choice={"type": "any"}).text
    pairs = [event.split("\n") for event in raw.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    for (name, _), event in zip(pairs, events, strict=True):
        assert name == f"event: {event['type']}"
        anthropic_event(event)
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert starts == list(range(len(starts))) == [e["index"] for e in events if e["type"] == "content_block_stop"]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text alone"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "type"),
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers"),
        ({"container": "c1"}, "container"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool_use_id"),
    ],
)
def test_anthropic_errors_name_what_is_wrong(server: Running, change: dict[str, Any], named: str) -> None:
    reply = post(server, "/v1/messages", **({"model": "small", "max_tokens": 2, "messages": TALK} | change))
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text
    assert reply.json()["type"] == "error"


def test_anthropics_key_has_a_header_of_its_own(server: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    wrong = anthropic.Anthropic(base_url=server.address, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model="small", max_tokens=2, messages=TALK)
    assert post(server, "/v1/messages", headers={}, model="small", max_tokens=2, messages=TALK).status_code == 401


# --- OpenAI's Responses ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)


RESPONSE_TOOLS = [{"type": "function", "name": "count", "parameters": PARAMETERS, "strict": True}]


def response_events(server: Running, **body: Any) -> list[dict[str, Any]]:
    """Each as the openai package's types have it."""
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    check = TypeAdapter(ResponseStreamEvent)
    raw = post(server, "/v1/responses", model="small", stream=True, **body).text
    events = []
    for pair in raw.strip().split("\n\n"):
        name, data = pair.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        check.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_responses_equal_chat_completions(server: Running, client: Any) -> None:
    from openai.types.responses import Response

    prompt, text = long_answer(server, 24)
    shared: dict[str, Any] = {"input": prompt, "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(model="small", **shared)
    assert whole.output_text == text and whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 24
    Response.model_validate(post(server, "/v1/responses", model="small", **shared).json(), strict=False)
    events = response_events(server, **shared)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text and events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text
    parts = [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "input_text", "text": "y"}]}]
    system = client.responses.create(model="small", input=parts, max_output_tokens=1)
    same = client.responses.create(model="small", input="y", instructions="x", max_output_tokens=1)
    assert system.usage.input_tokens == same.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_tools(client: Any, stream: bool) -> None:
    body: dict[str, Any] = {"model": "small", "input": "größer?", "tools": RESPONSE_TOOLS, "tool_choice": "required"}
    body |= {"parallel_tool_calls": False, "max_output_tokens": 400}
    if stream:
        with client.responses.stream(**body) as events:
            answer = events.get_final_response()
    else:
        answer = client.responses.create(**body)
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "count" and 0 <= json.loads(call.arguments)["a"] <= 99 and answer.status == "completed"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
    history = [{"role": "user", "content": "größer?"}, *answer.output, result]
    again = client.responses.create(model="small", input=history, tools=RESPONSE_TOOLS, max_output_tokens=2)
    assert again.usage.input_tokens > answer.usage.input_tokens


def test_response_events_of_reasoning_and_calls(thinking: Running) -> None:
    """By the types; every item that was added is done, and all of them are the response."""
    body: dict[str, Any] = {"input": "x", "tools": RESPONSE_TOOLS, "tool_choice": "required", "max_output_tokens": 300}
    kinds = set()
    for seed in range(4):
        events = response_events(thinking, **body, seed=seed)
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [item["id"] for item in done] == [item["id"] for item in events[-1]["response"]["output"]]
        kinds |= {item["type"] for item in done}
    assert kinds >= {"reasoning", "function_call"}


def test_parsed_responses(client: Any) -> None:
    from pydantic import BaseModel, Field

    class Sum(BaseModel):
        a: int = Field(ge=0, le=99)

    parsed = client.responses.parse(model="small", input="x", text_format=Sum, max_output_tokens=400)
    assert 0 <= parsed.output_parsed.a <= 99


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "text alone"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_responses_name_what_they_refuse(server: Running, change: dict[str, Any], named: str) -> None:
    reply = post(server, "/v1/responses", **({"model": "small", "input": "x"} | change))
    assert reply.status_code == 400 and named in reply.json()["error"]["message"], reply.text


def test_no_response_is_stored(client: Any) -> None:
    import openai

    answer = client.responses.create(model="small", input="x", store=True, max_output_tokens=1, metadata={"a": "b"})
    assert answer.store is False
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve(answer.id)


# --- Frameworks ------------------------------------------------------------------------------------------------------


def test_langchain_openai(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    text = greedy(server, "größer?", 16)
    for responses in (False, True):
        shared = {"model": "small", "base_url": f"{server.address}/v1", "api_key": KEY, "temperature": 0}
        model = langchain.ChatOpenAI(**shared, max_tokens=16, use_responses_api=responses)
        assert model.invoke("größer?").text == text
        assert "".join(chunk.text for chunk in model.stream("größer?")) == text
        tool = {"type": "function", "function": {"name": "count", "parameters": PARAMETERS}}
        caller = langchain.ChatOpenAI(**shared | {"temperature": 1}, max_tokens=400, use_responses_api=responses)
        answer = caller.bind_tools([tool], tool_choice="count", parallel_tool_calls=False).invoke("größer?")
        assert [call["name"] for call in answer.tool_calls] == ["count"] and 0 <= answer.tool_calls[0]["args"][
            "a"
        ] <= 99


def test_langchain_anthropic(server: Running) -> None:
    langchain = pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
    model = langchain.ChatAnthropic(model="small", base_url=server.address, api_key=KEY, max_tokens=300)
    assert model.invoke("größer?").usage_metadata["output_tokens"] > 0
    tool = {"name": "count", "description": "counts", "input_schema": PARAMETERS}
    answer = model.bind_tools([tool], tool_choice="any", parallel_tool_calls=False).invoke("größer?")
    assert [call["name"] for call in answer.tool_calls] == ["count"]


def test_litellm(server: Running) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    text, shared = greedy(server, "größer?", 16), {"messages": TALK, "api_key": KEY, "max_tokens": 16}
    whole = litellm.completion("openai/small", api_base=f"{server.address}/v1", temperature=0, **shared)
    assert whole.choices[0].message.content == text
    chunks = litellm.completion("openai/small", api_base=f"{server.address}/v1", temperature=0, stream=True, **shared)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    other = litellm.completion("anthropic/small", api_base=server.address, temperature=0, **shared)
    assert other.choices[0].message.content == text


def test_llm(server: Running, tmp_path: Path) -> None:
    """Simon Willison's command line, with the model in its configuration."""
    pytest.importorskip("llm", reason="llm is not installed")
    entry = f"- model_id: fathom\n  model_name: small\n  api_base: {server.address}/v1\n  api_key_name: fathom\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    (tmp_path / "keys.json").write_text(json.dumps({"fathom": KEY}))
    words = ["-m", "llm", "-m", "fathom", "größer?", "-o", "max_tokens", "16", "-o", "temperature", "0"]
    for extra in ([], ["--no-stream"]):
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *words, *extra], env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().rstrip("\n") == greedy(server, "größer?", 16).rstrip("\n")


def test_instructor(client: Any) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    from pydantic import BaseModel, Field

    class Sum(BaseModel):
        a: int = Field(ge=0, le=99)

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="small", messages=TALK, response_model=Sum, max_tokens=400, max_retries=0, parallel_tool_calls=False
        )
        assert 0 <= made.a <= 99


@pytest.mark.parametrize("protocol", ["chat", "responses"])
def test_pydantic_ai(server: Running, protocol: str) -> None:
    pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    from pydantic import BaseModel, Field
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Sum(BaseModel):
        a: int = Field(ge=0, le=99)

    kind = OpenAIChatModel if protocol == "chat" else OpenAIResponsesModel
    model: Any = kind("small", provider=OpenAIProvider(base_url=f"{server.address}/v1", api_key=KEY))
    settings = {"max_tokens": 400, "parallel_tool_calls": False}
    agent = Agent(model, output_type=Sum, retries=0, model_settings=settings)  # type: ignore[arg-type]
    assert 0 <= asyncio.run(agent.run("größer?")).output.a <= 99


def test_openai_agents(server: Running) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    agents.set_tracing_disabled(True)
    called: list[int] = []

    @agents.function_tool
    def count(a: int) -> str:
        """Counts."""
        called.append(a)
        return "12"

    settings = agents.ModelSettings(tool_choice="required", max_tokens=400, parallel_tool_calls=False)
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        client = openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0)
        agent = agents.Agent(
            name="a",
            instructions="Count.",
            tools=[count],
            model=kind(model="small", openai_client=client),
            model_settings=settings,
            tool_use_behavior="stop_on_first_tool",
        )
        called.clear()
        assert asyncio.run(agents.Runner.run(agent, "größer?")).final_output == "12" and len(called) == 1
