"""`olpack list`: packages, merged and adapters, with what of each is built and what the server has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble
from oracle import olpack

from olpack.deploy import Package, render
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import TagFile, register
from olpack.workspace import template_source

PACKAGE = Package(parameters={"num_ctx": 512})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """`prophet`, an adapter beside the quants of a base; `seer`, another on that base; `oracle`, of which nothing is built."""
    for name in ("prophet", "seer", "oracle"):
        folder = tmp_path / "modelfiles" / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("base: builtin/tiny-coder\ndata: {train: rows.jsonl}\npackage: adapter\n")
    base = tmp_path / "build/bases/model-1234abcd"
    (base / "gguf").mkdir(parents=True)
    for quant, filling in (("Q8_0", 4000), ("Q4_K_M", 10)):
        (base / f"gguf/{base.name}-{quant}.gguf").write_bytes(bytes(filling))
    for name, tags in (("prophet", {"q4_K_M": "Q4_K_M", "q8_0": "Q8_0"}), ("seer", {"q8_0": "Q8_0"})):
        build = tmp_path / "build" / name
        for folder in ("gguf", "modelfiles", "adapter", "stages"):
            (build / folder).mkdir(parents=True)
        adapter = build / f"gguf/{name}-adapter.gguf"
        adapter.write_bytes(bytes(300))
        (build / "adapter/adapter_config.json").write_text("{}")
        for tag, quant in tags.items():
            source = Path(f"../../bases/{base.name}/gguf/{base.name}-{quant}.gguf")
            text = render(PACKAGE, source, template_source("Modelfile.j2"), Path("../gguf") / adapter.name)
            (build / f"modelfiles/{tag}.Modelfile").write_text(text)
    return tmp_path


def rows(folder: Path, *words: str, **server: str) -> dict[str, dict]:
    code, printed, errors = olpack(folder, "list", "--json", *words, **server)
    assert code == 0, errors
    return {row["name"]: row for row in json.loads(printed)}


def test_an_adapter_package_has_the_quants_of_its_base(workspace: Path) -> None:
    packages = rows(workspace)
    assert packages["prophet"]["quants"] == {"adapter": 300, "Q4_K_M": 10, "Q8_0": 4000}
    assert packages["seer"]["quants"] == {"adapter": 300, "Q8_0": 4000}  # only those that its Modelfiles name
    assert packages["oracle"]["quants"] == {}
    assert [packages[name]["trained"] for name in ("prophet", "seer", "oracle")] == [True, True, False]
    assert packages["prophet"]["registered"] is None
    assert packages["coding-assistant"]["shipped"] and not packages["prophet"]["shipped"]
    _, printed, _ = olpack(workspace, "list")
    assert "Q4_K_M 10" in printed and "adapter 300" in printed and "no server" in printed and "bases" not in printed


def test_quants_of_a_base_that_are_gone_are_not_listed(workspace: Path) -> None:
    next(workspace.glob("build/bases/*/gguf/*Q8_0.gguf")).unlink()
    assert list(rows(workspace)["prophet"]["quants"]) == ["adapter", "Q4_K_M"]
    assert list(rows(workspace)["seer"]["quants"]) == ["adapter"]


def test_a_modelfile_that_cannot_be_read_hides_nothing_else(workspace: Path) -> None:
    (workspace / "build/prophet/modelfiles/q4_K_M.Modelfile").write_text("FROM\n")
    (workspace / "build/seer/modelfiles/q8_0.Modelfile").write_bytes(b"\xff\xfe")
    packages = rows(workspace)
    assert list(packages["prophet"]["quants"]) == ["adapter", "Q8_0"] and list(packages["seer"]["quants"]) == ["adapter"]


def test_the_recommended_quant(workspace: Path) -> None:
    record = workspace / "build/prophet/stages/compare.json"
    for text, recommended in (('{"inputs": {}, "outputs": {}, "result": {"recommended": "q8_0"}}', "q8_0"), ('{"result": {}}', None), ("{", None)):
        record.write_text(text)
        assert rows(workspace)["prophet"]["recommended"] == recommended


def test_a_build_in_another_folder(workspace: Path) -> None:
    (workspace / "build").rename(workspace / "elsewhere")
    assert rows(workspace)["prophet"]["quants"] == {}
    assert list(rows(workspace, "--out", "elsewhere")["prophet"]["quants"]) == ["adapter", "Q4_K_M", "Q8_0"]


def test_tags_of_the_server_belong_to_the_package_of_their_name(workspace: Path, ollama_double: OllamaDouble, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    made = TagFile("q8_0", file, served_gguf.write(file, served_gguf.CHAT, 7))
    client = OllamaClient(ollama_double.url)
    for name in ("Prophet", "prophet-2"):
        register(client, name, [made], PACKAGE)
    packages = rows(workspace, server=ollama_double.url)
    assert sorted(packages["prophet"]["registered"]) == ["Prophet:q8_0"]
    assert packages["seer"]["registered"] == []
    _, printed, _ = olpack(workspace, "list", server=ollama_double.url)
    assert "Prophet:q8_0" in printed and "prophet-2" not in printed and "no server" not in printed
