"""Every check of export, Modelfiles and comparison that depends on inputs only: `olpack plan` makes it, so that none fails after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from oracle import olpack

from olpack.model.base import BUILTIN

CHAT = (BUILTIN / "tiny-coder/chat_template.jinja").read_text()
RECIPE = {"base": "../../base", "data": {"train": "train.jsonl"}, "train": {"rank": 4}, "quants": ["Q8_0"], "compare": {"reference": False}}


def workspace(root: Path, name: str = "mine", template: str = CHAT, files: dict[str, str] | None = None, **changes) -> None:
    """A package on a copy of tiny-coder, with sections of its recipe changed and files beside it."""
    shutil.copytree(BUILTIN / "tiny-coder", root / "base")
    (root / "base/chat_template.jinja").write_text(template)
    package = root / "modelfiles" / name
    package.mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]} for n in range(40)]
    (package / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged = {key: {**value, **changes.pop(key, {})} if isinstance(value, dict) else changes.pop(key, value) for key, value in RECIPE.items()}
    (package / "recipe.yaml").write_text(json.dumps({**merged, **changes}))
    for path, text in (files or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


# (stage that would fail, what is changed, what is reported)
REFUSED = [
    ("export", {"name": "my-phi3"}, "takes a model with 'phi3' in its name for a Phi-3"),
    ("export", {"template": CHAT + "{# \0 #}"}, "as 'tokenizer.chat_template', and"),
    ("export", {"quants": ["IQ2_XXS"]}, "needs an importance matrix"),
    ("export", {"quants": ["Q4_K_M"], "export": {"tensor_types": {"attn_x": "q6_K"}}}, "has no tensor named like 'attn_x'"),
    ("export", {"export": {"importance": "matrix.gguf"}}, "which `export.importance` names"),
    ("export", {"export": {"importance": "matrix.gguf"}, "quants": ["Q4_K_M"], "files": {"modelfiles/mine/matrix.gguf": "no GGUF"}}, "matrix.gguf"),
    ("export", {"quants": ["0.1bpw"]}, "The smallest that is possible is"),
    ("modelfiles", {"files": {"templates/Modelfile.j2": "FROM {{ gguf }}\n"}, "modelfile": {"system": "Be brief."}}, "differs from the recipe"),
    ("modelfiles", {"files": {"templates/Modelfile.j2": "FROM {{ gguf\n"}}, "The Modelfile template has an error in line"),
    ("modelfiles", {"files": {"templates/Modelfile.j2": "FROM {{ nothing }}\n"}}, "The Modelfile template fails"),
    ("compare", {"files": {"templates/report.html.j2": "<p>{% if %}"}}, "The report's template has an error in line 1"),
    ("compare", {"compare": {"generated_tokens": 200}, "modelfile": {"parameters": {"num_ctx": 128}}}, "num_ctx"),
    ("compare", {"compare": {"tasks": "tasks.jsonl"}}, "tasks.jsonl"),
    (
        "compare",
        {
            "compare": {"tasks": [{"prompt": "1+1?", "function": "check.py:no_such"}], "run_answers": True},
            "files": {"modelfiles/mine/check.py": "def other(answer): return True\n"},
        },
        "no_such",
    ),
    (
        "compare",
        {
            "compare": {"tasks": [{"prompt": "1+1?", "exact": "2"}, {"prompt": "Write f.", "python_asserts": "assert f()"}]},
        },
        "compare.tasks: `python_asserts` of task 2 runs Python that the models write on this machine. Add `run_answers: true` below `compare:`",
    ),
    (
        "compare",
        {
            "compare": {"tasks": [{"prompt": "1+1?", "function": "check.py:no_such"}]},
            "files": {"modelfiles/mine/check.py": "raise SystemExit('it ran')\n"},
        },
        "check.py on this machine. Add `run_answers: true`",
    ),
    ("deploy", {"name": "a--b.c..d/e"}, "a--b"),
]


@pytest.mark.parametrize(("stage", "changes", "reported"), REFUSED, ids=[f"{stage}-{number}" for number, (stage, _, _) in enumerate(REFUSED)])
def test_what_a_later_stage_would_refuse_is_refused_by_plan(tmp_path, stage, changes, reported):
    if "/" in changes.get("name", ""):
        code, _, errors = olpack(tmp_path, "plan", changes["name"])
    else:
        workspace(tmp_path, **changes)
        code, _, errors = olpack(tmp_path, "plan", changes.get("name", "mine"))
    assert code in (1, 2) and reported in " ".join(errors.split()), errors
    assert "Traceback" not in errors


def test_the_plan_names_the_sandbox_of_answers(tmp_path):
    workspace(tmp_path, compare={"tasks": [{"prompt": "Write f.", "python_asserts": "assert f()"}]})
    code, printed, errors = olpack(tmp_path, "plan", "mine", "--set", "compare.run_answers=true")
    assert code == 0 and "their Python runs in a sandbox: 10 s, 1 GiB of memory" in " ".join(printed.split()), errors


def test_consent_to_run_answers_makes_no_comparison_stale(tmp_path, monkeypatch):
    from olpack import recipe
    from olpack.stages import compare
    from olpack.stages.build import Build

    workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("olpack.stages.deploy.exported_files", lambda build: {})
    path = tmp_path / "modelfiles/mine/recipe.yaml"
    without, given = (compare.inputs(Build(recipe.load(path, asked)), "compare") for asked in ([], ["compare.run_answers=true"]))
    assert without == given and "compare.tasks" in given and "compare.run_answers" not in given


def test_the_workspace_itself_is_planned_and_few_steps_are_a_warning(tmp_path):
    workspace(tmp_path)
    for epochs, few in ((1, True), (20, False)):
        code, _, errors = olpack(tmp_path, "plan", "mine", "--set", f"train.epochs={epochs}")
        assert code == 0 and ("few optimizer steps" in errors) == few, errors


def test_a_template_that_a_server_would_ignore_is_a_warning(tmp_path):
    """The base's template supports tools, the recipe's does not: a server runs the base's."""
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    workspace(tmp_path, template=tools, modelfile={"template": "{{ .System }}{{ .Prompt }}"})
    code, _, errors = olpack(tmp_path, "plan", "mine")
    assert code == 0 and "supports tools and modelfile.template does not" in " ".join(errors.split())
