"""`olpack doctor`: each part of the machine, ready and not, with the command that fixes it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from oracle import olpack

from olpack import __version__
from olpack.commands import doctor
from olpack.errors import OlpackError

PARTS = [
    "olpack", "torch", "transformers", "peft", "bitsandbytes", "llama-cpp-python", "gguf", "jinja2", "typer",
    "GPU", "4-bit training", "llama.cpp", "K-quants", "converter", "Ollama", "disk",
]  # fmt: skip


def findings(folder: Path, server: str = "http://127.0.0.1:9") -> tuple[int, dict[str, dict]]:
    """The exit code, and the findings by the name of the part."""
    code, printed, _ = olpack(folder, "doctor", "--json", server=server)
    return code, {finding["part"]: finding for finding in json.loads(printed)}


def test_this_machine_is_ready(tmp_path: Path, ollama_double: OllamaDouble) -> None:
    code, parts = findings(tmp_path, ollama_double.url)
    assert code == 0 and list(parts) == PARTS
    assert not [part for part in parts.values() if part["state"] == "broken"]
    assert all(bool(part["remedy"]) is (part["state"] == "missing") for part in parts.values())
    assert parts["olpack"]["detail"].startswith(f"{__version__} on Python {sys.version_info.major}.{sys.version_info.minor}")
    assert parts["torch"]["detail"] == version("torch")
    assert parts["Ollama"]["state"] == "ready" and ollama_double.url in parts["Ollama"]["detail"]
    assert parts["4-bit training"]["detail"].startswith("NF4 round trip on c")
    assert not list(tmp_path.glob("build*"))


def test_without_a_server_it_is_ready_too(tmp_path: Path) -> None:
    code, parts = findings(tmp_path)
    assert code == 0 and parts["Ollama"]["state"] == "missing"
    assert "127.0.0.1:9" in parts["Ollama"]["detail"] and "ollama serve" in parts["Ollama"]["remedy"]


@pytest.mark.parametrize(("package", "remedy"), [("peft", "-m pip install peft"), ("llama-cpp-python", "GGML_NATIVE=OFF")])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, remedy: str) -> None:
    def installed(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", installed)
    code, parts = findings(tmp_path)
    assert code == 1 and [part for part, finding in parts.items() if finding["state"] == "broken"] == [package]
    assert parts[package]["detail"] == "not installed" and remedy in parts[package]["remedy"]
    code, printed, _ = olpack(tmp_path, "doctor")
    assert code == 1 and remedy in printed and printed.count("✗") == 1


def test_a_torch_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, parts = findings(tmp_path)
    assert code == 1
    assert parts["GPU"]["state"] == parts["4-bit training"]["state"] == "broken"
    assert "torch" in parts["GPU"]["detail"] and parts["GPU"]["remedy"]
    assert parts["llama.cpp"]["state"] == "ready"


def test_a_bitsandbytes_that_rounds_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional
    import torch

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, state: torch.zeros(50, 48))
    code, parts = findings(tmp_path)
    assert code == 1 and parts["4-bit training"]["state"] == "broken"
    assert "loses 0." in parts["4-bit training"]["detail"] and "bitsandbytes" in parts["4-bit training"]["remedy"]


def test_a_llama_cpp_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise OlpackError("The check crashed (SIGILL): it printed no reason", "Install the portable build.")

    monkeypatch.setattr("olpack.llamacpp.probe.check_library", crash)
    code, parts = findings(tmp_path)
    assert code == 1 and parts["llama.cpp"] == {
        "part": "llama.cpp",
        "state": "broken",
        "detail": "The check crashed (SIGILL): it printed no reason",
        "remedy": "Install the portable build.",
    }


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olpack.llamacpp.library.k_quants_are_compiled", lambda: False)
    code, parts = findings(tmp_path)
    assert code == 0 and parts["K-quants"]["state"] == "missing" and "CXX" in parts["K-quants"]["remedy"]


def test_a_converter_that_is_not_where_the_variable_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLPACK_LLAMA_CPP", str(tmp_path))
    code, parts = findings(tmp_path)
    assert code == 1 and parts["converter"]["state"] == "broken"
    assert "OLPACK_LLAMA_CPP" in parts["converter"]["detail"] and parts["converter"]["remedy"]


def test_a_converter_that_is_not_fetched_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLPACK_LLAMA_CPP", raising=False)
    monkeypatch.setattr("olpack.llamacpp.source.cached_source", lambda: None)
    code, parts = findings(tmp_path)
    assert code == 0 and parts["converter"]["state"] == "missing"
    assert "first export fetches it" in parts["converter"]["detail"] and "OLPACK_LLAMA_CPP" in parts["converter"]["remedy"]
    monkeypatch.setattr("olpack.llamacpp.source.cached_source", lambda: tmp_path)
    assert findings(tmp_path)[1]["converter"]["detail"] == str(tmp_path)


def test_a_server_that_is_too_old(tmp_path: Path, ollama_double: OllamaDouble) -> None:
    ollama_double.faults.version = "0.12.3"
    code, parts = findings(tmp_path, ollama_double.url)
    assert code == 1 and parts["Ollama"]["state"] == "broken"
    assert "0.12.3" in parts["Ollama"]["detail"] and "https://ollama.com/download" in parts["Ollama"]["remedy"]


def test_an_address_that_is_none(tmp_path: Path) -> None:
    code, parts = findings(tmp_path, "http://127.0.0.1:port")
    assert code == 1 and parts["Ollama"]["state"] == "broken" and "OLLAMA_HOST" in parts["Ollama"]["detail"] + parts["Ollama"]["remedy"]
