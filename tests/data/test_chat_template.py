"""Conversations: as `transformers` renders them, never a control token out of what people say, and no way out of the
sandbox for a template."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.data.chat_template import ChatError, ChatTemplate
from fathom.data.tokenizer import SPECIAL_TOKENS, Tokenizer, save_tokenizer

SAID = st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<", "｜", "<｜", "｜>", "User", "\ue000"]), max_size=8)


def templated(tokenizer: Tokenizer, source: str) -> ChatTemplate:
    return ChatTemplate(Tokenizer(tokenizer.tokenizer_json, tokenizer.config | {"chat_template": source}))


def conversation(texts: Sequence[str]) -> list[dict[str, str]]:
    roles = ["system", *(["user", "assistant"] * len(texts))]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_rendered_as_transformers_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge is transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = conversation(["Be brief.", "Hi {{ 7 * 7 }}", "Größe", "Bye"])
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(tokenizer).render(messages) == rendered
    assert "{{ 7 * 7 }}" in rendered  # what people say is no template
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ChatTemplate(tokenizer).encode(messages) == list(ids)


@given(texts=st.lists(SAID.map("".join), min_size=2, max_size=5))
def test_what_people_say_never_becomes_a_control_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The same control tokens, whatever is said; and what is said is all there."""
    control = len(SPECIAL_TOKENS)
    template = ChatTemplate(tokenizer)
    ids = template.encode(conversation(texts))
    plain = template.encode(conversation(["x"] * len(texts)))
    assert [token for token in ids if token < control] == [token for token in plain if token < control]
    assert tokenizer.decode(ids) == "".join(texts)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|first }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}{{ messages|length }}",
    "{{ messages[0].update({'content': 'owned'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{{ open('/etc/passwd').read() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_reach_nothing_of_python(tokenizer: Tokenizer, source: str) -> None:
    messages = conversation(["said"])
    try:
        shown = templated(tokenizer, source).render(messages)
    except ChatError:
        shown = ""
    assert shown == "" and messages == conversation(["said"])


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 9)|list }}",
    "{{ 'a' * 999999999 }}",
    "{{ [1] * 999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%0999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a'.zfill(width=999999999) }}",
    "{{ 'a'|center(999999999) }}",
    "{{ 'a\n'|indent(width=999999999, first=True) }}",
    "{{ messages|tojson(indent=999999999) }}",
    *(
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}" + grow + "{% endfor %}"
        for grow in (
            "{% set ns.x = ns.x ~ ns.x %}",
            "{% set ns.x = ns.x + ns.x %}",
            "{% set ns.x = ns.x * 2 %}",
            "{% set ns.x = ns.x.replace('a', 'aa') %}",
            "{% set ns.x = ns.x|replace('a', ns.x) %}",
            "{% set ns.x = [ns.x, ns.x]|join %}",
            "{% set ns.x = '{0}{0}'.format(ns.x) %}",
            "{% set ns.x = [ns.x, ns.x] %}{% if i > 40 %}{{ ns.x }}{% endif %}",
            "{% set ns.x = [ns.x, ns.x] %}{% if i > 40 %}{{ ns.x|tojson }}{% endif %}",
            "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
            "{{ 'a' * 9999999 }}",
        )
    ),
]


@pytest.mark.parametrize("source", ENDLESS)
def test_templates_end(tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.data.chat_template._SECONDS", 0.2)
    with pytest.raises(ChatError):
        templated(tokenizer, source).render(conversation(["said"]))


def test_ordinary_templates_keep_their_means(tokenizer: Tokenizer) -> None:
    source = (
        "{%- for m in messages %}{{ m.role.upper().ljust(6, '.') ~ m['content']|trim|replace('a', 'b') }}{% endfor %}"
    )
    assert templated(tokenizer, source).render(conversation([" banana "])) == "SYSTEMbbnbnb"
    source = "{{ '{:02d}'.format(7) }}{{ {'ö': [1]}|tojson(indent=1) }}{{ strftime_now('%Y')|length }}"
    assert templated(tokenizer, source).render([]) == '07{\n "ö": [\n  1\n ]\n}4'


def test_refusals_are_explained(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatError, match="role wizard is not known"):
        ChatTemplate(tokenizer).encode([{"role": "wizard", "content": ""}])
    with pytest.raises(ChatError, match="cannot be read"):
        templated(tokenizer, "{% for %}")
    without = {name: value for name, value in tokenizer.config.items() if name != "chat_template"}
    with pytest.raises(ChatError, match="has no chat template"):
        ChatTemplate(Tokenizer(tokenizer.tokenizer_json, without))
