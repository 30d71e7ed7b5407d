"""Snapshots: files in tests/data/snapshots with the text that people see. `OLPACK_UPDATE_SNAPSHOTS=1` writes them anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from oracle import olpack

FOLDER = Path(__file__).parent / "data/snapshots"
RECIPE = """\
base: builtin/tiny-coder
data: {train: chats.jsonl, eval_share: 0.25}
train: {epochs: 2, batch_size: 4}
quants: [Q4_K_M, Q8_0]
modelfile:
  system: Answer in words.
  parameters: {temperature: 0.0, num_ctx: 512, num_predict: 64}
"""
CHAT = {"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "two"}]}


def check(name: str, text: str) -> None:
    """Compare a text with its snapshot.

    Raises:
        AssertionError: it differs.
    """
    path = FOLDER / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"
    if os.environ.get("OLPACK_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"There is no {path}: OLPACK_UPDATE_SNAPSHOTS=1 writes it."
    assert text.splitlines() == path.read_text(encoding="utf-8").splitlines(), f"{path} differs: OLPACK_UPDATE_SNAPSHOTS=1 writes it anew."


def make_workspace(root: Path) -> Path:
    """A working folder with the package `support`: a recipe and eight chats."""
    package = root / "modelfiles/support"
    package.mkdir(parents=True)
    (package / "recipe.yaml").write_text(RECIPE)
    rows = [json.dumps(CHAT).replace("1 + 1", f"{number} + 1") for number in range(8)]
    (package / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return root


def terminal(folder: Path, *words: str, server: str = "http://127.0.0.1:9", columns: int = 100) -> str:
    """What a terminal shows of a command: the command, its output, its errors, and an exit code that is not 0."""
    code, out, err = olpack(folder, *words, server=server, columns=columns)
    shown = " ".join(f"'{word}'" if re.search(r"[^\w./=:,-]", word) else word for word in words)
    text = "\n".join(filter(None, [f"$ olpack {shown}", err.rstrip(), out.rstrip(), f"[exit code {code}]" if code else ""]))
    return text.replace(str(folder), "FOLDER").replace(server, "http://SERVER")
