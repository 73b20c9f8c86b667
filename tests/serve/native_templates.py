"""Chat templates that show tools, calls and results as the released ones do, and the tokens that they consist of."""

_AROUND = (
    "{{{{ bos_token }}}}{{% if tools %}}{{{{ tools | tojson }}}}{{% endif %}}"
    "{{% for m in messages %}}{{% if m.role == 'user' %}}<｜User｜>{{{{ m.content }}}}"
    "{{% elif m.role == 'system' %}}{{{{ m.content }}}}"
    "{{% elif m.role == 'tool' %}}<｜tool▁output▁begin｜>{{{{ m.content }}}}<｜tool▁output▁end｜>"
    "{{% else %}}<｜Assistant｜>{{% if m.content %}}{{{{ m.content.split('</think>')[-1] }}}}{{% endif %}}"
    "{{% if m.tool_calls %}}{calls}{{% endif %}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<｜Assistant｜>{opening}{{% endif %}}"
)
_EACH = "{{% for c in m.tool_calls %}}{call}{{% endfor %}}"
_NAME, _ARGUMENTS = "{{ c.function.name }}", "{{ c.function.arguments }}"

_SECTION = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_OUTPUT = ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
_THINK = ("<think>", "</think>")

_V3_CALL = f"{_SECTION[1]}function{_SECTION[2]}{_NAME}\n```json\n{_ARGUMENTS}\n```{_SECTION[3]}"
_V31_CALL = f"{_SECTION[1]}{_NAME}{_SECTION[2]}{_ARGUMENTS}{_SECTION[3]}"
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
_KIMI_CALL = f"{_KIMI[1]}{{{{ c.id }}}}{_KIMI[2]}{_ARGUMENTS}{_KIMI[3]}"


def _template(begin: str, call: str, end: str, opening: str = "") -> str:
    return _AROUND.format(calls=begin + _EACH.format(call=call) + end, opening=opening)


TEMPLATES = {
    "v3": _template(_SECTION[0], _V3_CALL, _SECTION[4]),
    "v3.1": _template(_SECTION[0], _V31_CALL, _SECTION[4], "{% if thinking %}<think>{% else %}</think>{% endif %}"),
    "r1": _template(_SECTION[0], _V3_CALL, _SECTION[4], "<think>\n"),
    "kimi": _template(_KIMI[0], _KIMI_CALL, _KIMI[4]).replace("split('</think>')", "split('∎')"),
}
TOKENS = {
    "v3": [*_SECTION, *_OUTPUT, *_THINK],
    "v3.1": [*_SECTION, *_OUTPUT, *_THINK],
    "r1": [*_SECTION, *_OUTPUT, *_THINK],
    "kimi": [*_KIMI, *_OUTPUT],
}
