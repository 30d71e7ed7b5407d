"""`olpack push` from a build: to a registry through the Ollama server, and to the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub_double import HubDouble
from ollama_double import OllamaDouble
from oracle import files, make_workspace, olpack, write_base


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `oracle` trained, exported, and with its Modelfiles."""
    root = tmp_path_factory.mktemp("publish")
    make_workspace(root, write_base(root / "model"))
    recipe = root / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 12", "epochs: 1"))
    for stage in ("train", "export", "modelfiles"):
        code, _, printed = olpack(root, "build", "oracle", "--only", stage, "--no-deploy")
        assert code == 0, printed
    return root


@pytest.fixture
def workspace(exported: Path, tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    shutil.copytree(exported, root)
    recipe = root / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(f"base: {root / 'model'}\n" + recipe.read_text().partition("\n")[2])
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A Hub that the user `me` is logged in to."""
    with HubDouble() as double:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the double has no Xet storage
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", double.url)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", double.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield double


# -- to a registry -------------------------------------------------------------------------------------------------------------------------


def test_every_registered_tag_is_pushed(workspace: Path, ollama_double: OllamaDouble) -> None:
    code, _, printed = olpack(workspace, "deploy", "oracle", server=ollama_double.url)
    assert code == 0, printed
    code, printed, errors = olpack(workspace, "push", "oracle", "--ollama", "me", server=ollama_double.url)
    assert code == 0, errors
    assert sorted(printed.split()) == ["me/oracle:q4_K_M", "me/oracle:q8_0"]
    for quant in ("Q4_K_M", "Q8_0"):
        record = json.loads((workspace / f"build/oracle/stages/export-{quant}.json").read_text())["result"]
        file = workspace / f"build/oracle/gguf/oracle-{quant}.gguf"
        assert ollama_double.registry[f"sha256:{record['sha256']}"] == file.read_bytes()
    assert {"me/oracle:q4_K_M", "me/oracle:q8_0"} <= set(ollama_double.registry)


def test_another_registry_without_tls(workspace: Path, ollama_double: OllamaDouble) -> None:
    assert olpack(workspace, "deploy", "oracle", server=ollama_double.url)[0] == 0
    code, printed, errors = olpack(workspace, "push", "oracle", "--ollama", "my.host:5000/team", "--insecure", server=ollama_double.url)
    assert code == 0 and "my.host:5000/team/oracle:q8_0" in printed, errors
    assert all(request.body["insecure"] for request in ollama_double.requests if request.path == "/api/push")


def test_nothing_is_pushed_that_is_not_registered(workspace: Path, ollama_double: OllamaDouble) -> None:
    code, _, errors = olpack(workspace, "push", "oracle", "--ollama", "me", server=ollama_double.url)
    assert code == 1 and "oracle is not registered" in errors and "olpack deploy oracle" in errors
    code, _, errors = olpack(workspace, "push", "oracle", "--ollama", "me")
    assert code == 1 and "No Ollama server answers" in errors
    assert not ollama_double.registry


# -- to the Hub ----------------------------------------------------------------------------------------------------------------------------


def test_a_build_on_the_hub(workspace: Path, hub: HubDouble) -> None:
    before = files(workspace)
    code, printed, errors = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
    assert code == 0, errors
    assert printed.strip() == f"{hub.url}/me/oracle"
    pushed = hub.files["me/oracle"]
    for quant, tag in (("Q4_K_M", "q4_K_M"), ("Q8_0", "q8_0")):
        assert pushed[f"oracle-{quant}.gguf"] == (workspace / f"build/oracle/gguf/oracle-{quant}.gguf").read_bytes()
        assert f"./oracle-{quant}.gguf" in pushed[f"{tag}.Modelfile"].decode()
    assert pushed["system"].decode() == "Answer in words."
    assert json.loads(pushed["params"])["num_ctx"] == 128
    _, head, text = pushed["README.md"].decode().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(head)  # the base is a folder
    assert "hf.co/me/oracle:Q4_K_M" in text and "Answer in words." in text and "perplexity" not in text
    assert files(workspace) == before

    sent = hub.uploaded
    code, _, errors = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
    assert code == 0 and hub.uploaded == sent, errors


def test_a_comparison_goes_into_the_card_until_it_is_stale(workspace: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, errors = olpack(workspace, "compare", "oracle", "--set", "compare.reference=false")
    assert code == 0, errors
    recipe = workspace / "modelfiles/oracle/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("compare: {", "compare: {reference: false, "))
    assert olpack(workspace, "push", "oracle", "--hub", "me/oracle")[0] == 0
    card = hub.files["me/oracle"]["README.md"].decode()
    recommended = json.loads((workspace / "build/oracle/stages/compare.json").read_text())["result"]["recommended"]
    assert "perplexity" in card and f"hf.co/me/oracle:{recommended.upper()}" in card.replace("q4_K_M", "Q4_K_M")
    recipe.write_text(recipe.read_text().replace("generated_tokens: 8", "generated_tokens: 9"))
    assert olpack(workspace, "push", "oracle", "--hub", "me/oracle")[0] == 0
    assert "perplexity" not in hub.files["me/oracle"]["README.md"].decode()


def test_a_stale_build_is_not_pushed(workspace: Path, hub: HubDouble) -> None:
    recipe = workspace / "modelfiles/oracle/recipe.yaml"
    whole = recipe.read_text()
    for text, step in (
        (whole.replace("epochs: 1", "epochs: 2"), "train is stale"),
        (whole.replace("words.", "figures."), "Modelfiles of oracle are"),
    ):
        recipe.write_text(text)
        code, _, errors = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
        assert code == 1 and step in errors and "Run `olpack build oracle" in errors, errors
    recipe.write_text(whole)
    (workspace / "build/oracle/gguf/oracle-Q8_0.gguf").unlink()
    code, _, errors = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
    assert code == 1 and "export-Q8_0 is stale" in errors, errors
    assert not hub.files


def test_a_token_that_the_hub_refuses(workspace: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    code, _, errors = olpack(workspace, "push", "oracle", "--hub", "me/oracle")
    assert code == 1 and "401" in errors and "hf auth login" in errors
    assert not hub.files


@pytest.mark.parametrize("words", [[], ["--hub", "me/oracle", "--ollama", "me"]])
def test_one_destination_must_be_named(workspace: Path, words: list[str]) -> None:
    code, _, errors = olpack(workspace, "push", "oracle", *words)
    assert code == 2 and "--ollama NAMESPACE" in errors and "--hub USER/REPO" in errors
