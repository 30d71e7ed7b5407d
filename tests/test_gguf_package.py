"""From a model of the server to a fine-tuned one: plan, build, check, list and remove, and what may happen in between."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_gguf
from ollama_double import OllamaDouble
from oracle import CHAT, make_workspace, olpack

from olpack.deploy import parse
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.llamacpp.engine import Engine
from olpack.quants import quant_type

PLAIN = "{#- " + "a template that no server knows. " * 4 + "-#}" + CHAT


def said(result: tuple[int, str, str], code: int = 0) -> str:
    assert result[0] == code, result[2]
    return " ".join(f"{result[1]} {result[2]}".split())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two packages on `tiny:1b`, the first of which is built, and the server."""
    root = tmp_path_factory.mktemp("gguf")
    file = write_gguf(root, PLAIN)
    make_workspace(root, Path("ollama/tiny:1b"))
    recipe = root / "modelfiles/oracle/recipe.yaml"
    text = re.sub(r"quants: .*\n", "package: adapter\n", recipe.read_text().replace("epochs: 12", "epochs: 1"))
    recipe.write_text(text.replace("compare: {", "compare: {reference: false, "))
    with OllamaDouble(root / "server") as double, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_MODELS", str(double.store.root))
        for module in ("model.gguf_files", "deploy.served_template", "stages.deploy"):  # the converter stays where it is
            patch.setattr(f"olpack.{module}.user_cache", lambda: root / "cache")
        patch.setattr("olpack.deploy.ollama_store._OF_SERVICES", ())
        double.store.known = []
        client = OllamaClient(double.url)
        client.upload(file, digest := blob_digest(file))
        client.create({"model": "tiny:1b", "files": {"base.gguf": digest}, "parameters": {"top_k": 9}})
        size = sum(path.stat().st_size for path in double.store.root.rglob("*") if path.is_file())
        planned = said(olpack(root, "plan", "oracle", server=double.url))
        assert "base tiny:1b: Q4_K_M, " in planned and "it is neither downloaded nor copied" in planned
        assert "created by the server from tiny:1b" in planned
        assert "texts become the same tokens in llama.cpp" in planned and "tiny:1b: prompt identical" in planned
        assert not (root / "build").exists()
        double.requests.clear()
        said(olpack(root, "build", "oracle", server=double.url))
        yield root, double, file, size


def on_server(double: OllamaDouble) -> list[str]:
    return sorted(tag.model for tag in OllamaClient(double.url).tags())


def test_nothing_of_the_base_is_sent_or_copied(workspace):
    root, double, file, size = workspace
    adapter = root / "build/oracle/gguf/oracle-adapter.gguf"
    assert [path.name for path in (root / "build").rglob("*.gguf")] == [adapter.name] and not (root / "build/bases").exists()
    [blob] = [request for request in double.requests if request.method == "POST" and request.path.startswith("/api/blobs/")]
    [create] = [request for request in double.requests if request.path == "/api/create"]
    assert blob.sent == adapter.stat().st_size and create.sent < 1000 and create.body["from"] == "tiny:1b"
    grown = sum(path.stat().st_size for path in double.store.root.rglob("*") if path.is_file()) - size
    assert grown < adapter.stat().st_size + 5000
    shown = OllamaClient(double.url).show("oracle")
    assert shown is not None and shown.blob == blob_digest(file) and shown.adapter == blob_digest(adapter)
    assert shown.parameters == {"top_k": 9, "temperature": 0, "num_ctx": 128} and shown.system == "Answer in words."
    read = parse((root / "build/oracle/modelfiles/q4_K_M.Modelfile").read_text())
    assert read.source == "tiny:1b" and read.adapter == "../gguf/oracle-adapter.gguf"
    results = json.loads((root / "build/oracle/compare/results.json").read_text())
    assert [quant["quant"] for quant in results["quants"]] == ["Q4_K_M"]


def test_a_second_build_does_nothing(workspace):
    root, double, *_ = workspace
    assert "up to date" in said(olpack(root, "build", "oracle", server=double.url))
    assert "prompt identical" in said(olpack(root, "deploy", "oracle", "--check", server=double.url))
    double.requests.clear()
    assert "deploy done" in said(olpack(root, "deploy", "oracle", "--set", "modelfile.system=Be brief.", server=double.url))
    assert double.count("POST", "/api/blobs/") == 0 and OllamaClient(double.url).show("oracle:q4_K_M").system == "Be brief."
    said(olpack(root, "deploy", "oracle", server=double.url))


def test_the_list_shows_what_is_shared_and_remove_leaves_it(workspace):
    root, double, *_ = workspace
    other = root / "modelfiles/prophet"
    other.mkdir(exist_ok=True)
    for path in (root / "modelfiles/oracle").iterdir():
        (other / path.name).write_text(path.read_text())
    said(olpack(root, "build", "prophet", "--only", "modelfiles", server=double.url))
    printed = said(olpack(root, "list", server=double.url))
    assert printed.count("tiny:1b") == 2 and "shared by 2 packages" in printed
    rows = json.loads(olpack(root, "list", "--json", server=double.url)[1])
    assert {row["name"]: row["base"] for row in rows} == {"coding-assistant": None, "oracle": "tiny:1b", "prophet": "tiny:1b"}
    assert on_server(double) == ["oracle:latest", "oracle:q4_K_M", "tiny:1b"]
    said(olpack(root, "remove", "oracle", "--yes", server=double.url))
    assert on_server(double) == ["tiny:1b"]
    said(olpack(root, "deploy", "oracle", server=double.url))
    assert on_server(double) == ["oracle:q4_K_M", "tiny:1b"]


def test_the_adapter_is_weighed_against_the_merged_file(workspace):
    """With and without it, embedded and through the server; merged, it is written for a while, and measured on the same rows."""
    root, double, file, _ = workspace
    folder, adapter = root / "build/oracle/compare", root / "build/oracle/gguf/oracle-adapter.gguf"
    [built] = json.loads((folder / "results.json").read_text())["quants"]
    assert [speed["engine"].split()[0] for speed in built["adapter"]["speeds"]] == ["llama-cpp-python", "Ollama"]
    assert built["adapter"]["size_bytes"] == adapter.stat().st_size == built["size_bytes"] - file.stat().st_size
    assert built["adapter"]["merged"] is None and built["speed"]["engine"].startswith("Ollama")
    assert "compare.merged" not in json.loads((root / "build/oracle/stages/compare.json").read_text())["inputs"]  # earlier comparisons stay
    asked = ["compare", "oracle", "--set", "compare.merged=true", "--set", "compare.reference=true"]
    printed = said(olpack(root, *asked, server=double.url))
    assert "Q4_K_M merged" in printed and "Q4_K_M: the adapter costs " in printed and "of KL divergence in place of" in printed
    results = json.loads((folder / "results.json").read_text())
    [quant] = results["quants"]
    embedded, served = quant["adapter"]["speeds"]
    rates = [embedded["generation"][name]["values"] for name in ("with_adapter", "without", "merged")]
    assert {len(values) for values in rates} == {1} and served["generation"]["merged"] is None
    merged = quant["adapter"]["merged"]
    assert abs(merged["size_bytes"] / file.stat().st_size - 1) < 0.05 and merged["perplexity"]["same_tokens_rows"] == 4
    assert merged["divergence"]["mean"] > quant["divergence"]["mean"] > 0
    assert results["recommendation"]["package"] in ("adapter", "merged") and "Merged into one Q4_K_M" in results["recommendation"]["reason"]
    assert not (folder / "temporary").exists() and on_server(double) == ["oracle:latest", "oracle:q4_K_M", "tiny:1b"]
    double.requests.clear()
    before = (folder / "measured/q4_K_M-merged.perplexity.json").stat().st_mtime_ns
    said(olpack(root, *asked, "--set", "compare.max_loss=0.02", server=double.url))
    assert double.count("POST", "/api/generate") == 0  # nothing is measured anew
    assert (folder / "measured/q4_K_M-merged.perplexity.json").stat().st_mtime_ns == before
    said(olpack(root, "compare", "oracle", server=double.url))


def test_a_type_that_no_merged_file_can_have_ends_the_plan(workspace, monkeypatch):
    root, double, *_ = workspace
    monkeypatch.setattr("olpack.stages.build.type_of_file", lambda *_: quant_type("IQ2_XS"))
    found = said(olpack(root, "plan", "oracle", "--set", "compare.merged=true", server=double.url), 1)
    assert re.search(r"No merged file can have the type of ollama/tiny:1b, IQ2_XS: .*importance matrix.* Leave `compare.merged` out.", found), found


def test_a_merge_into_the_type_of_the_base_is_warned_of(workspace):
    root, double, _, _ = workspace
    found = said(olpack(root, "plan", "oracle", "--set", "package=merged", "--set", "quants=[Q4_0,Q4_K_M,Q8_0]", server=double.url))
    assert found.count("is the type of the base's own weights") == 1 and "Q4_K_M is the type of the base's own weights" in found


def test_an_adapter_that_is_left_out_is_not_applied(workspace):
    root, _, file, _ = workspace
    ids = list(range(1, 9))
    with Engine(file, 16, 1) as alone, Engine(file, 16, 1, adapter=root / "build/oracle/gguf/oracle-adapter.gguf") as engine:
        expected, applied = alone.logprobs(ids, [True] * 8), engine.logprobs(ids, [True] * 8)
        engine.apply_adapter(False)
        assert np.array_equal(engine.logprobs(ids, [True] * 8), expected) and not np.array_equal(applied, expected)
        engine.apply_adapter(True)
        assert np.array_equal(engine.logprobs(ids, [True] * 8), applied)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["package=merged", "quants=[Q8_0]", "compare.merged=true"], "compare.merged goes with package: adapter"),
        (["quants=[Q8_0]"], "`quants` goes with `package: merged`: an adapter is served on ollama/tiny:1b as it is, which is Q4_K_M."),
        (["revision=main"], "revision goes with a Hub id; ollama/tiny:1b has none."),
        (["base=ollama/tiny:2b"], "has no tiny:2b. Run `ollama pull tiny:2b`"),
    ],
)
def test_settings_that_do_not_go_with_a_served_file(workspace, settings, reason):
    root, double, *_ = workspace
    words = [word for setting in settings for word in ("--set", setting)]
    assert reason in said(olpack(root, "plan", "oracle", *words, server=double.url), 1)


def test_a_package_is_not_called_like_its_base(workspace):
    root, double, *_ = workspace
    folder = root / "modelfiles/tiny"
    folder.mkdir()
    for path in (root / "modelfiles/oracle").iterdir():
        (folder / path.name).write_text(path.read_text())
    found = said(olpack(root, "plan", "tiny", server=double.url), 1)
    assert "The package is called tiny, as the model that it is trained on: its tags would take the place of tiny:1b." in found


def test_rows_that_llama_cpp_reads_otherwise_end_the_plan(workspace, monkeypatch):
    """A tokenizer that is not llama.cpp's, as transformers' own conversion of a GGUF makes it, with the first text."""
    root, double, file, _ = workspace
    from olpack.model.pretokenizers import SPLITS

    monkeypatch.setitem(SPLITS, "llama-bpe", SPLITS["smollm"])
    monkeypatch.setattr("olpack.model.gguf_tokenizer.VERSION", 0)  # nothing that was made before is taken
    monkeypatch.setattr("olpack.deploy.served_template._VERSION", 0)
    found = said(olpack(root, "plan", "oracle", server=double.url), 1)
    assert "The server reads prompts of tiny:1b as other tokens than training does: " in found
    found = said(olpack(root, "plan", "oracle", "--set", f"base={file}", server=double.url), 1)
    assert re.search(r"llama.cpp reads \S*train.jsonl:\d+ as other tokens than training does: .* Take the folder of the model as base", found), found


def test_a_newer_server_gets_the_tag_through_its_store(workspace, monkeypatch):
    root, double, file, _ = workspace
    monkeypatch.setattr(double.faults, "version", "0.34.2")
    monkeypatch.setattr(double.store, "refuses_adapters", True)
    double.requests.clear()
    found = said(olpack(root, "deploy", "oracle", "--set", "modelfile.system=Rhyme.", server=double.url))
    assert "weights there" in found and "prompt identical" in found
    assert double.count("POST", "/api/create") == double.count("POST", "/api/blobs/") == 0
    shown = OllamaClient(double.url).show("oracle:q4_K_M")
    assert shown.system == "Rhyme." and shown.blob == blob_digest(file) and shown.parameters["top_k"] == 9


def test_a_newer_server_pulls_the_tag_where_its_store_cannot_be_written(workspace, monkeypatch):
    root, double, file, _ = workspace
    monkeypatch.setattr(double.faults, "version", "0.34.2")
    monkeypatch.setattr(double.store, "refuses_adapters", True)
    monkeypatch.setattr("olpack.deploy.ollama_store.os.access", lambda path, mode: mode != os.W_OK)
    system = ["--set", "modelfile.system=Sing."]
    plan = json.loads(olpack(root, "plan", "oracle", *system, "--json", server=double.url)[1])
    assert re.fullmatch(r"pulled by the server from a registry .* 127.0.0.1 .*: its model store \S+ cannot be written .*", plan["tags"])
    assert not [name for name in on_server(double) if "127.0.0.1" in name]
    double.requests.clear()
    found = said(olpack(root, "deploy", "oracle", *system, server=double.url))
    assert "registry that olpack opens on 127.0.0.1" in found and "prompt identical" in found and " pulled, " in found
    assert double.count("POST", "/api/create") == double.count("POST", "/api/blobs/") == 0
    shown = OllamaClient(double.url).show("oracle:q4_K_M")
    assert shown.system == "Sing." and shown.blob == blob_digest(file) and not [name for name in on_server(double) if "127.0.0.1" in name]
    monkeypatch.setattr(double.faults, "no_loopback", True)
    found = said(olpack(root, "plan", "oracle", server=double.url), 1)
    assert "the server does not find a registry on this machine's 127.0.0.1. Set `package: merged`" in found


def test_a_model_that_goes_between_plan_and_build(workspace, tmp_path):
    """Another one under its name is another training; none at all is one sentence, and what was built stays."""
    root, double, *_ = workspace
    client = OllamaClient(double.url)
    client.copy("tiny:1b", "kept:1b")
    client.delete("tiny:1b")
    try:
        assert "has no tiny:1b. Run `ollama pull tiny:1b`" in said(olpack(root, "build", "oracle", server=double.url), 1)
        assert (root / "build/oracle/gguf/oracle-adapter.gguf").is_file()
        other = write_gguf(tmp_path, PLAIN, quant="Q8_0")
        client.upload(other, digest := blob_digest(other))
        client.create({"model": "tiny:1b", "files": {"base.gguf": digest}})
        planned = json.loads(olpack(root, "plan", "oracle", "--json", server=double.url)[1])
        assert next(step["stale"] for step in planned["steps"] if step["step"] == "train") == "base changed"
    finally:
        client.copy("kept:1b", "tiny:1b")
        client.delete("kept:1b")


def test_a_file_of_ones_own_goes_into_the_store_as_it_is(workspace, monkeypatch, tmp_path):
    """A server that registers a GGUF may take a template of its own for the file's. In its store, the file is linked and its template runs."""
    root, double, file, _ = workspace
    settings = ["--set", f"base={file}"]
    assert f"in {file}; it is neither downloaded nor copied" in said(olpack(root, "plan", "oracle", *settings, server=double.url))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    assert "with the base's weights where it lacks them" in said(olpack(root, "plan", "oracle", *settings, server=double.url))
    monkeypatch.setattr(double.faults, "no_loopback", True)
    found = said(olpack(root, "plan", "oracle", *settings, server=double.url), 1)
    assert "is written into the server's model store" in found and "Register the file once with `ollama create`" in found


def test_an_adapter_that_is_trained_already_goes_onto_the_file(workspace):
    root, double, *_ = workspace
    folder = root / "modelfiles/taken"
    folder.mkdir()
    for path in (root / "modelfiles/oracle").iterdir():
        (folder / path.name).write_text(path.read_text())
    recipe = re.sub(r"train: \{.*\}\n", "train: {adapter: ../../build/oracle/adapter}\n", (folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(recipe)
    assert "train.adapter" in said(olpack(root, "plan", "taken", server=double.url))
    said(olpack(root, "build", "taken", "--no-deploy", server=double.url))
    taken, trained = (root / f"build/{name}/gguf/{name}-adapter.gguf" for name in ("taken", "oracle"))
    assert taken.read_bytes() == trained.read_bytes()
