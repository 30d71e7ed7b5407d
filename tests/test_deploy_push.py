"""Pushing: to a registry through the server, and to a stand-in for the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import served_gguf
import yaml
from hub_double import HubDouble
from huggingface_hub import HfApi
from ollama_double import OllamaDouble

from olpack.deploy import Package, parse, render
from olpack.deploy.client import OllamaClient
from olpack.deploy.hub import hub_card, push_to_hub
from olpack.deploy.push import push_to_ollama
from olpack.deploy.register import TagFile, register
from olpack.errors import OlpackError
from olpack.workspace import template_source

PACKAGE = Package(system="You write Python.\nكود 🙂", parameters={"num_ctx": 2048, "temperature": 0.2, "stop": ("<|im_end|>",)})


@pytest.fixture
def files(tmp_path: Path) -> list[TagFile]:
    made = [("q4_0", tmp_path / "coder-Q4_0.gguf", 2), ("q4_K_M", tmp_path / "coder-Q4_K_M.gguf", 15)]
    return [TagFile(tag, path, served_gguf.write(path, served_gguf.CHAT, kind, filling=kind)) for tag, path, kind in made]


@pytest.fixture
def client(ollama_double: OllamaDouble, files: list[TagFile]) -> OllamaClient:
    made = OllamaClient(ollama_double.url, retry_wait_s=0.01)
    register(made, "coder", files, PACKAGE, latest="q4_K_M")
    ollama_double.requests.clear()
    return made


# -- through the server --------------------------------------------------------------------------------------------------------------------


def test_a_push_copies_to_the_namespace_first(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    assert push_to_ollama(client, ["coder:q4_K_M", "coder"], "me") == ["me/coder:q4_K_M", "me/coder:latest"]
    changes = [(one.path, one.body) for one in ollama_double.requests if one.path in ("/api/copy", "/api/push")]
    assert changes == [
        ("/api/copy", {"source": "coder:q4_K_M", "destination": "me/coder:q4_K_M"}),
        ("/api/push", {"model": "me/coder:q4_K_M", "insecure": False}),
        ("/api/copy", {"source": "coder", "destination": "me/coder:latest"}),
        ("/api/push", {"model": "me/coder:latest", "insecure": False}),
    ]
    assert ollama_double.registry["me/coder:q4_K_M"] == ollama_double.registry["me/coder:latest"]
    assert ollama_double.registry[f"sha256:{files[1].sha256}"] == files[1].path.read_bytes()
    assert f"sha256:{files[0].sha256}" not in ollama_double.registry


def test_a_second_push_copies_nothing(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    push_to_ollama(client, ["coder:q4_0"], "me")
    push_to_ollama(client, ["coder:q4_0"], "me")
    assert ollama_double.count("POST", "/api/copy") == 1
    register(client, "coder", files, dataclasses.replace(PACKAGE, system="Be brief."))
    push_to_ollama(client, ["coder:q4_0"], "me")
    assert ollama_double.count("POST", "/api/copy") == 2
    assert client.show("me/coder:q4_0").system == "Be brief."


def test_a_name_with_a_namespace_is_pushed_as_it_is(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    client.copy("coder:q4_0", "team/coder:v1")
    assert push_to_ollama(client, ["team/coder:v1"], "me") == ["team/coder:v1"]
    assert ollama_double.count("POST", "/api/copy") == 1


def test_a_private_registry(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    ollama_double.faults.push_error = 'Head "https://my.host:5000/v2/...": http: server gave HTTP response to HTTPS client'
    with pytest.raises(OlpackError, match="speaks plain HTTP: allow that with --insecure"):
        push_to_ollama(client, ["coder:q4_0"], "my.host:5000/team")
    ollama_double.faults.push_error = None
    assert push_to_ollama(client, ["coder:q4_0"], "my.host:5000/team", insecure=True) == ["my.host:5000/team/coder:q4_0"]
    assert ollama_double.requests[-1].body == {"model": "my.host:5000/team/coder:q4_0", "insecure": True}


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("unauthorized: access denied", "ollama signin"),
        ('401: {"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}', "id_ed25519.pub"),
        ("file does not exist", "does not know that namespace"),
        ("tls: failed to verify certificate: x509: certificate signed by unknown authority", "must trust the registry's certificate"),
        ("write sha256-x: no space left on device", "Free some"),
    ],
)
def test_a_registry_that_refuses(ollama_double: OllamaDouble, client: OllamaClient, said: str, remedy: str) -> None:
    """The error comes inside an answer with status 200."""
    ollama_double.faults.push_error = said
    with pytest.raises(OlpackError, match=r"pushing me/coder:q4_0") as caught:
        push_to_ollama(client, ["coder:q4_0"], "me")
    assert remedy in caught.value.remedy


def test_a_push_that_breaks_off(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    ollama_double.faults.break_pushes = 1
    with pytest.raises(OlpackError, match="broke off while pushing me/coder:q4_0"):
        push_to_ollama(client, ["coder:q4_0"], "me")
    assert push_to_ollama(client, ["coder:q4_0"], "me") == ["me/coder:q4_0"]


@pytest.mark.parametrize(
    ("model", "namespace", "said"),
    [
        ("coder:q4_0", None, r"coder:q4_0 cannot be pushed: .* --ollama: it becomes YOU/coder:q4_0"),
        ("coder:q4_0", "my name", "its namespace has ' '"),
        ("coder:q8_0", "me", "has no coder:q8_0. Register it"),
        ("bad name", "me", "its model has ' '"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sent(
    ollama_double: OllamaDouble, client: OllamaClient, model: str, namespace: str | None, said: str
) -> None:
    with pytest.raises(OlpackError, match=said):
        push_to_ollama(client, ["coder:latest" if namespace else "me/coder:latest", model], namespace)
    assert not ollama_double.registry and ollama_double.count("POST", "/api/copy") == 0


def test_the_double_answers_as_the_source_has_it(ollama_double: OllamaDouble, client: OllamaClient) -> None:
    with httpx.Client(base_url=ollama_double.url, trust_env=False) as http:
        lines = [json.loads(line) for line in http.post("/api/push", json={"model": "coder:q4_0"}).text.splitlines()]
        assert [line["status"].partition(" ")[0] for line in lines] == ["retrieving", *["pushing"] * 13, "success"]
        assert {"digest", "total"} <= set(lines[1]) and "completed" not in lines[1]
        assert http.post("/api/push", json={"model": "coder:q4_0", "stream": False}).json() == {"status": "success"}
        missing = [json.loads(line) for line in http.post("/api/push", json={"model": "me/none"}).text.splitlines()]
        assert [*missing[0].values(), *missing[1].values()] == ["retrieving manifest", "couldn't retrieve manifest"]
        assert "no such file" in missing[2]["error"]


# -- to the Hub ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks the older way
    with HubDouble() as double:
        yield double


@pytest.fixture
def api(hub: HubDouble) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def modelfiles(tmp_path: Path, files: list[TagFile]) -> list[Path]:
    paths = []
    for file in files:
        paths.append(tmp_path / f"{file.tag}.Modelfile")
        paths[-1].write_text(render(PACKAGE, Path("../gguf") / file.path.name, template_source("Modelfile.j2")), encoding="utf-8")
    return paths


def test_a_package_on_the_hub(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path]) -> None:
    assert push_to_hub("me/coder", files, modelfiles, PACKAGE, "# Card\n", api=api) == f"{hub.url}/me/coder"
    held = hub.files["me/coder"]
    names = {"coder-Q4_0.gguf", "coder-Q4_K_M.gguf", "q4_0.Modelfile", "q4_K_M.Modelfile", "README.md", "system", "params"}
    assert set(held) == names
    assert [(repo, added, deleted) for repo, _, added, deleted in hub.commits] == [("me/coder", names, set())]  # all or nothing
    assert [held[file.path.name] for file in files] == [file.path.read_bytes() for file in files]
    assert held["system"].decode() == PACKAGE.system
    assert json.loads(held["params"]) == {"num_ctx": 2048, "temperature": 0.2, "stop": ["<|im_end|>"]}
    told = parse(held["q4_K_M.Modelfile"].decode())
    assert (told.source, told.package.system) == ("./coder-Q4_K_M.gguf", PACKAGE.system)


def test_again_sends_no_weights(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path]) -> None:
    push_to_hub("me/coder", files, modelfiles, PACKAGE, "# Card\n", api=api)
    sent = hub.uploaded
    assert sent == sum(file.path.stat().st_size for file in files)
    push_to_hub("me/coder", files, modelfiles, dataclasses.replace(PACKAGE, system=None), "# Card\n", api=api)
    assert hub.uploaded == sent
    assert hub.commits[-1][3] == {"system"} and "system" not in hub.files["me/coder"]


def test_a_name_alone_is_taken_below_the_user(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path]) -> None:
    assert push_to_hub("coder", files, modelfiles, PACKAGE, "# Card\n", api=api).endswith("/me/coder")
    assert "me/coder" in hub.files


def test_nobody_is_logged_in(files: list[TagFile], modelfiles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OlpackError, match=r"Nobody is logged in .* Run 'hf auth login'"):
        push_to_hub("me/coder", files, modelfiles, PACKAGE, "# Card\n")


def test_a_token_that_is_not_good(hub: HubDouble, files: list[TagFile], modelfiles: list[Path]) -> None:
    with pytest.raises(OlpackError, match=r"refused the push to me/coder \(401\)") as caught:
        push_to_hub("me/coder", files, modelfiles, PACKAGE, "# Card\n", api=HfApi(endpoint=hub.url, token="hf_other"))
    assert "hf auth login" in caught.value.remedy
    assert not hub.files


def test_a_hub_that_refuses_the_commit(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path]) -> None:
    hub.refuse["/api/models/me/coder/commit/main"] = (403, "You need write access")
    with pytest.raises(OlpackError, match=r"\(403\): .*You need write access.*The token must be one that may write"):
        push_to_hub("me/coder", files, modelfiles, PACKAGE, "# Card\n", api=api)
    assert hub.files == {"me/coder": {}}


@pytest.mark.parametrize("repo", ["me/not a name", "a/b/c"])
def test_names_that_the_hub_does_not_have(api: HfApi, files: list[TagFile], modelfiles: list[Path], repo: str) -> None:
    with pytest.raises(OlpackError, match=f"The push to {repo} failed: Repo id must"):
        push_to_hub(repo, files, modelfiles, PACKAGE, "# Card\n", api=api)


def test_no_network(files: list[TagFile], modelfiles: list[Path]) -> None:
    with pytest.raises(OlpackError, match="The push to me/coder broke off"):
        push_to_hub("me/coder", files, modelfiles, PACKAGE, "", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))


def test_a_file_that_ollama_would_not_find(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path]) -> None:
    renamed = files[0].path.rename(files[0].path.with_name("coder.gguf"))
    with pytest.raises(OlpackError, match=r"coder.gguf does not end in -Q4_0.gguf"):
        push_to_hub("me/coder", [dataclasses.replace(files[0], path=renamed)], [], PACKAGE, "", api=api)
    assert not hub.files


def test_messages_cannot_go_along(hub: HubDouble, api: HfApi, files: list[TagFile], modelfiles: list[Path], capsys: pytest.CaptureFixture) -> None:
    package = dataclasses.replace(PACKAGE, messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}))
    push_to_hub("me/coder", files, modelfiles, package, "# Card\n", api=api)
    assert "have no place for messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "linked"), [("Qwen/Qwen3-0.6B", True), ("builtin/tiny-coder", False), ("../models/mine", False), ("/srv/base", False)]
)
def test_the_card(files: list[TagFile], base: str, linked: bool) -> None:
    card = hub_card(
        template_source("hub_card.md.j2"),
        repo="me/coder",
        name="coder",
        base=base,
        files=files,
        package=PACKAGE,
        license="Apache-2.0",
        recommended="q4_K_M",
        table="| quant | tokens/s |\n| --- | --- |\n| Q4_0 | 12 |",
    )
    _, matter, text = card.split("---\n", 2)
    read = yaml.safe_load(matter)
    assert (read.get("base_model"), read["license"], read["library_name"]) == (base if linked else None, "apache-2.0", "gguf")
    assert "ollama run hf.co/me/coder:Q4_K_M" in text
    assert "| Q4_K_M (recommended) | [coder-Q4_K_M.gguf](./coder-Q4_K_M.gguf) | 138." in text
    assert PACKAGE.system in text and "| Q4_0 | 12 |" in text
    with pytest.raises(OlpackError, match="model card's template fails"):
        hub_card("{{ nope }}", repo="me/coder", name="coder", base=base, files=files, package=PACKAGE, table="")
