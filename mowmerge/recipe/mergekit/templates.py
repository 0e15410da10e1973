"""The chat templates that mergekit has by name, as Jinja: the turns of each format."""

from __future__ import annotations

from collections.abc import Mapping

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_LLAMA3 = """\
{{ bos_token }}{% for message in messages %}\
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_EXAONE = """\
{% if messages and messages[0]['role'] != 'system' %}[|system|][|endofturn|]
{% endif %}{% for message in messages %}[|{{ message['role'] }}|]{{ message['content'] }}\
{{ '' if message['role'] == 'user' else '[|endofturn|]' }}
{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"""

# the system's words stand before the next instruction, as its format has no turn for them
_MISTRAL = """\
{{ bos_token }}{% set ahead = namespace(text='') %}{% for message in messages %}\
{% if message['role'] == 'system' %}{% set ahead.text = message['content'] + '\\n\\n' %}\
{% elif message['role'] == 'user' %}[INST] {{ ahead.text + message['content'] }} [/INST]\
{% set ahead.text = '' %}\
{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token }}\
{% endif %}{% endfor %}"""

_ALPACA = """\
{{ bos_token }}{% if not messages or messages[0]['role'] != 'system' %}\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

{% endif %}{% for message in messages %}\
{% if message['role'] == 'user' %}### Instruction:
{% elif message['role'] == 'assistant' %}### Response:
{% endif %}{{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' else '' }}

{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""

TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
