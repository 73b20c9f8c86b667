"""Lines of conversations: what is trained of them, and what is refused, by file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer
from fathom.posttrain.conversations import read_conversations
from fathom.posttrain.pack import Sample
from tests.posttrain.chats import small_tokenizer

USER_SAYS, ASSISTANT_SAYS = {"role": "user", "content": "cat"}, {"role": "assistant", "content": "meow"}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def shown(tokenizer: Tokenizer, sample: Sample) -> str:
    """The text, with what is trained in brackets."""
    text, inside = b"", False
    for token, weight in zip([*sample.tokens_T.tolist(), None], [*sample.weights_T.tolist(), 0], strict=True):
        if bool(weight) != inside:
            text, inside = text + (b"]" if inside else b"["), bool(weight)
        text += b"" if token is None else tokenizer.token_bytes(token)
    return text.decode()


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER_SAYS, ASSISTANT_SAYS]}, f"{BOS}{USER}cat{ASSISTANT}[meow{EOS}]"),
    (
        {"messages": [USER_SAYS, ASSISTANT_SAYS, USER_SAYS, ASSISTANT_SAYS, USER_SAYS], "tools": None},
        f"{BOS}{USER}cat{ASSISTANT}[meow{EOS}]{USER}cat{ASSISTANT}[meow{EOS}]{USER}cat",
    ),
    ({"prompt": "cat", "completion": " says", "id": 7}, f"{BOS}cat[ says{EOS}]"),
    ({"prompt": "", "completion": "cat"}, f"{BOS}[cat{EOS}]"),
    (
        {"prompt": [USER_SAYS, ASSISTANT_SAYS, USER_SAYS], "completion": [ASSISTANT_SAYS]},
        f"{BOS}{USER}cat{ASSISTANT}meow{EOS}{USER}cat{ASSISTANT}[meow{EOS}]",
    ),
    (
        {"messages": [USER_SAYS, ASSISTANT_SAYS | {"weight": 0}, USER_SAYS, ASSISTANT_SAYS | {"weight": 1}]},
        f"{BOS}{USER}cat{ASSISTANT}meow{EOS}{USER}cat{ASSISTANT}[meow{EOS}]",
    ),
]


@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_the_forms_of_a_line(tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    found = read_conversations(write(tmp_path / "chats.jsonl", row, "", row), tokenizer, 100)
    assert [shown(tokenizer, sample) for sample in found.samples] == [expected] * 2
    assert (found.too_long, found.longest) == (0, len(found.samples[0]))


def test_a_compressed_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(FORMS[0][0]).encode()))
    assert len(read_conversations(path, tokenizer, 100).samples) == 1


def test_answers_of_tools_are_not_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '!' + c.function.name }}{% endfor %}{{ eos_token }}"
        "{% else %}{{ '<｜User｜>' + m.role + ' ' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    answer = {"role": "tool", "tool_call_id": "1", "content": "cat"}
    path = write(tmp_path / "chats.jsonl", {"messages": [USER_SAYS, CALLING, answer, ASSISTANT_SAYS]})
    with_tools = Tokenizer(tokenizer.tokenizer_json, tokenizer.config | {"chat_template": source})
    [sample] = read_conversations(path, with_tools, 100).samples
    expected = f"{BOS}{USER}user cat{ASSISTANT}[!f{EOS}]{USER}tool cat{ASSISTANT}[meow{EOS}]"
    assert shown(tokenizer, sample) == expected


def test_samples_that_are_too_long_are_counted_or_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = {"prompt": "cat", "completion": "cat " * 50}
    path = write(tmp_path / "chats.jsonl", FORMS[0][0], long)
    found = read_conversations(path, tokenizer, 20)
    assert (len(found.samples), found.too_long) == (1, 1) and found.longest > 20
    with pytest.raises(ValueError, match=r"chats.jsonl:2: \d+ tokens; train.max_length is 20"):
        read_conversations(path, tokenizer, 20, strict=True)
    with pytest.raises(ValueError, match=r"no sample to train on; 1 samples have more than train.max_length"):
        read_conversations(write(tmp_path / "long.jsonl", long), tokenizer, 20)
    with pytest.raises(ValueError, match=r"no sample to train on$"):
        read_conversations(write(tmp_path / "empty.jsonl"), tokenizer, 20)


TOOL = {"role": "tool", "content": "3"}
BAD: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ("[1]", "a JSON list; every line should be an object"),
    ({}, "the object has nothing; it must have 'messages', or 'prompt' and 'completion'"),
    ({"text": "cat"}, "the object has 'text'; it must have 'messages'"),
    ({"messages": []}, "'messages' must be a list of messages, at least one"),
    ({"messages": "cat"}, "'messages' must be a list of messages"),
    ({"messages": ["cat"]}, "message 0: it is a JSON str, and must be an object"),
    ({"messages": [USER_SAYS, {"role": "wizard", "content": "x"}]}, "message 1: its role is 'wizard'; it must be one"),
    ({"messages": [USER_SAYS, {"role": "assistant"}]}, "message 1: its content is None; it must be a text"),
    ({"messages": [{"role": "user", "content": 3}]}, "message 0: its content is 3; it must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "its content has a part that is no text"),
    ({"messages": [USER_SAYS]}, "there is no message of the assistant to train on"),
    ({"messages": [USER_SAYS, ASSISTANT_SAYS | {"weight": 0}]}, "no token is the assistant's"),
    ({"messages": [USER_SAYS, ASSISTANT_SAYS | {"weight": 0.5}]}, "message 1: a weight is 0 or 1"),
    ({"messages": [USER_SAYS | {"weight": 1}, ASSISTANT_SAYS]}, "message 0: a weight is 0 or 1, and the assistant's"),
    ({"messages": [USER_SAYS, TOOL, ASSISTANT_SAYS]}, "message 1: a tool's answer without a call"),
    ({"messages": [USER_SAYS, CALLING, TOOL, TOOL, ASSISTANT_SAYS]}, "message 3: a tool's answer without a call"),
    (
        {"messages": [USER_SAYS, CALLING, TOOL | {"tool_call_id": "2"}, ASSISTANT_SAYS]},
        "message 2: a tool's answer without a call '2'",
    ),
    ({"messages": [USER_SAYS | {"tool_calls": []}]}, "message 0: tool_calls in a message of the role user"),
    ({"messages": [CALLING | {"tool_calls": [{"id": "1"}]}]}, "message 0: each of its tool_calls must be"),
    ({"messages": [{"role": "developer", "content": "x"}, ASSISTANT_SAYS]}, "role developer is not known"),
    ({"messages": [USER_SAYS, CALLING, TOOL, ASSISTANT_SAYS]}, "the model's chat template puts out no 'tool_calls'"),
    ({"messages": [USER_SAYS, ASSISTANT_SAYS], "tools": [{}]}, "the model's chat template puts out no 'tools'"),
    ({"messages": [USER_SAYS, ASSISTANT_SAYS], "tools": "f"}, "'tools' must be a list of objects"),
    ({"messages": [USER_SAYS, ASSISTANT_SAYS | {"content": "\ud800"}]}, "half of a surrogate pair"),
    ({"prompt": "cat", "completion": ""}, "'completion' is empty: nothing comes behind the prompt"),
    ({"prompt": "cat"}, "the object has 'prompt'; it must have"),
    ({"prompt": "cat", "completion": [ASSISTANT_SAYS]}, "must both be texts, or both be lists of messages"),
    ({"prompt": [USER_SAYS, ASSISTANT_SAYS], "completion": [USER_SAYS]}, "no message of the assistant to train on"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_what_cannot_be_trained_on_is_refused(tokenizer: Tokenizer, tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "chats.jsonl", FORMS[0][0], row)
    with pytest.raises(ValueError) as error:
        read_conversations(path, tokenizer, 100)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)


def test_a_template_that_leaves_the_assistant_out_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endfor %}"
    silent = Tokenizer(tokenizer.tokenizer_json, tokenizer.config | {"chat_template": source})
    with pytest.raises(ValueError, match=r"chats.jsonl:1: no token is the assistant's in what the chat template makes"):
        read_conversations(write(tmp_path / "chats.jsonl", FORMS[0][0]), silent, 100)


def test_texts_need_no_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = {name: value for name, value in tokenizer.config.items() if name != "chat_template"}
    without = Tokenizer(tokenizer.tokenizer_json, config)
    assert read_conversations(write(tmp_path / "a.jsonl", FORMS[2][0]), without, 100).samples
    with pytest.raises(ValueError, match=r"b.jsonl:1: the model directory has no chat template"):
        read_conversations(write(tmp_path / "b.jsonl", FORMS[0][0]), without, 100)
