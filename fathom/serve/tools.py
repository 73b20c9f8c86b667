"""Tools for chat templates without support of them: listed in a system message, calls and results in plain messages.

A call is the JSON text {"name": …, "arguments": {…}}, which a grammar enforces (`output_format.JSON`).
"""

import json
from collections.abc import Sequence
from typing import Any


def render_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that supports only system, user and assistant messages."""
    rendered = [_plain(message) for message in messages]
    if not tools:
        return rendered
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = 'To call one of these functions, answer with {"name": …, "arguments": {…}} alone:\n' + "\n".join(lines)
    if rendered[0]["role"] == "system":
        return [{**rendered[0], "content": f"{rendered[0]['content']}\n\n{text}"}, *rendered[1:]]
    return [{"role": "system", "content": text}, *rendered]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result: {message['content']}"}
    calls = [
        f'{{"name": {json.dumps(call["function"]["name"])}, "arguments": {call["function"]["arguments"]}}}'
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}
