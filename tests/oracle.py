"""The package `oracle` on a small model, in a working folder of its own, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from tiny_models import write_model

from olpack import cli, progress

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """\
base: {base}
data: {{train: train.jsonl, eval: eval.jsonl}}
train: {{epochs: 12, batch_size: 4, learning_rate: 1e-2, rank: 8}}
quants: [Q4_K_M, Q8_0]
modelfile:
  system: Answer in words.
  parameters: {{temperature: 0.0, num_ctx: 128}}
compare: {{prompt_tokens: [32], generated_tokens: 8, repeats: 1}}
"""


def write_rows(path: Path, count: int, first: int = 0) -> None:
    lines = []
    for number in range(first, first + count):
        turns = [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": "forty-two"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_base(folder: Path) -> Path:
    write_model(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    return folder


def make_workspace(root: Path, base: Path) -> Path:
    package = root / "modelfiles/oracle"
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text(RECIPE.format(base=base))
    write_rows(package / "train.jsonl", 12)
    write_rows(package / "eval.jsonl", 4, first=100)
    return root


def olpack(folder: Path, *words: str, server: str = "http://127.0.0.1:9", columns: int = 200) -> tuple[int, str, str]:
    """Run the command line in this process; (exit code, stdout, stderr). Port 9 answers nobody."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("OLLAMA_HOST", server)
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", ["olpack", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    progress.use("lines")
    return code, out.getvalue(), err.getvalue()


def files(folder: Path) -> dict[str, int]:
    """When each file was written, by its path; of the lock, which some versions of filelock write anew or remove, only that it is there."""
    found = {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: 0 if Path(name).name == ".lock" else time for name, time in found.items()}
