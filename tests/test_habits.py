"""What people expect of every command line: quiet and verbose, no colours where they are not wanted, completion, `python -m`, stable JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from oracle import olpack
from snapshots import make_workspace

from olpack import progress
from olpack.commands.doctor import Finding, print_findings
from olpack.export.job import ExportedFile

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def normal_level():
    yield
    progress.show("normal")


def child(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OLLAMA_HOST": "http://127.0.0.1:9", **variables}
    return subprocess.run([sys.executable, "-m", "olpack", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--quiet", "init"], ["init", "-q"]])
def test_quiet_prints_the_result_alone(tmp_path, words):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    options = ["mine", "--base", "builtin/tiny-coder", "--train", "rows.jsonl"]
    assert olpack(tmp_path, *words, *options) == (0, "modelfiles/mine/recipe.yaml\n", "")


def test_quiet_leaves_warnings_and_errors(tmp_path, capsys):
    progress.show("quiet")
    progress.say("news")
    progress.detail("detail")
    with progress.task("work", total=2, unit="rows") as task:
        task.advance(2)
    progress.warn("look here")
    assert capsys.readouterr().err == "warning: look here\n"
    code, printed, error = olpack(tmp_path, "show", "nothing", "--quiet")
    assert code == 1 and not printed and "nothing" in error


def test_verbose_prints_requests(tmp_path, ollama_double: OllamaDouble):
    make_workspace(tmp_path)
    assert "/api/" not in olpack(tmp_path, "list", server=ollama_double.url)[2]
    assert f"GET {ollama_double.url}/api/version" in olpack(tmp_path, "list", "--verbose", server=ollama_double.url)[2]
    lines = olpack(tmp_path, "list", "-v", "--json", server=ollama_double.url)[2].splitlines()
    assert lines and all(json.loads(line)["event"] == "detail" for line in lines)
    assert olpack(tmp_path, "list", "-v", "-q")[0] == 2


def test_what_follows_two_dashes_is_no_option(tmp_path):
    code, _, error = olpack(tmp_path, "show", "--", "--quiet")
    assert code == 1 and "--quiet" in error


def test_no_colour_where_none_is_wanted(tmp_path, capsys, monkeypatch):
    make_workspace(tmp_path)
    findings = [Finding("torch", "broken", "not installed", "install it"), Finding("disk", "ready", "much")]
    colour = re.compile(r"\x1b\[[\d;]*(?:3[0-8]|4[0-8]|9\d|10\d)[;m]")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    print_findings(findings)
    assert colour.search(capsys.readouterr().out)
    monkeypatch.setenv("NO_COLOR", "1")
    print_findings(findings)
    assert not colour.search(capsys.readouterr().out)
    assert not colour.search("".join(olpack(tmp_path, "list")[1:]))


def test_python_m_olpack_completes_commands_packages_and_values(tmp_path):
    make_workspace(tmp_path)
    expected = {"olpack bui": "build", "olpack build sup": "support", "olpack build x --quant Q4_K": "Q4_K_M", "olpack build x --only d": "deploy"}
    for line, found in expected.items():
        completed = child(tmp_path, _OLPACK_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split()) - 1))
        assert found in completed.stdout.split() and not completed.stderr, line
    assert "_OLPACK_COMPLETE=complete_zsh" in child(tmp_path, _OLPACK_COMPLETE="source_zsh").stdout
    assert child(tmp_path, "--version").stdout.startswith("olpack 0.")


def test_the_page_for_programs_lists_the_keys_of_each_result(tmp_path):
    page = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    documented = {command: re.findall(r"`(\w+)`", keys) for command, keys in re.findall(r"^\| `olpack ([a-z ]+)` \| (.+?) \|$", page, re.MULTILINE)}
    make_workspace(tmp_path)
    assert list(json.loads(olpack(tmp_path, "list", "--json")[1])[0]) == documented["list"]
    assert list(vars(Finding("part", "ready", "detail"))) == documented["doctor"]
    assert [field.name for field in fields(ExportedFile)] == documented["quantize"]
    reference = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## olpack ([a-z ]+)\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL)
    assert {name for name, text in sections if "`--json`" in text} == set(documented)
