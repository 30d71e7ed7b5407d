"""Removing takes what olpack made and leaves everything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble

from olpack.deploy import Package
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import Registered, TagFile, register
from olpack.deploy.remove import owned, remove

PACKAGE = Package(parameters={"num_ctx": 2048})


@pytest.fixture
def client(ollama_double: OllamaDouble) -> OllamaClient:
    return OllamaClient(ollama_double.url)


@pytest.fixture
def files(tmp_path: Path) -> list[TagFile]:
    made = [("q4_0", tmp_path / "coder-Q4_0.gguf", 2), ("q4_K_M", tmp_path / "coder-Q4_K_M.gguf", 15), ("f16", tmp_path / "x-F16.gguf", 1)]
    return [TagFile(tag, path, served_gguf.write(path, served_gguf.CHAT, kind, filling=kind)) for tag, path, kind in made]


@pytest.fixture
def records(client: OllamaClient, files: list[TagFile]) -> list[Registered]:
    return register(client, "coder", files[:2], PACKAGE, latest="q4_K_M")


def _names(client: OllamaClient) -> list[str]:
    return sorted(model.model for model in client.tags())


def test_all_of_a_package(ollama_double: OllamaDouble, client: OllamaClient, records: list[Registered]) -> None:
    assert owned(client, "coder", records) == ["coder:latest", "coder:q4_0", "coder:q4_K_M"]
    assert remove(client, "coder", records) == ["coder:latest", "coder:q4_0", "coder:q4_K_M"]
    assert _names(client) == []
    assert list((ollama_double.store.root / "blobs").iterdir()) == []
    assert remove(client, "coder", records) == []


def test_what_others_made_stays(client: OllamaClient, files: list[TagFile], records: list[Registered]) -> None:
    register(client, "other", files[:1], PACKAGE)
    client.copy("coder:q4_0", "coder:mine")
    client.copy("coder:q4_0", "me/coder:q4_0")
    client.create({"model": "coder:q4_0", "files": {"x.gguf": _uploaded(client, files[2])}})  # someone took our tag
    client.create({"model": "coder:f16", "files": {"x.gguf": _uploaded(client, files[2])}})
    assert remove(client, "coder", records) == ["coder:latest", "coder:q4_K_M"]
    assert _names(client) == ["coder:f16", "coder:mine", "coder:q4_0", "me/coder:q4_0", "other:q4_0"]


def test_a_latest_that_someone_set_stays(client: OllamaClient, files: list[TagFile], records: list[Registered]) -> None:
    client.create({"model": "coder:latest", "files": {"x.gguf": _uploaded(client, files[2])}})
    assert remove(client, "coder", records) == ["coder:q4_0", "coder:q4_K_M"]
    assert _names(client) == ["coder:latest"]


def test_another_packages_records_do_not_count(client: OllamaClient, files: list[TagFile], records: list[Registered]) -> None:
    others = register(client, "other", files[:1], PACKAGE)
    assert owned(client, "coder", others) == []
    assert owned(client, "other", [*records, *others]) == ["other:q4_0"]


def test_a_changed_prompt_is_still_ours(client: OllamaClient, records: list[Registered]) -> None:
    client.create({"model": "coder:q4_0", "from": "coder:q4_0", "system": "By hand."})
    assert "coder:q4_0" in owned(client, "coder", records)


def test_weights_that_the_server_rewrote(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    digest, other = f"sha256:{files[0].sha256}", "sha256:" + "a" * 64
    client.upload(files[0].path, digest)
    ollama_double.store.primed[digest] = dataclasses.replace(ollama_double.store.facts(digest), rewritten_as=other)
    assert remove(client, "coder", register(client, "coder", files[:1], PACKAGE)) == ["coder:q4_0"]


def _uploaded(client: OllamaClient, file: TagFile) -> str:
    client.upload(file.path, f"sha256:{file.sha256}")
    return f"sha256:{file.sha256}"
