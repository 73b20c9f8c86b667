"""How a model spells what is more than text: its reasoning between think tags, and its tool calls.

Which way it is follows from the chat template and the tokenizer. A format is what the released templates write for
calls in the history, and so what the models generate: DeepSeek-V3 and R1, DeepSeek-V3.1, Kimi-K2, and the <tool_call>
tags that many others have in common.
"""

import re
from dataclasses import dataclass
from typing import Literal

from fathom.data.chat_template import ChatTemplate
from fathom.data.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"

ReasoningParser = Literal["auto", "think", "none"]

Reasoning = Literal["none", "possible", "begun"]
"""Whether an output has reasoning: it cannot, it may begin with a think tag, the prompt has already opened one."""


@dataclass(frozen=True)
class CallFormat:
    """The texts around the parts of tool calls: begin, for each call its own ones, end."""

    begin: str
    call_begin: str
    before_name: str
    before_arguments: str
    call_end: str
    end: str
    between: str = ""
    """What the templates put between two calls; parsers skip any whitespace there."""
    numbered: bool = False
    """Whether a colon and the call's number follow its name; together they are its id."""
    single: bool = False
    """Whether an output is either one call or text."""

    @property
    def opening(self) -> str:
        """What calls begin with."""
        return self.begin or self.call_begin

    def identify(self, header: str) -> tuple[str, str | None]:
        """The name of the function, and the call's id if the model gives one."""
        header = header.strip()
        name = header.removeprefix(self.before_name)
        return (re.sub(r":\d+$", "", name), header) if self.numbered else (name, None)


_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")

DEEPSEEK_V3 = CallFormat(
    *_SECTION,
    before_name="function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    call_end="\n```<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
    between="\n",
)
DEEPSEEK_V31 = CallFormat(
    *_SECTION,
    before_name="",
    before_arguments="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
)
KIMI_K2 = CallFormat(
    begin="<|tool_calls_section_begin|>",
    call_begin="<|tool_call_begin|>",
    before_name="functions.",
    before_arguments="<|tool_call_argument_begin|>",
    call_end="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
    numbered=True,
)
TAGS = CallFormat(
    begin="",
    call_begin='<tool_call>\n{"name": "',
    before_name="",
    before_arguments='", "arguments": ',
    call_end="}\n</tool_call>",
    end="",
    between="\n",
)
JSON = CallFormat(
    begin="",
    call_begin='{"name": "',
    before_name="",
    before_arguments='", "arguments": ',
    call_end="}",
    end="",
    single=True,
)
"""For templates with no format of their own: the output is one call, or text that begins with no brace."""


class OutputFormat:
    """Of one model."""

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, reasoning_parser: ReasoningParser = "auto"
    ) -> None:
        """`reasoning_parser`: "think" separates what think tags enclose, "auto" does so where the template has them."""
        self.calls = _call_format(template, tokenizer)
        self.thinks = END_THINK in template.source if reasoning_parser == "auto" else reasoning_parser == "think"
        parts = (self.calls.begin, self.calls.call_begin, self.calls.before_name, self.calls.before_arguments)
        marks = "".join((*parts, self.calls.call_end, self.calls.end, THINK + END_THINK if self.thinks else ""))
        self.tokenizer = tokenizer.spelling_out(marks)
        """Also spells the tokens that calls and reasoning consist of, where they are special ones."""

    def reasoning(self, prompt_ids: list[int], continued: str | None) -> Reasoning:
        """Of the output that follows a prompt. `continued`: the message that it continues, if it does."""
        if not self.thinks:
            return "none"
        if continued is not None:
            return "begun" if continued.rfind(THINK) > continued.rfind(END_THINK) else "none"
        end = b"".join(map(self.tokenizer.token_bytes, prompt_ids[-16:])).decode(errors="replace").rstrip()
        if end.endswith(THINK):
            return "begun"
        return "none" if end.endswith(END_THINK) else "possible"


def _call_format(template: ChatTemplate, tokenizer: Tokenizer) -> CallFormat:
    source = template.source

    def has(format_: CallFormat) -> bool:
        # Without the tools the model would have to be shown the format in words, which JSON needs least of.
        first = re.match(r"<[^>]*>", format_.opening)
        return bool(
            template.supports_tools and first and first[0] in source and tokenizer.token_id(first[0]) is not None
        )

    if has(DEEPSEEK_V3):
        return DEEPSEEK_V3 if "```json" in source else DEEPSEEK_V31
    if has(KIMI_K2):
        return KIMI_K2
    return TAGS if has(TAGS) and "<arg_key>" not in source else JSON
