"""The output of POST /v1/responses: a chat completion, whole or in chunks, as items and their events."""

import itertools
import secrets
from typing import Any

from fathom.serve.errors import ApiError


class ResponsesTranslation:
    """Of one response: a response.Translation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings`: of the request, as the response repeats them."""
        self._numbers = itertools.count()
        self._items: list[dict[str, Any]] = []
        self._open = False
        """Whether the last item is not done."""
        self._usage: dict[str, Any] | None = None
        self._reason: str | None = None
        self._created: int | None = None
        self._frame = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": 0,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **settings,
        }

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """As response.Translation.whole."""
        [choice] = completion["choices"]
        message = choice["message"]
        self._frame["created_at"] = completion["created"]
        if message.get("reasoning_content"):
            self._items.append(_reasoning(message["reasoning_content"]))
        if message["content"] or not message.get("tool_calls"):
            self._items.append(_message(message["content"]))
        for call in message.get("tool_calls", []):
            self._items.append(_call(call["id"], call["function"]["name"], call["function"]["arguments"]))
        self._usage, self._reason = completion["usage"], choice["finish_reason"]
        extra = {"fathom": completion["fathom"]} if "fathom" in completion else {}
        return self._ended() | extra

    def events(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """As response.Translation.events."""
        events: list[dict[str, Any]] = []
        if self._created is None:
            self._created = self._frame["created_at"] = chunk["created"]
            for kind in ("response.created", "response.in_progress"):
                events.append(self._event(kind, response=dict(self._frame)))
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("reasoning_content"):
                events += self._grow("reasoning", delta["reasoning_content"])
            if delta.get("content"):
                events += self._grow("message", delta["content"])
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    events += [*self._close(), *self._add(_call(call["id"], call["function"]["name"], ""))]
                elif call["function"]["arguments"]:
                    events += self._grow("function_call", call["function"]["arguments"])
            self._reason = choice["finish_reason"] or self._reason
        if chunk.get("usage") is not None and not chunk["choices"]:
            self._usage = chunk["usage"]
            if not any(item["type"] in ("message", "function_call") for item in self._items):
                events += [*self._close(), *self._add(_message(""))]
            events += self._close()
            response = self._ended()
            events.append(self._event(f"response.{response['status']}", response=response))
        return events

    def failure(self, error: ApiError) -> list[dict[str, Any]]:
        """As response.Translation.failure."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        failed = {"status": "failed", "error": {"code": code, "message": error.message}, "output": self._items}
        return [self._event("response.failed", response=self._frame | failed)]

    def _ended(self) -> dict[str, Any]:
        usage = self._usage or {}
        cut = self._reason == "length"
        if cut and self._items:
            self._items[-1] |= {"status": "incomplete"}
        return self._frame | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _at(self) -> dict[str, Any]:
        """Where events of the last item belong."""
        at = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return at if self._items[-1]["type"] == "function_call" else at | {"content_index": 0}

    def _add(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        item["status"] = "in_progress"
        self._items.append(item)
        self._open = True
        bare = item if item["type"] == "function_call" else item | {"content": []}
        events = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(bare))]
        if item["type"] != "function_call":
            events.append(self._event("response.content_part.added", **self._at(), part=dict(item["content"][0])))
        return events

    def _grow(self, kind: str, text: str) -> list[dict[str, Any]]:
        """The last item grows by a text; where it is of another kind, a new one begins."""
        events = []
        if not self._open or self._items[-1]["type"] != kind:
            events += [*self._close(), *self._add(_reasoning("") if kind == "reasoning" else _message(""))]
        item = self._items[-1]
        if kind == "function_call":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*events, self._event(f"{_DELTAS[kind]}.delta", **self._at(), delta=text, **logprobs)]

    def _close(self) -> list[dict[str, Any]]:
        """Events that say that the last item is complete."""
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._at(), **done)]
        else:
            part = item["content"][0]
            logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            text = {"text": part["text"], **logprobs}
            events = [
                self._event(f"{_DELTAS[item['type']]}.done", **self._at(), **text),
                self._event("response.content_part.done", **self._at(), part=dict(part)),
            ]
        last = self._event("response.output_item.done", output_index=len(self._items) - 1, item=dict(item))
        return [*events, last]


_DELTAS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


def _reasoning(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": _id("rs"), "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _message(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": _id("msg"), "type": "message", "role": "assistant", "status": "completed", "content": content}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    called = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": _id("fc"), "type": "function_call", "status": "completed", **called}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
