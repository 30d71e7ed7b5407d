"""Templates of the working folder run in a sandbox, with bounds; no folder's Python code runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import olpack

from olpack import templating, workers
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('pwned', 'w') }}",
    "{% for name in lipsum.__globals__ %}{{ name }}{% endfor %}",
    "{{ quoted.__globals__ }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_reaches_nothing_of_python(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OlpackError, match="The template fails: .*unsafe|The template fails: .*undefined|has no attribute"):
        templating.render(text, "x.j2", "The template", filters={"quoted": str})
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes longer than"),
        ("{% for a in range(99999) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}", "it writes more than"),
        ("{% set x = 'x' * 9999999999 %}", "it takes more than 1024 MiB of memory"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ 'a' | nothing }}", "No filter named 'nothing'"),
        ("{% if %}", "has an error in line 1"),
    ],
)
def test_a_template_without_end_is_ended(monkeypatch, text, reason):
    monkeypatch.setattr(templating.bounded.__wrapped__, "__defaults__", (0.5, templating.MEMORY))
    with pytest.raises(OlpackError, match=reason):
        templating.render(text, "x.j2", "The template")


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("recipe.yaml.j2", ("init", "mine", "--base", "builtin/tiny-coder", "--train", "train.jsonl")),
        ("Modelfile.j2", ("plan", "support")),
    ],
)
def test_templates_of_the_working_folder_run_nothing(tmp_path, file, command):
    package = tmp_path / "modelfiles/support"
    package.mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(24)]
    for folder in (tmp_path, package):
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (package / "recipe.yaml").write_text("base: builtin/tiny-coder\ndata: {train: train.jsonl}\n")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / file).write_text(ESCAPES[0])
    code, _, errors = olpack(tmp_path, *command)
    assert code == 1 and "is unsafe" in errors and not (tmp_path / "pwned").exists()


def test_a_worker_ignores_modules_of_the_working_folder(tmp_path):
    (tmp_path / "json.py").write_text("open('pwned', 'w')\n")
    subprocess.run([*workers.command("olpack"), "--version"], cwd=tmp_path, env=workers.environment(), check=True, capture_output=True)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import json'], check=True)"  # PYTHONSAFEPATH is inherited
    subprocess.run([sys.executable, "-P", "-c", child], cwd=tmp_path, env=workers.environment(), check=True)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    """A base whose folder holds Python code that its files ask to run."""
    base = tmp_path / "base"
    shutil.copytree(BUILTIN / "tiny-coder", base)
    (base / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    return base


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_code_of_a_model_folder_never_runs(custom, tmp_path):
    change(custom / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(OlpackError, match="code of its own"):
        Base("evil", custom).config  # noqa: B018
    assert not (tmp_path / "pwned").exists()


def test_a_known_model_type_is_transformers_own(custom, tmp_path):
    change(custom / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    change(custom / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    base = Base("evil", custom)
    assert base.config["model_type"] == "qwen3" and base.tokenizer()("a")["input_ids"]
    assert not (tmp_path / "pwned").exists()
