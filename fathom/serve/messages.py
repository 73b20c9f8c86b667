"""POST /v1/messages, stateless: Anthropic's protocol, translated to a chat completion and back."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError, model_validator

from fathom.serve.errors import ApiError, invalid_body
from fathom.serve.messages_output import MessagesTranslation
from fathom.serve.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOOLS,
    Body,
    ChatRequest,
    Count,
    Name,
    Stop,
    Text,
    refuse_media,
)
from fathom.serve.response import Plan
from fathom.serve.service import Service

_Id = Annotated[str, StringConstraints(max_length=128)]
_Description = Annotated[str, StringConstraints(max_length=16384)]

_THINKING_NAMES = ("enable_thinking", "thinking")
"""What chat templates call the switch for reasoning."""


class TextBlock(Body):
    ignored = frozenset(("cache_control", "citations"))
    type: Literal["text"] = "text"
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return refuse_media(value)


_Blocks = Annotated[list[TextBlock], Field(fail_fast=True, max_length=MAX_PARTS)]


class ContentBlock(Body):
    """Of a message: text, reasoning, a call or its result. Also as an answer has them."""

    ignored = frozenset(("cache_control", "citations", "signature", "caller", "is_error", "data", "toolset"))
    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: Text = ""
    thinking: Text = ""
    id: _Id | None = None
    name: Name | None = None
    input: dict[str, JsonValue] = Field({})
    tool_use_id: _Id | None = None
    content: Text | _Blocks | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return refuse_media(value)

    @model_validator(mode="after")
    def _complete(self) -> "ContentBlock":
        for name in {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing in a {self.type}")
        return self


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[ContentBlock], Field(fail_fast=True, max_length=MAX_PARTS)]

    def chat(self) -> list[dict[str, Any]]:
        """As chat completions have it: results of calls are messages of their own, in front of the user's text."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results: list[dict[str, Any]] = []
        calls, texts, thoughts = [], [], []
        for block in self.content:
            if block.type == "tool_result":
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text_of(block.content)})
            elif block.type == "tool_use":
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = {"name": block.name, "arguments": arguments}
                calls.append({"id": block.id, "type": "function", "function": function})
            else:
                texts.append(block.text)
                thoughts.append(block.thinking)
        text, thought = "".join(texts), "".join(thoughts)
        content = text or None if calls or thought else text
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.role == "assistant":
            message |= {"tool_calls": calls, "reasoning_content": thought or None}
        return [*results, message] if text or not results else results


class InputTool(Body):
    """A function; no tool of the server's own can be run here."""

    ignored = frozenset(
        ("cache_control", "eager_input_streaming", "defer_loading", "allowed_callers", "input_examples")
    )
    type: Literal["custom"] = "custom"
    name: Name
    description: _Description | None = None
    input_schema: dict[str, JsonValue]
    strict: bool | None = None


class InputToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    ignored = frozenset(("display",))
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = Field(None, description="Accepted; max_tokens alone limits the answer.")


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(Body):
    ignored = frozenset(("task_budget",))
    effort: Annotated[str, StringConstraints(max_length=64)] | None = None
    format: JsonFormat | None = None


class Prompt(Body):
    """What both endpoints have in common."""

    ignored = frozenset(
        (
            "metadata",
            "service_tier",
            "cache_control",
            "inference_geo",
            "betas",
            "user_profile_id",
            "workspace_id",
            "speed",
        )
    )

    model: Annotated[str, StringConstraints(max_length=512)]
    messages: Annotated[list[InputMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    system: Text | _Blocks | None = None
    tools: Annotated[list[InputTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    chat_template_kwargs: dict[str, JsonValue] = Field({}, description="Only names that the template reads.")

    def chat(self, service: Service, **more: Any) -> ChatRequest:
        """The same as a chat completion. Raises ApiError."""
        messages = [{"role": "system", "content": _text_of(self.system)}] if self.system else []
        for message in self.messages:
            messages += message.chat()
        last = messages[-1]
        body = {
            "model": self.model,
            "messages": messages,
            "tools": [
                {
                    "type": "function",
                    "function": {**tool.model_dump(include=_FUNCTION), "parameters": tool.input_schema},
                }
                for tool in self.tools or []
            ],
            "tool_choice": self._choice(),
            "parallel_tool_calls": not (self.tool_choice and self.tool_choice.disable_parallel_tool_use),
            "reasoning_effort": self.output_config.effort,
            # As Anthropic documents it, an answer continues the final message where that is the assistant's.
            "continue_final_message": last["role"] == "assistant" and bool(last["content"]),
            "chat_template_kwargs": self._thinking(service) | self.chat_template_kwargs,
        }
        if self.output_config.format is not None:
            schema = {"name": "answer", "schema": self.output_config.format.schema_}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            return ChatRequest.model_validate(body | more)
        except ValidationError as error:
            raise invalid_body(error) from error

    def _choice(self) -> Any:
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return None if choice is None else choice.type
        if choice.type == "any":
            return "required"
        return {"type": "function", "function": {"name": choice.name or ""}}

    def _thinking(self, service: Service) -> dict[str, Any]:
        """What the template is given. Raises ApiError where it has to think and cannot."""
        known = service.template.variables if service.template is not None else frozenset()
        if self.thinking is None or self.thinking.type == "adaptive" or service.template is None:
            return {}
        if self.thinking.type == "enabled" and not service.format.thinks:
            raise ApiError(400, "thinking is enabled, but the model's chat template has no reasoning", "thinking")
        return {name: self.thinking.type == "enabled" for name in _THINKING_NAMES if name in known}


class MessagesRequest(Prompt):
    """POST /v1/messages"""

    max_tokens: Count
    stream: bool = False
    stop_sequences: Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] = Field([])
    temperature: float = Field(1.0, ge=0, le=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, strict=True)


class CountTokensRequest(Prompt):
    """POST /v1/messages/count_tokens"""

    ignored = Prompt.ignored | {"max_tokens", "stream", "stop_sequences", "temperature", "top_p", "top_k"}


def plan_messages(service: Service, body: MessagesRequest) -> Plan:
    """Raises ApiError for requests that cannot be served."""
    plan = service.plan_chat(
        body.chat(
            service,
            max_completion_tokens=body.max_tokens,
            stream=body.stream,
            stop=body.stop_sequences,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            # Anthropic's first event has the prompt's tokens.
            stream_options={"include_usage": True, "continuous_usage_stats": True} if body.stream else None,
        )
    )
    plan.translation = MessagesTranslation(service.name)
    return plan


def count_tokens(service: Service, body: CountTokensRequest) -> dict[str, int]:
    """The length of the prompt. Raises ApiError where the template refuses it."""
    return {"input_tokens": service.count_chat(body.chat(service))}


_FUNCTION = {"name", "description", "strict"}


def _text_of(content: str | list[TextBlock] | None) -> str:
    return content or "" if not isinstance(content, list) else "".join(block.text for block in content)
