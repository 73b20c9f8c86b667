"""Reasoning and tool calls as the models spell them, cut into chunks at every position."""

from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("llguidance", reason="the server needs llguidance")

from fathom.serve.message_parser import MessageParser, Part
from fathom.serve.output_format import DEEPSEEK_V3, DEEPSEEK_V31, JSON, KIMI_K2, TAGS, CallFormat, Reasoning

CITY, DAY = '{"city": "Zürich"}', '{"day": 3, "note": "a}\\n```{\\"b\\": [1]}"}'

V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    + CITY
    + "\n```<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>plan.day\n```json\n"
    + DAY
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + CITY + "<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>plan.day<｜tool▁sep｜>" + DAY + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    + CITY
    + "<|tool_call_end|>"
    "<|tool_call_begin|>functions.plan.day:1<|tool_call_argument_begin|>"
    + DAY
    + "<|tool_call_end|><|tool_calls_section_end|>"
)
TAGGED = (
    '<tool_call>\n{"name": "weather", "arguments": ' + CITY + "}\n</tool_call>\n"
    '<tool_call>\n{"name": "plan.day", "arguments": ' + DAY + "}\n</tool_call>"
)
FORMATS = {"v3": (DEEPSEEK_V3, V3), "v3.1": (DEEPSEEK_V31, V31), "kimi": (KIMI_K2, KIMI), "tags": (TAGS, TAGGED)}
CALLS = [("weather", CITY), ("plan.day", DAY)]


def read(
    chunks: list[str], calls: CallFormat | None, reasoning: Reasoning
) -> tuple[str, str, list[tuple[str, str]], list[str]]:
    """Reasoning, content, calls with their arguments, ids."""
    parser = MessageParser(calls, reasoning)
    parts: list[Part] = []
    for chunk in chunks:
        parts += parser.feed(chunk)
    parts += parser.feed("", final=True)
    reasoned, content = ("".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content"))
    named = [part for part in parts if part.kind == "call"]
    assert [part.call for part in named] == list(range(len(named))) and parser.num_calls == len(named)
    arguments = [
        "".join(part.text for part in parts if part.kind == "arguments" and part.call == n) for n in range(len(named))
    ]
    return (
        reasoned,
        content,
        [(part.text, text) for part, text in zip(named, arguments, strict=True)],
        [p.call_id for p in named],
    )


def every_cut(text: str, calls: CallFormat | None, reasoning: Reasoning) -> tuple[Any, ...]:
    """What is read, the same wherever the text is cut once, and character by character."""
    whole = read([text], calls, reasoning)
    for cut in range(1, len(text)):
        assert read([text[:cut], text[cut:]], calls, reasoning)[:3] == whole[:3], (text[:cut], text[cut:])
    assert read(list(text), calls, reasoning)[:3] == whole[:3]
    return whole


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("before", ["", "Let me see: <|a <tool .\n\n", "x"])
def test_several_calls_wherever_the_text_is_cut(name: str, before: str) -> None:
    format_, text = FORMATS[name]
    reasoned, content, calls, ids = every_cut(before + text, format_, "none")
    assert (reasoned, content, calls) == ("", before.rstrip(), CALLS)
    if format_ is KIMI_K2:
        assert ids == ["functions.weather:0", "functions.plan.day:1"]
    else:
        assert len({*ids}) == 2 and all(call_id.startswith("call_") for call_id in ids)


@pytest.mark.parametrize("name", FORMATS)
def test_reasoning_then_calls(name: str) -> None:
    format_, text = FORMATS[name]
    thought = "If < 3 </thin </think"
    for spelled, reasoning in ((f"<think>\n{thought}\n</think>\n\n", "possible"), (f"{thought}\n</think>", "begun")):
        assert every_cut(f"{spelled}Yes.{text}", format_, reasoning)[:3] == (thought, "Yes.", CALLS)  # type: ignore[arg-type]


def test_kimi_calls_in_the_middle_of_its_reasoning() -> None:
    assert every_cut(f"hm {KIMI}", KIMI_K2, "begun")[:3] == ("hm", "", CALLS)


def test_arguments_come_as_they_are_generated() -> None:
    parser = MessageParser(DEEPSEEK_V31, "none")
    head, tail = V31.split('"Zür')
    [call, begun] = parser.feed(head)
    assert (call.kind, call.text, begun.kind, begun.text) == ("call", "weather", "arguments", '{"city": ')
    assert [part.text for part in parser.feed('"Zür')] == ['"Zür']
    assert parser.feed(tail[:9])[0].text == tail[:5]


def test_a_code_block_that_is_not_closed() -> None:
    assert read([V3.replace("\n```<", "<")], DEEPSEEK_V3, "none")[2] == CALLS


@pytest.mark.parametrize("name", FORMATS)
def test_cut_off_anywhere_nothing_but_marks_is_lost(name: str) -> None:
    """At max_tokens: complete calls stay, the last one's arguments are a beginning of the whole ones."""
    format_, text = FORMATS[name]
    for end in range(len(text)):
        _, _, calls, _ = read([text[:end]], format_, "none")
        for (function, arguments), (expected, whole) in zip(calls, CALLS, strict=False):
            assert function == expected and whole.startswith(arguments.rstrip("\n`"))


@pytest.mark.parametrize("text", ["<think>a\n\nb</think>\n\n c\n", "\n<think>\na\n\nb\n</think>c\n"])
def test_reasoning_between_tags(text: str) -> None:
    assert every_cut(text, None, "possible")[:2] == ("a\n\nb", "c\n")


@pytest.mark.parametrize("text", [" \n<thinking> </think>", "<", "", " ", "no <think>tag</think>", "\n\n"])
def test_text_that_begins_with_no_tag_is_content_as_it_is(text: str) -> None:
    assert every_cut(text, None, "possible")[:2] == ("", text)
    assert every_cut(text, DEEPSEEK_V3, "none")[:2] == ("", text)


def test_reasoning_that_never_ends() -> None:
    assert every_cut("a</thin ", None, "begun")[:2] == ("a</thin", "")


def test_one_json_call_or_text() -> None:
    call = '{"name": "plan.day", "arguments": ' + DAY + "}"
    assert every_cut(call, JSON, "none")[:3] == ("", "", CALLS[1:])
    assert every_cut(f"<think>a</think>\n{call}\n", JSON, "possible")[:3] == ("a", "", CALLS[1:])
    for text in (' {"nam', '{"name": "f', '{"a": 1}', f"x {call}", " x"):
        assert every_cut(text, JSON, "none")[:3] == ("", text, [])
    [(_, arguments)] = read([call[:-3]], JSON, "none")[2]
    assert DAY.startswith(arguments) and len(arguments) > len(DAY) - 5
