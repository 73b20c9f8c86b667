"""Conversations to train on, out of JSON Lines: what each line must have, and which of its tokens are trained.

A line is an object in one of three forms:

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …], "tools": […]}
    {"prompt": "a text", "completion": "how it goes on"}
    {"prompt": [messages], "completion": [messages], "tools": […]}

Of messages the model's chat template makes tokens, and the assistant's turns are trained (`chat_template.py`); one with
a weight of 0 is not, nor are those of a prompt. A text is trained behind its prompt, end of text included. Whatever is
wrong is an error that names the file and the line: nothing is skipped but samples that are too long, which are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fathom.data.chat_template import ChatTemplate
from fathom.data.readers import read_objects
from fathom.data.tokenizer import Tokenizer
from fathom.posttrain.pack import Sample

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class ConversationFile:
    """The samples of a file."""

    samples: list[Sample] = field(default_factory=list)
    """Every trained token has a weight of 1."""
    too_long: int = 0
    """Samples of more tokens than the limit, which are left out."""
    longest: int = 0
    """Tokens of the longest sample, those left out included."""


def read_conversations(path: Path, tokenizer: Tokenizer, max_length: int, strict: bool = False) -> ConversationFile:
    """All samples of a JSON Lines file (plain or gz, bz2, xz or zst), in its order.

    Raises ValueError, which names the line, for one that cannot be trained on, with `strict` also for one that has more
    than `max_length` tokens; and for a file of which nothing is left.
    """
    encoder, found = SampleEncoder(tokenizer), ConversationFile()
    for number, row in read_objects(path):
        try:
            ids, trained = encoder.encode(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        found.longest = max(found.longest, len(ids))
        if len(ids) > max_length:
            if strict:
                raise ValueError(f"{path}:{number}: {len(ids)} tokens; train.max_length is {max_length}")
            found.too_long += 1
            continue
        found.samples.append(Sample(torch.tensor(ids), torch.tensor(trained, dtype=torch.float32)))
    if not found.samples:
        longer = f"; {found.too_long} samples have more than train.max_length ({max_length}) tokens"
        raise ValueError(f"{path} has no sample to train on{longer if found.too_long else ''}")
    return found


class SampleEncoder:
    """From a line's object to token ids and which of them are trained; every ValueError says what is wrong."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        if "messages" in row:
            messages = _messages(row["messages"], "messages")
            ids, trained = self._encode_messages(messages, 0, row.get("tools"))
        elif "prompt" in row and "completion" in row:
            ids, trained = self._encode_completion(row["prompt"], row["completion"], row.get("tools"))
        else:
            keys = ", ".join(map(repr, row)) or "nothing"
            raise ValueError(f"the object has {keys}; it must have 'messages', or 'prompt' and 'completion'")
        # The first token has none before it that would predict it.
        if not any(trained[1:]):
            raise ValueError("no token is the assistant's in what the chat template makes of it, so none is trained")
        return ids, trained

    def _encode_completion(self, prompt: Any, completion: Any, tools: Any) -> tuple[list[int], list[bool]]:
        if isinstance(prompt, list) and isinstance(completion, list):
            before = _messages(prompt, "prompt") if prompt else []
            messages = _messages([*prompt, *completion], "prompt and completion")
            return self._encode_messages(messages, len(before), tools)
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise ValueError("'prompt' and 'completion' must both be texts, or both be lists of messages")
        if not completion:
            raise ValueError("'completion' is empty: nothing comes behind the prompt")
        # Apart, as a prompt is encoded when the model continues it.
        before_ids = [*self._tokenizer.prefix_ids, *self._tokenizer.encode(prompt, bos=False)]
        ids = [*self._tokenizer.encode(completion, bos=False), self._tokenizer.eos_id]
        return [*before_ids, *ids], [False] * len(before_ids) + [True] * len(ids)

    def _encode_messages(
        self, messages: Sequence[Mapping[str, Any]], first: int, tools: Any
    ) -> tuple[list[int], list[bool]]:
        if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
            raise ValueError("'tools' must be a list of objects")
        turns = [number for number, each in enumerate(messages) if number >= first and each["role"] == "assistant"]
        if not turns:
            raise ValueError("there is no message of the assistant to train on")
        turns = [turn for turn in turns if messages[turn].get("weight", 1)]
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        if tools and not self._template.supports_tools:
            raise ValueError("the model's chat template puts out no 'tools', so that none would be learnt")
        if not self._template.supports_tool_calls and any(each.get("tool_calls") for each in messages):
            raise ValueError("the model's chat template puts out no 'tool_calls', so that none would be learnt")
        plain = [{name: value for name, value in each.items() if name != "weight"} for each in messages]
        return self._template.encode_training(plain, tools or None, turns=turns)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The value if it is a conversation. Raises ValueError, which names the message."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of messages, at least one")
    unanswered: list[Any] = []
    for number, message in enumerate(value):
        try:
            _check_message(message)
            unanswered = _unanswered(message, unanswered)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    return value


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"it is a JSON {type(message).__name__}, and must be an object")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise ValueError(f"its role is {role!r}; it must be one of {', '.join(ROLES)}")
    if calls is not None:
        _check_calls(role, calls)
    if message.get("weight", 1) not in (0, 1) or ("weight" in message and role != "assistant"):
        raise ValueError("a weight is 0 or 1, and the assistant's")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("its content has a part that is no text")
    elif not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"its content is {content!r:.40}; it must be a text, or null beside tool_calls")
    if not isinstance(message.get("reasoning_content"), str | None):
        raise ValueError("its reasoning_content must be a text")


def _check_calls(role: str, calls: Any) -> None:
    if role != "assistant":
        raise ValueError(f"tool_calls in a message of the role {role}; they are the assistant's")
    if not isinstance(calls, list):
        raise ValueError("its tool_calls must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        if not (isinstance(function.get("name"), str) and isinstance(function.get("arguments"), str | dict)):
            raise ValueError("each of its tool_calls must be {'function': {'name': a text, 'arguments': an object}}")


def _unanswered(message: Mapping[str, Any], before: list[Any]) -> list[Any]:
    """The ids of the calls that no message has answered yet; ValueError for an answer without a call."""
    if message["role"] != "tool":
        return [call.get("id") for call in message.get("tool_calls") or ()]
    call_id = message.get("tool_call_id")
    if not before or (call_id is not None and call_id not in before and None not in before):
        named = f" {call_id!r}" if call_id is not None else ""
        raise ValueError(f"a tool's answer without a call{named} of the assistant before it")
    answered = before.index(call_id) if call_id in before else 0
    return before[:answered] + before[answered + 1 :]
