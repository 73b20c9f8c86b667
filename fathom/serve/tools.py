"""Functions that a model may call: how they are put to it, and how a call is read from its answer.

A call is the JSON text {"name": …, "arguments": {…}}, which the grammar holds the model to. Templates that know tools
are given them; for the others the functions stand in a system message, and calls and results in plain messages.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any


def render_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows only system, user and assistant messages."""
    told = [_plain(message) for message in messages]
    if not tools:
        return told
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = 'To call one of these functions, answer with {"name": …, "arguments": {…}} alone:\n' + "\n".join(lines)
    if told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """The call that an answer is, in OpenAI's form; None where it is none."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["name"], str):
        return None
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result: {message['content']}"}
    calls = [
        f'{{"name": {json.dumps(call["function"]["name"])}, "arguments": {call["function"]["arguments"]}}}'
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}
