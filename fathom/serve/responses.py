"""POST /v1/responses, stateless: OpenAI's Responses protocol, translated to a chat completion and back.

Nothing is stored, so a request carries the whole conversation, and what would need a stored response is refused by
name. The answer's items are the input of the next request as they are.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError, model_validator

from fathom.serve.errors import invalid_body
from fathom.serve.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Body,
    ChatRequest,
    Count,
    Name,
    Sampling,
    Text,
    refuse_media,
)
from fathom.serve.response import Plan
from fathom.serve.responses_output import ResponsesTranslation
from fathom.serve.service import Service

_NOT_STORED = "responses are not stored here: send the whole conversation as input"

_Id = Annotated[str, StringConstraints(max_length=128)]


class ContentPart(Body):
    """Of a message, or of an earlier answer's reasoning."""

    ignored = frozenset(("annotations", "logprobs", "prompt_cache_breakpoint"))
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"] = "input_text"
    text: Text = ""
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return refuse_media(value)


_Parts = Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class InputItem(Body):
    """A message, a call or its result, or the reasoning before an answer."""

    ignored = frozenset(
        ("id", "status", "encrypted_content", "phase", "namespace", "created_by", "internal_chat_message")
    )
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | _Parts | None = None
    summary: _Parts | None = None
    call_id: _Id | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Text | _Parts | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "item_reference":
            raise ValueError(f"an item_reference is given, but {_NOT_STORED}")
        return refuse_media(value)

    @model_validator(mode="after")
    def _complete(self) -> "InputItem":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type, ()):
            # An empty list of parts is as good as no content.
            if getattr(self, name) is None and name not in ("content", "output"):
                raise ValueError(f"{name} is missing in a {self.type}")
        return self


class FunctionTool(Body):
    """A function; no other tools can be run here."""

    ignored = frozenset(("defer_loading", "output_schema"))
    type: Literal["function"]
    name: Name
    description: Annotated[str, StringConstraints(max_length=16384)] | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ChosenTool(Body):
    type: Literal["function"]
    name: Name


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Name = "answer"
    description: Annotated[str, StringConstraints(max_length=16384)] | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    ignored = frozenset(("verbosity",))
    format: TextFormat | None = None


class ReasoningOptions(Body):
    ignored = frozenset(("summary", "generate_summary", "context", "mode"))
    effort: Annotated[str, StringConstraints(max_length=64)] | None = None


class ResponseStreamOptions(Body):
    ignored = frozenset(("include_obfuscation",))


class ResponsesRequest(Sampling):
    """POST /v1/responses"""

    ignored = Sampling.ignored | {"max_tool_calls", "include"}

    input: Text | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    top_logprobs: Literal[0] = 0
    truncation: Literal["disabled"] = "disabled"
    chat_template_kwargs: dict[str, JsonValue] = Field({}, description="Only names that the template reads.")
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    background: Literal[False] = False
    n: Literal[1] = 1  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _stateless(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in ("previous_response_id", "conversation", "prompt"):
                if value.get(name) is not None:
                    raise ValueError(f"{name} is given, but {_NOT_STORED}")
            more = sorted({*map(str, value.get("include") or [])} - {"reasoning.encrypted_content"})
            if more:
                raise ValueError(f"include has {more[0][:80]!r}, which responses do not have here")
            if value.get("background"):
                raise ValueError(f"background is true, but {_NOT_STORED}, and stream the answer")
        return value

    def settings(self) -> dict[str, Any]:
        """As the response repeats them."""
        choice, text = self.tool_choice, self.text.model_dump(by_alias=True, exclude_none=True)
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning": {"effort": self.reasoning.effort, "summary": None},
            "temperature": self.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, ChosenTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or []],
            "top_p": self.top_p,
        }

    def chat(self) -> ChatRequest:
        """The same as a chat completion. Raises ApiError."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _messages(self.input)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or []]
        choice: Any = self.tool_choice
        if isinstance(choice, ChosenTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        own = {"input", "instructions", "max_output_tokens", "text", "reasoning", "truncation", "background"}
        shared = self.model_dump(exclude=own | {"tools", "tool_choice", "stream_options", "top_logprobs"})
        format_ = self.text.format
        wanted = None
        if format_ is not None:
            schema = {"name": format_.name, "schema": format_.schema_} if format_.type == "json_schema" else None
            wanted = {"type": format_.type, "json_schema": schema}
        body = shared | {
            "messages": system + items,
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools,
            "tool_choice": choice,
            "reasoning_effort": self.reasoning.effort,
            "response_format": wanted,
            "stream_options": {"include_usage": True} if self.stream else None,
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise invalid_body(error) from error


def plan_responses(service: Service, body: ResponsesRequest) -> Plan:
    """Raises ApiError for requests that cannot be served."""
    plan = service.plan_chat(body.chat())
    plan.translation = ResponsesTranslation(body.settings() | {"model": service.name})
    return plan


def _text_of(content: str | list[ContentPart] | None) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


def _messages(items: list[InputItem]) -> list[dict[str, Any]]:
    """As chat completions have them: reasoning, text and calls of one answer are one message."""
    messages: list[dict[str, Any]] = []

    def answer(fits: bool) -> dict[str, Any]:
        if not (messages and messages[-1]["role"] == "assistant" and fits):
            messages.append({"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": []})
        return messages[-1]

    for item in items:
        last = messages[-1] if messages else {}
        if item.type == "reasoning":
            reasoning = _text_of(item.content) or _text_of(item.summary)
            if reasoning:
                answer(fits=not last.get("content") and not last.get("tool_calls"))["reasoning_content"] = reasoning
        elif item.type == "function_call":
            function = {"name": item.name, "arguments": item.arguments}
            answer(fits=True)["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
        elif item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text_of(item.output)})
        elif item.role == "assistant":
            fits = last.get("content") is None and not last.get("tool_calls")
            answer(fits)["content"] = _text_of(item.content)
        else:
            messages.append({"role": item.role, "content": _text_of(item.content)})
    return messages
