"""What every request begins with is rendered before training: the Modelfile's system prompt and messages before a question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from oracle import olpack

from olpack.model.base import BUILTIN

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS + ASK
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
    + TURNS
    + ASK
)
SILENT = TURNS.replace("<|im_start|>", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>", 1) + ASK


def package(root: Path, template: str, modelfile: dict) -> None:
    shutil.copytree(BUILTIN / "tiny-coder", root / "base")
    (root / "base/chat_template.jinja").write_text(template)
    folder = root / "modelfiles/support"
    folder.mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base": "../../base", "data": {"train": "train.jsonl"}, "quants": ["Q8_0"], "modelfile": modelfile, "compare": {"reference": False}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize(
    ("template", "modelfile", "said"),
    [
        (NO_SYSTEM, {"system": "Be brief."}, "(modelfile.system): System role not supported."),
        (NO_SYSTEM, {"messages": [{"role": "system", "content": "Be brief."}]}, "(modelfile.messages): System role not supported."),
        (ALTERNATE, {"messages": [USER]}, "(modelfile.messages): Roles must alternate."),
    ],
)
def test_a_beginning_that_the_template_refuses_is_refused_before_training(tmp_path, template, modelfile, said):
    package(tmp_path, template, modelfile)
    code, _, errors = olpack(tmp_path, "plan", "support")
    assert code == 1 and f"refuses what each request would begin with {said}" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("template", "modelfile"),
    [
        (NO_SYSTEM, {"messages": [USER, ASSISTANT]}),
        (ALTERNATE, {"messages": [USER, ASSISTANT]}),
        (NO_SYSTEM, {"system": "Be brief.", "template": "{{ .System }}{{ .Prompt }}"}),
    ],
)
def test_a_beginning_that_the_template_takes_or_never_gets_is_planned(tmp_path, template, modelfile):
    package(tmp_path, template, modelfile)
    code, _, errors = olpack(tmp_path, "plan", "support")
    assert code == 0 and "each request would begin with" not in errors


def test_a_system_prompt_that_the_template_leaves_out_is_a_warning(tmp_path):
    package(tmp_path, SILENT, {"system": "Be brief."})
    code, _, errors = olpack(tmp_path, "plan", "support")
    assert code == 0 and "does not write all of what each request would begin with (modelfile.system)" in " ".join(errors.split())
