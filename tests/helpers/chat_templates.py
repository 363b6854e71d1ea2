"""Chat templates with the rules of published ones, in short."""

from __future__ import annotations

_TURNS = (
    "{% set ns = namespace(i=0) %}{% for m in rest %}{% if SKIPPED %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
)
_SPLIT = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
)
_NINE = (
    "{% if ID is not defined or ID|length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
)

# Mistral 7B v0.3: the system message is part of the last message, if that is the user's.
MISTRAL_7B = (
    _SPLIT + _TURNS.replace("SKIPPED", "not (m.role == 'tool' or m.tool_calls is defined)")
    + "<s>{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == (rest | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}"
    + _NINE.replace("ID", "c.id") + ', "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}'
    "{% endfor %}]</s>{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% elif m.role == 'tool' %}" + _NINE.replace("ID", "m.tool_call_id")
    + "[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% else %}"
    "{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)  # fmt: skip
# Mistral Small: system messages anywhere, no tools.
MISTRAL_SMALL = (
    _SPLIT + "<s>{% if system is defined %}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}{{ raise_exception('only user, system and assistant') }}{% endif %}{% endfor %}"
)
# Ministral 3: a user after a result is refused, and an empty message of the assistant.
MINISTRAL_3 = (
    _SPLIT + "<s>{% if system is defined %}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]{% endif %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + _TURNS.replace("SKIPPED", "m.role == 'user' or (m.role == 'assistant' and not m.tool_calls)")
    + "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{% if not m.content and not m.tool_calls %}"
    "{{ raise_exception('content or calls') }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ a if a is string else a | tojson }}{% endfor %}</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}"
    "{{ raise_exception('only user, assistant and tool roles') }}{% endif %}{% endfor %}"
)  # fmt: skip
_GEMMA = (
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and system is defined %}{{ system }}\n\n{% endif %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{{ p.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_3 = "<bos>" + _SPLIT + _GEMMA
GEMMA_2 = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set rest = messages %}" + _GEMMA
)
QWEN_35 = (
    "{% macro text(c) %}{% if c is string %}{{ c }}{% elif c %}{% for p in c %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% if tools %}<|im_start|>system\n# Tools\n{{ tools | tojson }}\n<tool_call>\n<function=x>\n"
    "{% if messages[0].role == 'system' %}{{ text(messages[0].content) | trim }}{% endif %}"
    "<|im_end|>\n{% elif messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ text(messages[0].content) | trim }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(query=false) %}{% for m in messages %}{% if m.role == 'user' and not "
    "text(m.content).startswith('<tool_response>') %}{% set ns.query = true %}{% endif %}"
    "{% endfor %}"
    "{% if not ns.query %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ text(m.content) | trim }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ text(m.content) | trim }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ text(m.content) }}\n</tool_response><|im_end|>\n{% else %}"
    "{{ raise_exception('Unexpected message role.') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "[system]{{ system }}{% if tools %}{% if not messages %}"
    "{{ raise_exception('no first user message') }}{% endif %}[user]{% for t in tools %}"
    "{{ t | tojson }}{% endfor %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls|length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}[assistant]"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}[ipython]{{ m.content | tojson }}{% else %}"
    "[{{ m.role }}]{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_ANY = "{% for m in messages %}<{{ m.role }}>CONTENT{% endfor %}<assistant>"
TEMPLATES = {
    "mistral 7b": MISTRAL_7B,
    "mistral small": MISTRAL_SMALL,
    "ministral 3": MINISTRAL_3,
    "gemma 3": GEMMA_3,
    "gemma 2": GEMMA_2,
    "qwen 3.5": QWEN_35,
    "llama 3": LLAMA_3,
    # The default model's: any role, and no calls.
    "smollm 2": _ANY.replace("CONTENT", "{{ m.content }}"),
    "no system": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}<assistant>",
    "only the first system": "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}<assistant>",
    "list contents": _ANY.replace("CONTENT", "{% for p in m.content %}{{ p.text }}{% endfor %}"),
    # DeepSeek's: arguments are JSON text.
    "text arguments": _ANY.replace(
        "CONTENT", "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + "
        "c.function.arguments }}{% endfor %}{{ m.content or '' }}",
    ),
    "printed arguments": _ANY.replace(
        "CONTENT", "{% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{{ c.function.arguments }}{% endfor %}{{ m.content or '' }}",
    ),
}  # fmt: skip
