"""What `make install` and `make audit` trust: hashes, the compiled wheel in the cache, a database of vulnerabilities; and what extras add."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.utils import canonicalize_name

from olpack import installed
from olpack.data.hub import HubSet
from olpack.data.records import read_records
from olpack.errors import OlpackError
from olpack.llamacpp.source import ARCHIVE_SHA256
from olpack.workspace import file_digest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- hashes --------------------------------------------------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """(version, digests) by package."""
    text = (ROOT / ".ci/requirements" / name).read_text()
    found = re.findall(r"^([\w.-]+)==(\S+)[^\n]*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", text, re.MULTILINE)
    return {canonicalize_name(package): (version, re.findall("[0-9a-f]{64}", hashes)) for package, version, hashes in found}


def test_every_pin_but_torch_has_its_hashes():
    pinned = script("audit").pins(ROOT / "constraints.txt")
    parts = [locked("olpack.txt"), locked("test.txt"), locked("llama-cpp.txt")]
    assert len(pinned) > 100 and sum(map(len, parts)) == len(pinned) - 1
    assert {name: version for part in parts for name, (version, _) in part.items()} == {key: pinned[key] for key in pinned if key != "torch"}
    assert parts[2]["llama-cpp-python"][1] == [ARCHIVE_SHA256]


# -- the compiled wheel --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    with zipfile.ZipFile(path := folder / "llama_cpp_python-0-py3-none-any.whl", "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "")
    (folder / "sha256").write_text(file_digest(path) + "\n")
    for file in folder.iterdir():
        file.chmod(0o600)
    return path


def test_a_compiled_wheel_is_taken_again_if_it_is_as_it_was_written(wheel):
    kept = script("llama_cpp").kept
    assert kept(wheel.parent) == wheel
    data = bytearray(wheel.read_bytes())
    data[3] ^= 1
    wheel.write_bytes(data)
    assert kept(wheel.parent) is None
    assert kept(wheel.parent / "nowhere") is None


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("place", [".", "sha256", "llama_cpp_python-0-py3-none-any.whl"])
def test_a_compiled_wheel_that_others_could_have_written_is_not_taken(wheel, place):
    path = wheel.parent / place
    path.chmod(path.stat().st_mode | 0o020)
    assert script("llama_cpp").kept(wheel.parent) is None


def test_a_wheel_of_other_settings_or_compilers_is_another(monkeypatch):
    module = script("llama_cpp")
    keys = {module.key()}
    monkeypatch.setenv("CXXFLAGS", "-O1")
    keys.add(module.key())
    monkeypatch.setitem(module.SETTINGS, "GGML_NATIVE", "ON")
    keys.add(module.key())
    monkeypatch.setattr(module, "ARCHIVE_SHA256", "0" * 64)
    keys.add(module.key())
    assert len(keys) == 4


def test_another_archive_is_not_compiled(tmp_path):
    (archive := tmp_path / "llama.tar.gz").write_bytes(b"other")
    done = subprocess.run([sys.executable, ROOT / ".ci/llama_cpp.py", archive], capture_output=True, text=True)
    assert done.returncode == 1 and "is not the source archive of llama-cpp-python" in done.stderr and "Traceback" not in done.stderr


# -- the audit -----------------------------------------------------------------------------------------------------------------------------


def audit(*words: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, ROOT / ".ci/audit.py", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def record(number: int, name: str, **affected: object) -> str:
    return json.dumps({"id": f"PYSEC-{number}", "affected": [{"package": {"ecosystem": "PyPI", "name": name}, **affected}]})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with zipfile.ZipFile(path := tmp_path / "all.zip", "w") as archive:
        for number in range(1000):
            archive.writestr(f"PYSEC-{number}.json", record(number, f"package-{number}"))
    return path


def test_the_audit_reads_a_database(tmp_path, database):
    (pins := tmp_path / "constraints.txt").write_text("Jinja2==3.1.6\nnumpy==2.4.6  # fast\ntorch==2.13.0\n")
    assert audit("pip-audit", "--database", database, "--constraints", pins) == (0, "3 packages, 0 with known vulnerabilities\n", "")
    spans = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1.4"}, {"introduced": "3.1.5"}, {"last_affected": "3.1.6"}]}]
    with zipfile.ZipFile(database, "a") as archive:
        archive.writestr("a.json", record(2001, "jinja2", ranges=spans))
        archive.writestr("b.json", record(2002, "NumPy", versions=["2.4.6"]))
        archive.writestr("c.json", record(2003, "torch", ranges=[{"type": "ECOSYSTEM", "events": [{"introduced": "2.0"}, {"fixed": "2.13.0"}]}]))
    code, printed, _ = audit("pip-audit", "--database", database, "--constraints", pins)
    assert code == 1
    assert printed.splitlines() == ["jinja2 3.1.6: PYSEC-2001", "numpy 2.4.6: PYSEC-2002", "3 packages, 2 with known vulnerabilities"]


def test_the_audit_fails_where_it_proves_nothing(tmp_path, database):
    with zipfile.ZipFile(part := tmp_path / "part.zip", "w") as archive:
        archive.writestr("a.json", record(1, "jinja2"))
    for words in (["--database", part], ["--database", tmp_path / "nowhere"]):
        code, printed, error = audit("pip-audit", *words)
        assert code == 2 and not printed and "The audit proves nothing" in error and "make audit DATABASE=PATH" in error


@pytest.mark.parametrize(
    ("prints", "code", "text"),
    [
        ('{"dependencies": [{"name": "jinja2", "vulns": []}]}', 0, "1 packages, 0 with"),
        ('{"dependencies": [{"name": "jinja2", "vulns": [{"id": "CVE-1"}]}]}', 1, "jinja2 3.1.6: CVE-1"),
        ('{"dependencies": [{"name": "jinja2", "skip_reason": "not found"}]}', 2, "answers for 0 of 1 packages"),
        ("", 2, "pip-audit ended with exit code 0"),
    ],
)
def test_the_audit_asks_pypi(tmp_path, prints, code, text):
    (pins := tmp_path / "constraints.txt").write_text("Jinja2==3.1.6\n")
    (program := tmp_path / "pip-audit").write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    program.chmod(0o700)
    done, printed, error = audit(program, "--constraints", pins)
    assert done == code and text in printed + error


# -- extras and platforms ------------------------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_one_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (path := tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(OlpackError, match=r"Parquet files need the package pyarrow.*-m pip install pyarrow$"):
        list(read_records(path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OlpackError, match=r"Data sets of the Hub need the package datasets.*-m pip install datasets"):
        list(HubSet("me/set").rows())


def test_an_environment_of_uv_has_no_pip(tmp_path, monkeypatch):
    (tmp_path / "uv-receipt.toml").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert installed.install_command("pyarrow") == f"uv pip install --python {sys.executable} pyarrow"


def test_the_packages_of_the_core_are_required_and_those_of_extras_are_not():
    names = {re.split(r"[\[<>=]", text)[0] for text in PROJECT["dependencies"]}
    assert names >= {"ollama", "gguf", "llama-cpp-python", "torch", "transformers", "peft", "bitsandbytes", "jinja2", "typer"}
    assert not names & {"datasets", "pyarrow", "lm-eval"}


def test_the_pythons_of_the_classifiers_are_those_of_the_workflow():
    versions = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_no_module_imports_what_only_posix_has_while_it_is_loaded():
    """Windows has none of them; macOS has all."""
    for path in (ROOT / "olpack").rglob("*.py"):
        top = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not {"fcntl", "resource", "pwd", "grp", "termios"} & set(top), path
