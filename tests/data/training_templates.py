"""Chat templates in the style of five families, written for these tests, with `{% generation %}` for the judge.

The tags stand where a trainer's template would have them: behind the generation prompt, and behind the end of turn.
"""

import re

OWN = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<|im_start|>", "<|im_end|>", "<|im_system|>", "<|im_user|>",
    "<|im_assistant|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
"""Control tokens of the templates beside those that our own tokenizer has."""

FOUND_IN_TEXTS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are not special, as Qwen and DeepSeek-R1 have them."""

# System messages come first, wherever they stand; answers to tools follow without a role of their own.
_DEEPSEEK = """\
{%- set ns = namespace(system='', answering=false) -%}
{%- for m in messages if m.role == 'system' -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + m.content -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{ '<｜User｜>' + m.content }}
  {%- elif m.role == 'tool' -%}
    {%- if not ns.answering -%}{{ '<｜tool▁outputs▁begin｜>' }}{%- endif -%}
    {%- set ns.answering = true -%}
    {{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
  {%- elif m.role == 'assistant' -%}
    {%- if ns.answering -%}{{ '<｜tool▁outputs▁end｜>' }}{%- else -%}{{ '<｜Assistant｜>' }}{%- endif -%}
    {%- set ns.answering = false -%}
    {%- generation -%}
    CONTENT
    {%- if m.tool_calls -%}
      {{ '<｜tool▁calls▁begin｜>' }}
      {%- for call in m.tool_calls -%}
        {{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n'
           + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
        {%- if not loop.last -%}{{ '\\n' }}{%- endif -%}
      {%- endfor -%}
      {{ '<｜tool▁calls▁end｜>' }}
    {%- endif -%}
    {{ eos_token }}
    {%- endgeneration -%}
  {%- elif m.role != 'system' -%}
    {{ raise_exception('there is no role ' + m.role) }}
  {%- endif -%}
{%- endfor -%}
{%- if ns.answering -%}{{ '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt -%}{{ 'PROMPT' }}{%- endif -%}
"""
V3 = _DEEPSEEK.replace("CONTENT", "{{ m.content or '' }}").replace("PROMPT", "<｜Assistant｜>")
# Reasoning, which is part of the content, is dropped from every turn, and the prompt begins another.
R1 = _DEEPSEEK.replace(
    "CONTENT", "{%- if m.content is string -%}{{ m.content.split('</think>')[-1] }}{%- endif -%}"
).replace("PROMPT", "<｜Assistant｜><think>\\n")

KIMI_K2 = """\
{%- macro said(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
  {%- if loop.first and m.role != 'system' -%}<|im_system|>system<|im_middle|>Be kind.<|im_end|>{%- endif -%}
  {%- set name = m.get('name') or m.role -%}
  {%- if m.role == 'user' -%}<|im_user|>{{ name }}<|im_middle|>{{ said(m.content) }}<|im_end|>
  {%- elif m.role == 'assistant' -%}
    <|im_assistant|>{{ name }}<|im_middle|>
    {%- generation -%}
    {{ said(m.content) }}
    {%- if m.tool_calls -%}
      <|tool_calls_section_begin|>
      {%- for call in m.tool_calls -%}
        <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
        {%- if call.function.arguments is string -%}{{ call.function.arguments }}
        {%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}<|tool_call_end|>
      {%- endfor -%}
      <|tool_calls_section_end|>
    {%- endif -%}
    <|im_end|>
    {%- endgeneration -%}
  {%- elif m.role == 'tool' -%}
    <|im_system|>{{ name }}<|im_middle|>{{ '## Return of ' + m.tool_call_id + '\\n' }}{{ said(m.content) }}<|im_end|>
  {%- else -%}<|im_system|>{{ name }}<|im_middle|>{{ said(m.content) }}<|im_end|>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

# Reasoning is kept behind the last question alone; answers of tools stand in a turn of the user.
QWEN = """\
{%- if tools -%}
  {{ '<|im_start|>system\\n' }}{%- if messages and messages[0].role == 'system' -%}{{ messages[0].content + '\\n\\n' }}
  {%- endif -%}
  # Tools{%- for tool in tools -%}{{ '\\n' }}{{ tool | tojson }}{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' -%}
  {{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(last=messages | length - 1) -%}
{%- for m in messages[::-1] -%}
  {%- set at = messages | length - 1 - loop.index0 -%}
  {%- if not ns.found and m.role == 'user' and not m.content.startswith('<tool_response>') -%}
    {%- set ns.found = true -%}{%- set ns.last = at -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m.content if m.content is string else '' -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
  {%- elif m.role == 'assistant' -%}
    {%- set ns.reasoning = '' -%}{%- set ns.content = content -%}
    {%- if m.reasoning_content is string -%}{%- set ns.reasoning = m.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set ns.reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
      {%- set ns.content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{ '<|im_start|>' + m.role + '\\n' }}
    {%- generation -%}
    {%- if loop.index0 > ns.last and (loop.last or ns.reasoning) -%}
      {{ '<think>\\n' + ns.reasoning.strip('\\n') + '\\n</think>\\n\\n' + ns.content.lstrip('\\n') }}
    {%- else -%}{{ ns.content }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- if (loop.first and content) or not loop.first -%}{{ '\\n' }}{%- endif -%}
      {%- set f = call.function or call -%}
      {{ '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
      {%- if f.arguments is string -%}{{ f.arguments }}{%- else -%}{{ f.arguments | tojson }}{%- endif -%}
      {{ '}\\n</tool_call>' }}
    {%- endfor -%}
    {{ '<|im_end|>' }}
    {%- endgeneration -%}
    {{ '\\n' }}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\\n' }}{%- if enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""

# Contents are trimmed; what a tool answers becomes JSON; tools are listed in the first message of the user.
LLAMA_3 = """\
{{- '<|begin_of_text|>' }}
{%- set ns = namespace(listed=not tools) %}
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
    {%- if m.content is iterable %}{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}
    {{- '<|eot_id|>' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {%- generation %}
    {%- if m.tool_calls %}
      {%- for call in m.tool_calls %}
        {{- '{"name": "' + call.function.name + '", "parameters": ' }}{{- call.function.arguments | tojson }}{{- '}' }}
      {%- endfor %}
    {%- else %}{{- m.content | trim }}{%- endif %}
    {{- '<|eot_id|>' }}
    {%- endgeneration %}
  {%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.role == 'user' and not ns.listed %}
      {%- set ns.listed = true %}
      {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {%- endif %}
    {{- m.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

FAMILIES = {"v3": V3, "r1": R1, "kimi-k2": KIMI_K2, "qwen": QWEN, "llama-3": LLAMA_3}


def without_generation_tags(source: str) -> str:
    """The same template, without what it has for training."""
    source = re.sub(r"\{%(-?) generation (-?)%\}", r"{%\1 if true \2%}", source)
    return re.sub(r"\{%(-?) endgeneration (-?)%\}", r"{%\1 endif \2%}", source)
