"""Which tokens are trained, against `transformers`' assistant masks: random conversations, five families of templates.

The judge's templates mark with `{% generation %}` what is the assistant's; ours are the same without these tags.
"""

import json
import random
from itertools import accumulate
from typing import Any

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from fathom.data.chat_template import ChatTemplate
from fathom.data.tokenizer import EOS, USER, Tokenizer, save_tokenizer, train_tokenizer
from tests.data.training_templates import FAMILIES, FOUND_IN_TEXTS, OWN, without_generation_tags

CONVERSATIONS = 250
WORDS = (
    "Größe ",
    "漢字",
    "👩‍👩‍👧",
    "e\u0301",
    " a",
    "b\n",
    "\n",
    "  ",
    "The sum is 12345.",
    '{"x": 1}',
    "{{ 7 }}",
    "“",
    "\\n",
)
TAGS = ("<think>", "</think>", "<tool_call>", "<tool_response>")
SPELLED = (EOS, USER, "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<｜tool▁calls▁end｜>", "<|im_", "｜>")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Größe", "parameters": {"type": "object"}}}]
TEXT_ARGUMENTS = ("v3", "r1")
"""Families that join the text of the arguments to others."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Words in parts, and every family's control tokens."""
    trained = train_tokenizer(["The sum is 12345.\n\nGröße 漢字 a b tool_call think assistant user system\n"] * 9, 330)
    content = json.loads(trained.tokenizer_json)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for spelled in (*OWN, *FOUND_IN_TEXTS):
        number = trained.vocab_size + len(content["added_tokens"])
        content["added_tokens"].append(plain | {"id": number, "content": spelled, "special": spelled in OWN})
    return Tokenizer(json.dumps(content), trained.config)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(family: str, tokenizer: Tokenizer) -> ChatTemplate:
    config = tokenizer.config | {"chat_template": without_generation_tags(FAMILIES[family])}
    return ChatTemplate(Tokenizer(tokenizer.tokenizer_json, config))


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def text(draw: random.Random, *atoms: str) -> str:
    return "".join(draw.choices(atoms, k=draw.choice((0, 1, 1, 2, 3, 5))))


def assistant(draw: random.Random, family: str, calls: list[dict[str, Any]], atoms: tuple[str, ...]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text(draw, *atoms)}
    if draw.random() < 0.3:
        message["content"] = f"<think>\n{text(draw, *WORDS)}</think>\n\n" + message["content"]
    elif draw.random() < 0.3:
        message["reasoning_content"] = text(draw, *atoms)
    if calls:
        message["tool_calls"] = calls
        if draw.random() < 0.5 and family not in ("llama-3",):
            message["content"] = None
    return message


def tool_calls(draw: random.Random, family: str, count: int, atoms: tuple[str, ...]) -> list[dict[str, Any]]:
    calls = []
    for number in range(count):
        arguments: Any = {"x": text(draw, *atoms), "Größe": number, "list": [text(draw, *WORDS)]}
        arguments = draw.choice((arguments, {}))
        if family in TEXT_ARGUMENTS:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": draw.choice(("add", "Größe_1")), "arguments": arguments}
        calls.append({"id": f"functions.add:{number}", "type": "function", "function": function})
    return calls


def conversation(draw: random.Random, family: str, atoms: tuple[str, ...]) -> list[dict[str, Any]]:
    """Several turns, some of them with calls of tools and their answers; seldom two of the assistant in a row."""
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": text(draw, *atoms)})
    for _ in range(draw.choice((1, 1, 2, 3))):
        messages.append({"role": "user", "content": text(draw, *atoms)})
        while draw.random() < 0.35:
            calls = tool_calls(draw, family, draw.choice((1, 1, 2)), atoms)
            messages.append(assistant(draw, family, calls, atoms))
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": text(draw, *atoms)} for call in calls]
        messages += [assistant(draw, family, [], atoms) for _ in range(draw.choice((1, 1, 1, 1, 2)))]
    if draw.random() < 0.1:
        messages.append({"role": "user", "content": text(draw, *atoms)})
    return messages


def expected_flags(tokenizer: Tokenizer, ids: list[int], rendered: str, spans: list[tuple[int, int]]) -> list[bool]:
    """For each of our tokens whether it lies in the judge's spans of characters, in part or whole."""
    in_bytes = [(len(rendered[:start].encode()), len(rendered[:end].encode())) for start, end in spans]
    ends = list(accumulate(len(tokenizer.token_bytes(token)) for token in ids))
    assert ends[-1] == len(rendered.encode())
    return [any(b < stop and e > start for start, stop in in_bytes) for b, e in zip([0, *ends], ends, strict=False)]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "with control tokens spelled out"])
def test_masks_are_those_of_transformers(
    family: str, kind: str, ours: ChatTemplate, theirs: Any, tokenizer: Tokenizer
) -> None:
    draw, source = random.Random(f"{family} {kind}"), FAMILIES[family]
    atoms = (*WORDS, *TAGS) if kind == "plain" else (*WORDS, *TAGS, *SPELLED)
    trained_tokens = 0
    for number in range(CONVERSATIONS):
        messages = conversation(draw, family, atoms)
        tools = TOOLS if draw.random() < 0.3 else None
        ids, trained = ours.encode_training(messages, tools)
        [rendered], [spans] = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **theirs.special_tokens_map,
        )
        where = f"conversation {number}: {json.dumps(messages, ensure_ascii=False)}"
        assert trained == expected_flags(tokenizer, ids, rendered, spans), where
        if kind == "plain":
            judged = theirs.apply_chat_template(
                messages, tools=tools, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
            )
            assert ids == list(judged["input_ids"]), where
            assert trained == [flag == 1 for flag in judged["assistant_masks"]], where
        trained_tokens += sum(trained)
    assert trained_tokens > 10 * CONVERSATIONS
