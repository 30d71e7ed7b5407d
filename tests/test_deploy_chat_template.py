"""The protected chat template renders what training rendered, whatever the server sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import served_gguf
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ollama_double_store import CHATML, edits

from olpack.errors import OlpackError
from olpack.model.chat_template import UNDEFINED, pins_for, protect, read_chat_template

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": " U\n"}]
SERVER = {"enable_thinking": True, "thinking": True, "date_string": "22 Nov 2026", "datetime": "Nov 22 2026"}

TEMPLATES = {
    "chatml": CHATML.jinja,
    "starts with a statement": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "starts with a stripping statement": "{%- for m in messages -%}{{ m.content }}{%- endfor -%}",
    "starts with an expression": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "starts with text": "BEGIN\n{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n",
    "starts with a line end": "\n{% for m in messages %}{{ m.content }}{% endfor %}",
    "starts with line ends and spaces": "\n\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\nend",
    "starts with spaces": "   {% if messages %}x{% endif %}",
    "starts with spaces before text": "   text{% if messages %}x{% endif %}",
    "starts with a comment": "{# a comment #}\n{% for m in messages %}{{ m.content }}{% endfor %}",
    "thinking where it is on": "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}",
    "thinking unless it is off": "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{{ messages[0].content }}",
    "thinking off only where it is false": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}x",
    "thinking by another name": "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ 'on' if thinking else 'off' }}",
    "a date with a default": "{% if not date_string is defined %}{% set date_string = '1 Jul 2024' %}{% endif %}Today {{ date_string }}",
    "a date by filter": "Today: {{ date_string | default('unknown') }}",
    "a macro that looks at it": "{% macro head() %}{{ 'on' if enable_thinking else 'off' }}{% endmacro %}{{ head() }}",
    "a namespace that holds it": "{% set ns = namespace(t=enable_thinking) %}{% set ns.u = ns.t %}{{ ns.u or 'off' }}",
}


def _render(template: str, **variables: object) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=MESSAGES, bos_token="<s>", add_generation_prompt=True, **variables)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_rendering_is_that_of_training(template: str) -> None:
    protected = protect(template, pins_for(template))
    expected = _render(template)
    assert _render(protected) == expected
    assert _render(protected, **SERVER) == expected
    assert protected.endswith(template)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_it_is_far_from_what_it_was(template: str) -> None:
    assert edits(template, protect(template, {}), 100) == 100


def test_only_variables_that_the_template_names_are_pinned() -> None:
    assert pins_for("{{ messages }}", ["bos_token"]) == {}
    assert pins_for("{{ enable_thinking }}{{ date_string }}") == {"enable_thinking": UNDEFINED, "date_string": UNDEFINED}
    assert pins_for("{{ bos_token }}{{ eos_token }}", ["bos_token"]) == {"bos_token": '""'}
    assert pins_for("{{ my_thinking_part }}") == {}


def test_reading_it_from_a_file(tmp_path: Path) -> None:
    template = protect(served_gguf.CHAT, {"enable_thinking": UNDEFINED})
    served_gguf.write(tmp_path / "with.gguf", template)
    served_gguf.write(tmp_path / "without.gguf", None)
    assert read_chat_template(tmp_path / "with.gguf") == template
    assert read_chat_template(tmp_path / "without.gguf") is None


def test_reading_what_is_no_gguf(tmp_path: Path) -> None:
    served_gguf.write(tmp_path / "whole.gguf", served_gguf.CHAT)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:500])
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    for name in ("short", "other", "absent"):
        with pytest.raises(OlpackError, match=f"{name}.gguf"):
            read_chat_template(tmp_path / f"{name}.gguf")
