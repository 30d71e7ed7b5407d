"""The commands of README.md, typed one after the other by somebody with a base, their chats and an Ollama server."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from oracle import olpack, write_base, write_rows

from olpack.deploy.client import OllamaClient

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_own_data_becomes_a_tag_that_ollama_runs(tmp_path, ollama_double):
    base = write_base(tmp_path / "base")
    write_rows(tmp_path / "chats.jsonl", 40)
    section = README.partition("## Your own data")[2].partition("\n## ")[0]
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^    ((?:olpack|ollama) .+)$", section, re.MULTILINE)]
    steps = [line for line in lines if "support" in line]
    assert [step[1] for step in steps] == ["init", "data", "plan", "build", "run"]
    for program, *words in steps[:-1]:
        words = [word.replace("Qwen/Qwen3-0.6B", str(base)) for word in words]
        code, printed, said = olpack(tmp_path, *words, server=ollama_double.url)
        assert program == "olpack" and code == 0, said
    assert "ollama run support:" in printed
    tags = {tag.model for tag in OllamaClient(ollama_double.url).tags()}
    assert steps[-1] == ["ollama", "run", "support"] and "support:latest" in tags
    results = json.loads((tmp_path / "build/support/compare/results.json").read_text(encoding="utf-8"))
    assert {quant["quant"] for quant in results["quants"]} == {"Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"}
