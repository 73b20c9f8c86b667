"""The output of POST /v1/messages: a chat completion, whole or in chunks, as content blocks and their events."""

import json
import secrets
from typing import Any

from fathom.serve.errors import ApiError

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesTranslation:
    """Of one response: a response.Translation."""

    def __init__(self, model: str) -> None:
        self._frame: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._begun = False
        self._blocks = 0
        self._kind: str | None = None
        """Of the block that is being sent."""
        self._stop: dict[str, Any] = {}

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """As response.Translation.whole."""
        [choice] = completion["choices"]
        message = choice["message"]
        content: list[dict[str, Any]] = []
        if message.get("reasoning_content"):
            content.append(_block("thinking") | {"thinking": message["reasoning_content"]})
        if message["content"]:
            content.append(_block("text") | {"text": message["content"]})
        for call in message.get("tool_calls", []):
            function = call["function"]
            content.append(_call(call["id"], function["name"]) | {"input": _arguments(function["arguments"])})
        return self._frame | {"content": content, **_stopped(choice), "usage": _usage(completion["usage"])}

    def events(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """As response.Translation.events."""
        events: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            events.append({"type": "message_start", "message": self._frame | {"usage": _usage(chunk["usage"])}})
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("reasoning_content"):
                events += self._grow("thinking", "thinking_delta", delta["reasoning_content"])
            if delta.get("content"):
                events += self._grow("text", "text_delta", delta["content"])
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    events += self._open("tool_use", _call(call["id"], call["function"]["name"]))
                elif call["function"]["arguments"]:
                    events.append(self._delta("input_json_delta", "partial_json", call["function"]["arguments"]))
            if choice["finish_reason"] is not None:
                self._stop = _stopped(choice)
        if not chunk["choices"]:
            events += self._close()
            events.append({"type": "message_delta", "delta": self._stop, "usage": _usage(chunk["usage"])})
            events.append({"type": "message_stop"})
        return events

    def failure(self, error: ApiError) -> list[dict[str, Any]]:
        """As response.Translation.failure."""
        return [error.body()]

    def _grow(self, kind: str, delta: str, text: str) -> list[dict[str, Any]]:
        opened = [] if self._kind == kind else self._open(kind, _block(kind))
        return [*opened, self._delta(delta, kind, text)]

    def _delta(self, kind: str, name: str, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": {"type": kind, name: text}}

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        self._kind, self._blocks = kind, self._blocks + 1
        return [*events, {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}]

    def _close(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._kind == "thinking":
            events.append(self._delta("signature_delta", "signature", ""))
        if self._kind is not None:
            events.append({"type": "content_block_stop", "index": self._blocks - 1})
        self._kind = None
        return events


def _block(kind: str) -> dict[str, Any]:
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}}


def _arguments(text: str) -> Any:
    """The object; empty where max_tokens cut it off."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _stopped(choice: dict[str, Any]) -> dict[str, Any]:
    if isinstance(choice["stop_reason"], str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice["stop_reason"]}
    return {"stop_reason": _STOP_REASONS[choice["finish_reason"]], "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Anthropic counts the cached part of the prompt apart."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
    }
