"""The text that people see of data and models, compared with the files in tests/data/snapshots (see `snapshots.py`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from snapshots import CHAT, check, make_workspace, terminal

TIMES = r"\b\d[\d.,]* (s|min|h)( \d\d (s|min))?(?!\w)|\b[\d.,]+ (rows|texts)/s"
WRONG_ROWS = {
    "no JSON": '{"messages": [{"role": "user", "content": "Hi"',
    "an unknown role": '{"messages": [{"role": "robot", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}',
    "no answer": '{"messages": [{"role": "user", "content": "Hi"}]}',
    "an empty answer": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}',
    "an unknown form": '{"question": "Hi", "response": "Hi"}',
    "a content that is a number": '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "Hi"}]}',
    "no rows": None,
}
WRONG_MODELS = [
    ["plan", "support", "--set", "data.train=rows.jsonl"],
    ["plan", "support", "--set", "base=./model"],
    ["plan", "support", "--set", "base=./modelfiles"],
    ["data", "show", "support", "9"],
    ["quantize", "notes.txt", "--quant", "Q4_K_M"],
]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


def test_a_plan(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check("plan", re.sub(TIMES, "TIME", terminal(workspace, "plan", "support")))


def test_errors_of_rows(workspace: Path) -> None:
    parts = []
    for title, row in WRONG_ROWS.items():
        (workspace / "modelfiles/support/chats.jsonl").write_text(f"{json.dumps(CHAT)}\n{row}\n" if row else "")
        parts.append(f"# {title}\n{terminal(workspace, 'plan', 'support')}")
    check("errors-rows", "\n\n".join(parts))


def test_errors_of_models(workspace: Path) -> None:
    (workspace / "notes.txt").write_text("Buy milk.\n")
    check("errors-models", "\n\n".join(terminal(workspace, *words) for words in WRONG_MODELS))
