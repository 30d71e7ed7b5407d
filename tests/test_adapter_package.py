"""Packages that are an adapter beside a base: ten assistants cost one base and ten adapters, on the disk and on the server."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from oracle import files, make_workspace, olpack, write_base, write_rows

from olpack.compare.results import read_results
from olpack.deploy import parse
from olpack.deploy.client import OllamaClient


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Two packages on one base, the second of which learned something else."""
    root = tmp_path_factory.mktemp("adapters")
    make_workspace(root, write_base(root / "model"))
    recipe = root / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("compare: {", "compare: {reference: false, ") + "package: adapter\n")
    shutil.copytree(root / "modelfiles/oracle", root / "modelfiles/prophet")
    other = root / "modelfiles/prophet/recipe.yaml"
    other.write_text(other.read_text().replace("epochs: 12", "epochs: 1"))
    write_rows(root / "modelfiles/prophet/train.jsonl", 12, first=500)
    code, _, said = olpack(root, "build", "oracle")
    assert code == 0, said
    before = files(root / "build/bases")
    for words in (["train"], ["export"], ["build", "--only", "modelfiles"]):
        code, _, said = olpack(root, *words, "prophet")
        assert code == 0, said
    assert {name: when for name, when in files(root / "build/bases").items() if name in before} == before
    return root


def base_of(root: Path) -> Path:
    [folder] = (root / "build/bases").iterdir()
    return folder


def test_one_base_and_two_adapters(built):
    base = base_of(built)
    assert base.name.startswith("model-")
    assert sorted(path.name for path in base.glob("gguf/*")) == [f"{base.name}-Q4_K_M.gguf", f"{base.name}-Q8_0.gguf"]
    for name in ("oracle", "prophet"):
        assert [path.name for path in (built / f"build/{name}/gguf").iterdir()] == [f"{name}-adapter.gguf"]
        text = (built / f"build/{name}/modelfiles/q4_K_M.Modelfile").read_text()
        read = parse(text)
        assert (built / f"build/{name}/modelfiles" / read.source).samefile(base / f"gguf/{base.name}-Q4_K_M.gguf")
        assert (built / f"build/{name}/modelfiles" / read.adapter).samefile(built / f"build/{name}/gguf/{name}-adapter.gguf")


def test_a_second_build_does_nothing(built):
    code, _, said = olpack(built, "build", "oracle")
    assert code == 0 and "up to date" in said, said


def test_what_is_measured_is_base_and_adapter_together(built):
    """The figures are those of the trained model, and so is what `run` answers with."""
    results = read_results(built / "build/oracle/compare/results.json")
    sizes = {quant.quant: quant.size_bytes for quant in results.quants}
    adapter = (built / "build/oracle/gguf/oracle-adapter.gguf").stat().st_size
    assert sizes["Q8_0"] == adapter + next(base_of(built).glob("gguf/*Q8_0.gguf")).stat().st_size
    trained = json.loads((built / "build/oracle/stages/train.json").read_text())["result"]
    for quant in results.quants:
        assert math.log(quant.perplexity.value) == pytest.approx(trained["eval_loss_after"], rel=0.02)
    assert trained["eval_loss_after"] < trained["eval_loss_before"] / 2
    code, answer, _ = olpack(built, "run", "oracle:q8_0", "What is 101 + 1?")
    assert code == 0 and answer.strip() == results.quants[1].answers[1].text.strip()


def test_new_training_leaves_the_base_alone(built, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(built, root)
    code, planned, _ = olpack(root, "plan", "oracle", "--json", "--set", "train.epochs=13")
    stale = {step["step"]: step["stale"] for step in json.loads(planned)["steps"]}
    assert code == 0 and stale["export-adapter"] and stale["compare"]
    assert not stale["export-Q4_K_M"] and not stale["export-Q8_0"]


def test_served_from_one_base(built, ollama_double: OllamaDouble, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(built, root)
    url, base = ollama_double.url, base_of(root)
    weights = sum(path.stat().st_size for path in base.glob("gguf/*"))
    for name in ("oracle", "prophet"):
        code, _, said = olpack(root, "deploy", name, server=url)
        assert code == 0 and "prompt identical" in said, said
    uploads = [request.sent for request in ollama_double.requests if request.method == "POST" and request.path.startswith("/api/blobs/")]
    adapters = [(root / f"build/{name}/gguf/{name}-adapter.gguf").stat().st_size for name in ("oracle", "prophet")]
    assert sum(uploads) == weights + sum(adapters) and len(uploads) == 4
    client = OllamaClient(url)
    shown = [client.show(f"{name}:q8_0") for name in ("oracle", "prophet")]
    assert shown[0].blob == shown[1].blob and shown[0].adapter != shown[1].adapter
    assert None not in (shown[0].adapter, shown[1].adapter)

    # Only what changed: a system prompt keeps the adapter, another adapter goes there without the weights.
    ollama_double.requests.clear()
    code, _, said = olpack(root, "deploy", "oracle", "--set", "modelfile.system=Be brief.", server=url)
    assert code == 0 and ollama_double.count("POST", "/api/blobs/") == 0, said
    assert client.show("oracle:q8_0").adapter == shown[0].adapter and client.show("oracle:q8_0").system == "Be brief."
    assert olpack(root, "deploy", "oracle", "--check", "--set", "modelfile.system=Be brief.", server=url)[0] == 0
    shutil.copy(root / "build/prophet/gguf/prophet-adapter.gguf", root / "build/oracle/gguf/oracle-adapter.gguf")
    code, _, said = olpack(root, "deploy", "oracle", server=url)
    assert code == 1 and "oracle-adapter.gguf was changed" in said  # the pipeline does not send what it did not make
    code, _, said = olpack(root, "deploy", "oracle", "--check", "--set", "modelfile.system=Be brief.", server=url)
    assert code == 1 and "adapter is sha256:" in said
    assert olpack(root, "remove", "oracle", "--yes", server=url)[0] == 0
    assert client.show("prophet:q8_0").adapter == shown[1].adapter  # the other package keeps its base


def test_the_merged_quant_is_measured_beside_base_and_adapter(built, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(built, root)
    code, printed, said = olpack(root, "compare", "oracle", "--quant", "Q8_0", "--set", "compare.merged=true")
    assert code == 0 and "Q8_0 merged" in printed, said
    [quant] = read_results(root / "build/oracle/compare/results.json").quants
    merged = quant.adapter.merged
    assert abs(merged.loss.relative) < 0.02 and merged.size_bytes < quant.size_bytes  # the same model, rounded in another way
    assert quant.adapter.speeds[0].generation.merged.median > 0 and not list((root / "build/oracle").rglob("Q8_0.gguf"))


def test_a_store_and_a_bundle_hold_the_adapter(built, ollama_double: OllamaDouble, tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(built, root)
    code, _, said = olpack(root, "deploy", "oracle", "--store", str(ollama_double.store.root))
    assert code == 0, said
    client = OllamaClient(ollama_double.url)
    written = client.show("oracle:q8_0")
    digests = {tag.model: tag.digest for tag in client.tags()}
    code, _, said = olpack(root, "deploy", "oracle", server=ollama_double.url)
    assert code == 0 and "unchanged oracle:q8_0" in said, said
    assert written.adapter and digests == {tag.model: tag.digest for tag in client.tags()}

    code, printed, said = olpack(root, "bundle", "oracle")
    assert code == 0, said
    with zipfile.ZipFile(root / printed.strip()) as archive:
        names = {Path(name).name for name in archive.namelist()}
        text = archive.read("oracle/q8_0.Modelfile").decode()
    assert {"oracle-adapter.gguf", f"{base_of(root).name}-Q8_0.gguf"} <= names
    assert (parse(text).source, parse(text).adapter) == (f"./{base_of(root).name}-Q8_0.gguf", "./oracle-adapter.gguf")
    code, _, said = olpack(root, "push", "oracle", "--hub", "me/oracle")
    assert code == 1 and "package: merged" in said


def test_what_an_adapter_package_cannot_do_is_said_before_training(built, tmp_path):
    code, _, said = olpack(built, "plan", "oracle", "--set", "package=both")
    assert code == 1 and "package" in said
    code, _, said = olpack(built, "plan", "oracle", "--set", "export.importance=train")
    assert code == 1 and "package: merged" in said
