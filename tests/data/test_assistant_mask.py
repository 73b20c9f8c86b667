"""Which tokens of a conversation are trained, under templates that cut, join, drop and repeat what is said.

Against `transformers`' masks: `tests/oracle/test_assistant_masks.py`.
"""

import json
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.data.chat_template import ChatError, ChatTemplate
from fathom.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer
from tests.data.training_templates import FAMILIES, without_generation_tags

A, U = ASSISTANT, USER


def messages(*texts: str | None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def templated(tokenizer: Tokenizer, source: str) -> ChatTemplate:
    return ChatTemplate(Tokenizer(tokenizer.tokenizer_json, tokenizer.config | {"chat_template": source}))


def shown(tokenizer: Tokenizer, source: str, conversation: list[dict[str, Any]], **variables: Any) -> str:
    """The text, with what is trained in brackets."""
    ids, trained = templated(tokenizer, source).encode_training(conversation, variables=variables)
    text, inside = b"", False
    for token, flag in zip([*ids, None], [*trained, False], strict=True):
        if flag != inside:
            text, inside = text + (b"]" if inside else b"["), flag
        text += b"" if token is None else tokenizer.token_bytes(token)
    return text.decode()


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT{% else %}"
    "{{ '<｜User｜>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
)


def plain(assistant: str, prompt: str = "<｜Assistant｜>") -> str:
    return PLAIN.replace("ASSISTANT", assistant).replace("PROMPT", prompt)


def test_our_own_template(tokenizer: Tokenizer) -> None:
    conversation = messages("Hi", " Hello \n", "Bye", "")
    found = shown(tokenizer, tokenizer.config["chat_template"], conversation)
    assert found == f"{BOS}{U}Hi{A}[ Hello \n{EOS}]{U}Bye{A}[{EOS}]"
    ids, trained = ChatTemplate(tokenizer).encode_training(conversation)
    assert len(ids) == len(trained)
    prompt = ChatTemplate(tokenizer).encode(conversation[:3])
    assert ids[: len(prompt)] == prompt and trained[len(prompt) - 1 :] == [False, True]  # trained where it goes on


WAYS = {
    "joined": "{{ '<｜Assistant｜>' + m.content + eos_token }}",
    "put out": "<｜Assistant｜>{{ m['content'] }}{{ eos_token }}",
    "accumulated": "{% set n = namespace(x='<｜Assistant｜>') %}{% set n.x = n.x ~ m.content %}{{ n.x + eos_token }}",
    "formatted": "{{ '<｜Assistant｜>%s' % m.content }}{{ '{}{}'.format(m.content[:0], eos_token) }}",
    "a list": "{{ ['<｜Assistant｜>', m.content, eos_token] | join }}",
    "a macro": "{% macro f(x) %}{{ x }}{% endmacro %}<｜Assistant｜>{{ f(m.content) | trim + eos_token }}",
    "a block": "{% set x %}{{ m.content }}{% endset %}<｜Assistant｜>{{ x.split('</think>')[-1] }}{{ eos_token }}",
    "replaced": "{{ '<｜Assistant｜>X'.replace('X', m.content | replace('\\r', '')) + eos_token }}",
    "cut": "<｜Assistant｜>{{ m.content.split('</think>')[-1][0:] }}{{ eos_token }}",
    "tested": "<｜Assistant｜>{% if m.content.startswith('a') and m.content == 'a b' %}"
    "{{ m.content + eos_token }}{% endif %}",
}


@pytest.mark.parametrize("way", WAYS)
def test_however_the_template_puts_it_together(tokenizer: Tokenizer, way: str) -> None:
    found = shown(tokenizer, plain(WAYS[way]), messages("x", "a b", "y", "a b"))
    assert found == f"{BOS}{U}x{A}[a b{EOS}]{U}y{A}[a b{EOS}]"


def test_contents_that_are_trimmed(tokenizer: Tokenizer) -> None:
    source = plain("<｜Assistant｜>{{ m.content | trim }}{{ eos_token }}\n", "<｜Assistant｜>")
    found = shown(tokenizer, source, messages(" x ", " \n a\n", "y", "  "))
    assert found == f"{BOS}{U} x {A}[a{EOS}]\n{U}y{A}[{EOS}]\n"  # nor is the line end behind the token generated


def test_earlier_reasoning_that_is_dropped(tokenizer: Tokenizer) -> None:
    """No loss where it is not; the last turn's is in the text, and is trained."""
    source = plain(
        "<｜Assistant｜>{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{{ eos_token }}"
    )
    conversation = messages("x", "a", "y", "b")
    for message in conversation[1::2]:
        message["reasoning_content"] = "since"
    found = shown(tokenizer, source, conversation)
    assert found == f"{BOS}{U}x{A}[a{EOS}]{U}y{A}[<think>since</think>b{EOS}]"


def test_what_the_prompt_holds_is_not_trained(tokenizer: Tokenizer) -> None:
    """As where a variable chooses between two kinds of answers, and where the prompt opens a thought."""
    start = "<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}"
    source = plain(start + "{{ m.content }}{{ eos_token }}", start)
    assert shown(tokenizer, source, messages("x", "a")) == f"{BOS}{U}x{A}</think>[a{EOS}]"
    assert shown(tokenizer, source, messages("x", "a"), thinking=True) == f"{BOS}{U}x{A}<think>[a{EOS}]"
    kept = plain("<｜Assistant｜>{{ m.content + eos_token }}", "<｜Assistant｜><think>\n")
    assert shown(tokenizer, kept, messages("x", "<thin")) == f"{BOS}{U}x{A}[<thin{EOS}]"
    written = plain("<｜Assistant｜>Well: {{ m.content + eos_token }}")
    assert shown(tokenizer, written, messages("x", "a")) == f"{BOS}{U}x{A}[Well: a{EOS}]"


def test_turns_that_are_joined(tokenizer: Tokenizer) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% set before = messages[loop.index0 - 1].role if loop.index0 else '' %}"
        "{% if m.role == 'assistant' %}{{ ' / ' if before == m.role else '<｜Assistant｜>' }}{{ m.content }}"
        "{% if loop.last or messages[loop.index].role != m.role %}{{ eos_token }}{% endif %}"
        "{% else %}{{ ' / ' if before == m.role else '<｜User｜>' }}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    said = [("user", "x"), ("user", "y"), ("assistant", "a "), ("assistant", "b"), ("user", "z"), ("assistant", "c")]
    conversation = [{"role": role, "content": text} for role, text in said]
    assert shown(tokenizer, source, conversation) == f"{BOS}{U}x / y{A}[a  / b{EOS}]{U}z{A}[c{EOS}]"


def test_tool_calls_are_output_and_answers_are_not(tokenizer: Tokenizer) -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    conversation = [
        *messages("x", None),
        {"role": "tool", "tool_call_id": "1", "content": "result"},
        {"role": "assistant", "content": "a", "reasoning_content": "dropped"},
    ]
    conversation[1] |= {"tool_calls": [{"id": "1", "type": "function", "function": function}]}
    source = plain(
        "<｜Assistant｜>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        '<call>{{ c.function | tojson }}</call>{% endfor %}{{ eos_token }}{% elif m.role == "tool" %}'
        "<｜User｜><result>{{ m.content | tojson }}</result>"
    )
    found = shown(tokenizer, source, conversation)
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    assert found == f'{BOS}{U}x{A}[<call>{call}</call>{EOS}]{U}<result>"result"</result>{A}[a{EOS}]'


@pytest.mark.parametrize("character", ["\U000f0000", "\U0010fffd", "\ue000", "\r\n\x85\u2028", "é", "👩‍👩‍👧"])
def test_odd_characters_are_no_marks(tokenizer: Tokenizer, character: str) -> None:
    text = f"{character}0.1{character}"
    found = shown(tokenizer, tokenizer.config["chat_template"], messages(text, text, text, text))
    assert found == f"{BOS}{U}{text}{A}[{text}{EOS}]{U}{text}{A}[{text}{EOS}]"


def test_control_tokens_that_are_spelled_out_are_text(tokenizer: Tokenizer) -> None:
    ids, trained = ChatTemplate(tokenizer).encode_training(messages(A, f"{EOS}{U}"))
    assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.user_id) == 1
    start = ids.index(tokenizer.assistant_id) + 1
    assert trained == [False] * start + [True] * (len(ids) - start)


def test_a_token_that_is_partly_the_assistants_is_trained(tokenizer: Tokenizer) -> None:
    """The header ends within the token of two line ends."""
    source = plain("<｜Assistant｜>\n{{ m.content + eos_token }}", "<｜Assistant｜>\n")
    ids, trained = templated(tokenizer, source).encode_training(messages("x", "\ndef"))
    at = ids.index(tokenizer.assistant_id)
    assert tokenizer.token_bytes(ids[at + 1]) == b"\n\n" and trained[at + 1]


def test_a_tokenizer_that_normalises(tokenizer: Tokenizer) -> None:
    """Qwen's composes characters, so that a text has other bytes than its tokens."""
    content = json.loads(tokenizer.tokenizer_json) | {"normalizer": {"type": "NFC"}}
    composing = Tokenizer(json.dumps(content), tokenizer.config)
    conversation = messages("Gro\u0308ße", "e\u0301 Gro\u0308ße")
    found = shown(composing, plain("<｜Assistant｜>\n{{ m.content + eos_token }}", "<｜Assistant｜>\n"), conversation)
    assert found == f"{BOS}{U}Größe{A}\n[é Größe{EOS}]"


REFUSED = {
    "marked, as for training they must be": plain(
        "<｜Assistant｜>{% set x %}{{ m.content }}{% endset %}{{ x | length }}{{ eos_token }}"
    ),
    "of which the last may be a prompt that it always adds": (
        "{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}"
        "{{ m.content + '<｜fim▁end｜>' }}{% endfor %}<｜Assistant｜>"
    ),
    "without a control token": plain("<｜Assistant｜>{{ m.content }}\n"),
    "another order": "{{ bos_token }}{% for m in messages[::-1] %}{{ m.content + eos_token }}{% endfor %}",
    "before message 1 in another way": plain("{{ eos_token }}{{ m.content + eos_token }}").replace(
        "{{ '<｜User｜>' + m.content }}", "<｜User｜>{{ m.content }}{{ '' if loop.length > 1 else '. Answer!' }}"
    ),
    "other parts of message 1": plain(
        "<｜Assistant｜>{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ eos_token }}"
    ),
    "does not take these messages: tool": plain("{{ raise_exception('tool') }}"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_told_apart_is_refused(tokenizer: Tokenizer, reason: str) -> None:
    conversation = messages("x", "abc", "y", "abc")
    conversation[1]["reasoning_content"] = conversation[3]["reasoning_content"] = "since"
    with pytest.raises(ChatError, match=reason):
        templated(tokenizer, REFUSED[reason]).encode_training(conversation)


def test_a_template_that_leaves_the_assistant_out_trains_nothing(tokenizer: Tokenizer) -> None:
    ids, trained = templated(tokenizer, plain("")).encode_training(messages("x", "a", "y", "b"))
    assert ids and not any(trained)
    assert not any(ChatTemplate(tokenizer).encode_training(messages("x"))[1])


@pytest.mark.parametrize("escape", ["m.content._mark", "m.content.strip.__globals__", "m.content.__class__"])
def test_marked_strings_reach_nothing_of_python(tokenizer: Tokenizer, escape: str) -> None:
    try:
        found = shown(tokenizer, plain(f"<｜Assistant｜>{{{{ {escape} }}}}{{{{ eos_token }}}}"), messages("x", "a"))
    except ChatError:
        return
    assert found == f"{BOS}{U}x{A}[{EOS}]"


@pytest.mark.parametrize(("family", "kept"), [("v3", "<think>s</think>a"), ("r1", "a")])
def test_a_conversation_in_two_families(tokenizer: Tokenizer, family: str, kept: str) -> None:
    found = shown(tokenizer, without_generation_tags(FAMILIES[family]), messages("x", "<think>s</think>a"))
    assert found == f"{BOS}{U}x{A}[{kept}{EOS}]"
