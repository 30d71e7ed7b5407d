"""Bases whose chat template writes tools, made of bases whose template does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TEMPLATE = """\
{%- if tools %}<|im_start|>system
Call a function as <tool_call>{"name": …, "arguments": …}</tool_call>. The functions:
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def with_tools(base: Path, folder: Path) -> Path:
    """A copy of a model's folder, made once, with `TEMPLATE` as its chat template."""
    if not folder.is_dir():
        shutil.copytree(base, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
