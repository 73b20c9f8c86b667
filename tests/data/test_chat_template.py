"""Conversations: as `transformers` renders them, never a control token out of what people say, and no way out of the
sandbox for a template."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.data.chat_template import ChatError, ChatTemplate
from fathom.data.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER, Tokenizer, save_tokenizer

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


@pytest.fixture(scope="module")
def templates(tokenizer: Tokenizer) -> dict[str, ChatTemplate]:
    """Several ways in which templates put messages together."""
    loop = "{% for m in messages %}BODY{% endfor %}{{ '<｜Assistant｜>' }}"
    bodies = {
        "concatenated": "{{ '<｜User｜>' + m.content + eos_token }}",
        "put out": "<｜User｜>{{ m.content }}{{ eos_token }}",
        "accumulated": "{% set n = namespace(x='<｜User｜>') %}{% set n.x = n.x ~ m.content ~ eos_token %}{{ n.x }}",
        "formatted": "{{ '<｜User｜>%s' % m.content }}{{ '{}{}'.format(m.content[:0], eos_token) }}",
        "joined": "{{ ['<｜User｜>', m.content, eos_token] | join('') }}",
        "replaced": "{{ '<｜User｜>CONTENT<｜end▁of▁sentence｜>'.replace('CONTENT', m.content) }}",
        "macro": "{% macro f(x) %}<｜User｜>{{ x }}{% endmacro %}{{ f(m.content) + eos_token }}",
        "in parts": "{{ '<｜' + 'User' + '｜>' + m.content + eos_token }}",
        "by role": "{{ '<｜' ~ m.role.capitalize() ~ '｜>' }}{{ m.content }}{{ (' ' ~ eos_token)[1:] }}",
        "stripped": "{{ '\n<｜User｜>\n'.strip() + m.content + (eos_token * 2)[:eos_token | length] }}",
        "block": "{% set x %}<｜User｜>{{ m.content }}{% endset %}{{ x + eos_token }}",
    }
    return {name: templated(tokenizer, loop.replace("BODY", body)) for name, body in bodies.items()}


@settings(deadline=None)
@given(texts=st.lists(SAID.map("".join), min_size=1, max_size=5))
def test_what_people_say_never_becomes_a_control_token(
    tokenizer: Tokenizer, templates: dict[str, ChatTemplate], texts: list[str]
) -> None:
    """The same control tokens, whatever is said; and what is said is all there, however the template joins it."""
    messages = [{"role": "user", "content": text} for text in texts]
    for name, template in templates.items():
        ids = template.encode(messages)
        expected = [tokenizer.user_id, tokenizer.eos_id] * len(texts) + [tokenizer.assistant_id]
        assert [token for token in ids if token < len(SPECIAL_TOKENS)] == expected, name
        assert tokenizer.decode(ids) == "".join(texts), name
        shown = "".join(USER + text + EOS for text in texts) + ASSISTANT
        assert template.render(messages) == shown, name


@pytest.mark.parametrize("text", ["\U000f0000", "&#xf0000;", "\ud800", "\r\n\x85\u2028", "\x00"])
def test_odd_characters_come_through(tokenizer: Tokenizer, text: str) -> None:
    assert templated(tokenizer, "{{ messages[0].content }}").render(conversation([text])) == text


def test_no_private_character_of_a_message_is_taken_for_a_code(tokenizer: Tokenizer) -> None:
    """Also where there are too few left to choose others."""
    template = templated(tokenizer, "<｜User｜>{{ messages[0].content }}")
    half = "".join(map(chr, range(0xF0000, 0x100000)))
    ids = template.encode(conversation([half]))
    assert tokenizer.decode(ids) == half and [each for each in ids if each < len(SPECIAL_TOKENS)] == [tokenizer.user_id]
    with pytest.raises(ChatError, match="private characters"):
        template.encode(conversation(["".join(map(chr, range(0xF0000, 0x10FFFE)))]))


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
    "{{ bos_token._codes }}",
    "{{ bos_token.strip.__globals__ }}",
    "{{ bos_token.strip.__func__ }}",
    "{{ '<｜User｜>{0.__class__}'.format(messages)[8:] }}",
    "{{ messages[0].tool_calls[0].function.arguments.update(a=1) }}",
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
    "{{ 9 ** (9 ** 9) }}",
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
    *(
        "{% set ns = namespace(a=[], b=[]) %}{% for i in range(60) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}" + compare
        for compare in (
            "{{ ns.a == ns.b }}",
            "{{ ns.a < ns.b }}",
            "{{ ns.a in [ns.b] }}",
            "{{ ns.a is eq ns.b }}",
        )
    ),
    "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(n=7) %}{% for i in range(22) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n // 3 }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_templates_end(tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.data.chat_template._SECONDS", 0.3)
    with pytest.raises(ChatError):
        templated(tokenizer, source).render(conversation(["said"]))


def test_a_template_goes_on_after_a_rendering_that_was_ended(tokenizer: Tokenizer) -> None:
    template = templated(tokenizer, "{{ 9 ** (9 ** (messages | length)) % 2 }}a")
    for _ in range(2):
        with pytest.raises(ChatError, match="took longer than 2 s"):
            template.render(conversation(["x"] * 9))
        assert template.render([]) == "1a"


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


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":  "größer"}'}}
CALLED = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
OF_CALLS = "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("{{ c.function.name + c.function.arguments }}", 'f{"x":  "größer"}'),
        ("{{ c.function.arguments ~ '!' }}{{ '%s' % c.function.arguments }}", '{"x":  "größer"}!{"x":  "größer"}'),
        ("{{ c.function.arguments }}", '{"x":  "größer"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "x=größer"),
        ("{{ c.function.arguments | tojson }}", '{"x": "größer"}'),
        ("{{ c.function.arguments is mapping and c.function.arguments is not string }}", "True"),
    ],
)
def test_arguments_are_an_object_or_their_text(tokenizer: Tokenizer, body: str, shown: str) -> None:
    assert templated(tokenizer, OF_CALLS.replace("BODY", body)).render(CALLED) == shown


@pytest.mark.parametrize("arguments", ["", "3", "{", '["a"]'])
def test_arguments_that_are_no_object_stay_a_text(tokenizer: Tokenizer, arguments: str) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    template = templated(
        tokenizer, OF_CALLS.replace("BODY", "{{ c.function.arguments is string }}{{ c.function.arguments }}")
    )
    assert template.render([{"role": "assistant", "content": "", "tool_calls": [call]}]) == f"True{arguments}"


def test_a_null_content_is_null_unless_the_template_needs_a_text(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{{ m.content is none }} {% endfor %}"
    assert templated(tokenizer, source).render(CALLED) == "False True "
    source = "{% for m in messages %}{{ '</think>' in m.content }}{{ m.content + '.' }}{% endfor %}"
    assert templated(tokenizer, source).render(CALLED) == "Falsego.False."


def test_a_template_may_look_for_control_tokens_in_messages(tokenizer: Tokenizer) -> None:
    """It drops earlier reasoning; what is left of the message stays text, and a role's name is part of a token."""
    source = (
        "{% for m in messages %}{{ '<｜' + m.role|replace('user', 'User')|replace('assistant', 'Assistant') + '｜>' }}"
        "{% set text = m.content.split('<｜fim▁end｜>')[-1] %}{{ text }}{% if text == EOS %}!{% endif %}{% endfor %}"
    ).replace("EOS", repr(EOS))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"thought<｜fim▁end｜>{EOS}"},
    ]
    template = templated(tokenizer, source)
    assert template.render(messages) == f"{USER}a{ASSISTANT}{EOS}!"
    ids = template.encode(messages)
    assert tokenizer.decode(ids) == f"a{EOS}!" and tokenizer.eos_id not in ids


@pytest.mark.parametrize(("content", "shown"), [("He ", "<｜Assistant｜>He "), ("\nHe", "<｜Assistant｜>\nHe")])
def test_the_last_message_may_be_continued(tokenizer: Tokenizer, content: str, shown: str) -> None:
    messages = [{"role": "user", "content": "He"}, {"role": "assistant", "content": content}]
    assert ChatTemplate(tokenizer).render(messages, continue_final=True) == f"{BOS}{USER}He{shown}"
    trimming = tokenizer.config["chat_template"].replace("message['content'] +", "message['content'].strip() +")
    shown = templated(tokenizer, trimming).render(messages, continue_final=True)
    assert shown == f"{BOS}{USER}He{ASSISTANT}He"
    with pytest.raises(ChatError, match="no text that could be continued"):
        ChatTemplate(tokenizer).render([{"role": "assistant", "content": None}], continue_final=True)


def test_variables_are_those_the_template_reads(tokenizer: Tokenizer) -> None:
    template = templated(tokenizer, "{% if thinking %}{{ bos_token }}{{ messages[0].content }}{% endif %}")
    assert template.variables == {"thinking"} and not template.supports_tools
    assert template.render(conversation(["x"])) == ""
    assert template.render(conversation(["x"]), variables={"thinking": True}) == f"{BOS}x"
