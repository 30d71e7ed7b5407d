"""Registering against the double: what is sent, what is spared, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import served_gguf
from ollama_double import Answer, OllamaDouble
from ollama_double_store import CHATML

from olpack.deploy import Package, protect
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import Registered, TagFile, register
from olpack.deploy.smoke import smoke
from olpack.errors import OlpackError

TAGS = {"q4_0": 2, "q4_K_M": 15, "q5_K_M": 17, "q8_0": 7}
PACKAGE = Package(
    system='Answer in Python.\n"""Docstrings."""\nBe kind\u00a0🙂',
    license="Apache-2.0",
    parameters={"temperature": 0.2, "num_ctx": 2048, "stop": ["<|im_end|>"]},
    messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}),
)


@pytest.fixture
def client(ollama_double: OllamaDouble) -> OllamaClient:
    return OllamaClient(ollama_double.url, retry_wait_s=0.01)


@pytest.fixture
def files(tmp_path: Path) -> list[TagFile]:
    template = protect(CHATML.jinja, {})
    made = [(tag, tmp_path / f"coder-{tag.upper()}.gguf", number) for tag, number in TAGS.items()]
    return [TagFile(tag, path, served_gguf.write(path, template, number, filling=number)) for tag, path, number in made]


def _sent(double: OllamaDouble) -> list[str]:
    """What changed the server since the last look: uploads, creates by their kind, copies."""
    made = []
    for request in double.requests:
        if request.method == "POST" and request.path.startswith("/api/blobs"):
            made.append("upload")
        elif request.path == "/api/create":
            made.append("create from " + ("files" if "files" in request.body else "tag"))
        elif request.path in ("/api/copy", "/api/delete"):
            made.append(request.path.removeprefix("/api/"))
    double.requests.clear()
    return made


def test_the_first_time(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    records = register(client, "coder", files, PACKAGE, latest="q4_K_M")
    assert _sent(ollama_double) == ["upload", "create from files"] * 4 + ["copy"]
    assert [record.model for record in records] == [f"coder:{tag}" for tag in TAGS]
    assert [record.done for record in records] == ["created"] * 4
    assert [record.blob for record in records] == [f"sha256:{file.sha256}" for file in files]
    listed = {model.model: model.digest for model in client.tags()}
    assert listed == {record.model: record.digest for record in records} | {"coder:latest": records[1].digest}
    for record, file in zip(records, files, strict=True):
        assert file.path.stat().st_size < record.bytes_sent < file.path.stat().st_size + 1000
        shown = client.show(record.model)
        assert (shown.system, shown.parameters, shown.license, shown.messages) == (
            PACKAGE.system,
            PACKAGE.parameters,
            PACKAGE.license,
            PACKAGE.messages,
        )
    assert [Registered(**one) for one in json.loads(json.dumps([dataclasses.asdict(record) for record in records]))] == records


def test_again_does_nothing(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    first = register(client, "coder", files, PACKAGE, latest="q4_K_M")
    _sent(ollama_double)
    second = register(client, "coder", files, PACKAGE, latest="q4_K_M")
    assert _sent(ollama_double) == []
    assert [(record.done, record.bytes_sent) for record in second] == [("unchanged", 0)] * 4
    assert [record.digest for record in second] == [record.digest for record in first]


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        ({"system": "Be brief."}, ["create from tag"]),
        ({"parameters": {"temperature": 0.7, "num_ctx": 2048, "stop": ["<|im_end|>"]}}, ["create from tag"]),
        ({"parameters": {"temperature": 0.2, "num_ctx": 2048, "stop": ["<|im_end|>"], "top_k": 5}}, ["create from tag"]),
        ({"parameters": {"temperature": 0.2, "num_ctx": 2048, "stop": ["<|im_end|>", "###"]}}, ["create from tag"]),
        ({"messages": ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"})}, ["create from tag"]),
        ({"parameters": {"num_ctx": 2048}}, ["create from files"]),
        ({"system": None}, ["create from files"]),
        ({"system": ""}, ["create from files"]),
        ({"messages": ()}, ["create from files"]),
        ({"license": None}, ["create from files"]),
        ({"license": "MIT"}, ["create from files"]),  # through `from` it would join the old one
        ({"template": CHATML.go}, ["create from tag"]),
        ({"system": "Be brief.", "messages": ()}, ["create from files"]),
    ],
    ids=str,
)
def test_only_what_changed(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile], change: dict, sent: list[str]) -> None:
    register(client, "coder", files[:1], PACKAGE)
    _sent(ollama_double)
    changed = dataclasses.replace(PACKAGE, **change)
    [record] = register(client, "coder", files[:1], changed)
    assert _sent(ollama_double) == sent
    assert record.done == "updated"
    assert record.bytes_sent < 1000
    [again] = register(client, "coder", files[:1], changed)
    assert (again.done, _sent(ollama_double)) == ("unchanged", [])


def test_a_license_where_there_was_none(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:1], dataclasses.replace(PACKAGE, license=None))
    _sent(ollama_double)
    register(client, "coder", files[:1], PACKAGE)
    assert _sent(ollama_double) == ["create from tag"]


def test_a_go_template_that_is_taken_back(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:1], dataclasses.replace(PACKAGE, template=CHATML.go))
    _sent(ollama_double)
    register(client, "coder", files[:1], PACKAGE)
    assert _sent(ollama_double) == ["create from files"]
    assert client.show("coder:q4_0").template == protect(CHATML.jinja, {})


def test_a_go_template_that_would_not_run_is_refused(client: OllamaClient, tmp_path: Path) -> None:
    digest = served_gguf.write(tmp_path / "thinks.gguf", protect(served_gguf.CHAT, {}))
    with pytest.raises(OlpackError, match="runs the chat template inside the GGUF of coder:q4_0, which knows tools or thinking"):
        register(client, "coder", [TagFile("q4_0", tmp_path / "thinks.gguf", digest)], dataclasses.replace(PACKAGE, template=CHATML.go))


def test_a_new_quant_and_another_latest(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:3], PACKAGE, latest="q4_K_M")
    _sent(ollama_double)
    records = register(client, "coder", files, PACKAGE, latest="q8_0")
    assert _sent(ollama_double) == ["upload", "create from files", "copy"]
    assert [record.done for record in records] == ["unchanged"] * 3 + ["created"]
    assert next(model.digest for model in client.tags() if model.model == "coder:latest") == records[3].digest


def test_other_weights(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:1], PACKAGE)
    _sent(ollama_double)
    path = files[0].path
    trained = TagFile("q4_0", path, served_gguf.write(path, protect(CHATML.jinja, {}), 2, filling=0.5))
    [record] = register(client, "coder", [trained], PACKAGE)
    assert (_sent(ollama_double), record.done, client.show("coder:q4_0").blob) == (
        ["upload", "create from files"],
        "updated",
        f"sha256:{trained.sha256}",
    )


def test_without_a_digest_the_file_is_hashed(client: OllamaClient, files: list[TagFile]) -> None:
    [record] = register(client, "coder", [TagFile("q4_0", files[0].path)], PACKAGE)
    assert record.file == f"sha256:{files[0].sha256}"


def test_a_file_that_the_server_rewrites(
    ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile], capsys: pytest.CaptureFixture
) -> None:
    facts = ollama_double.store
    digest, other = f"sha256:{files[0].sha256}", "sha256:" + "a" * 64
    client.upload(files[0].path, digest)
    facts.primed[digest] = dataclasses.replace(facts.facts(digest), rewritten_as=other)
    [record] = register(client, "coder", files[:1], PACKAGE)
    assert (record.blob, record.file) == (other, digest)
    assert "rewrote coder-Q4_0.gguf" in capsys.readouterr().err
    _sent(ollama_double)
    assert register(client, "coder", files[:1], PACKAGE, before=[record])[0].done == "unchanged"
    assert _sent(ollama_double) == []


@pytest.mark.parametrize("other", ["other:Q4_k_m", "coder:q4_k_m"])
def test_the_same_tag_in_another_case(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile], other: str) -> None:
    register(client, other.partition(":")[0], [dataclasses.replace(files[1], tag=other.partition(":")[2])], PACKAGE)
    [record] = register(client, "coder", files[1:2], PACKAGE, latest="Q4_K_M")
    assert record.model == f"coder:{other.partition(':')[2]}"  # the server's spelling
    assert register(client, "coder", files[1:2], PACKAGE, latest="q4_K_M", before=[record])[0].done == "unchanged"
    assert sum(model.model.startswith("coder:") for model in client.tags()) == 2


def test_a_template_that_the_server_would_replace_is_refused(client: OllamaClient, tmp_path: Path) -> None:
    digest = served_gguf.write(tmp_path / "bare.gguf", CHATML.jinja + "{# mine #}")
    with pytest.raises(OlpackError, match="replaced the chat template of coder:q4_0 by a similar one"):
        register(client, "coder", [TagFile("q4_0", tmp_path / "bare.gguf", digest)], PACKAGE)


def test_a_server_that_does_not_keep_what_it_was_told(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    ollama_double.faults.drop_parameter = "temperature"
    with pytest.raises(OlpackError, match=r"registered coder:q4_0 otherwise than asked: parameters is .* and not .*'temperature': 0.2"):
        register(client, "coder", files[:1], PACKAGE)


@pytest.mark.parametrize(
    ("name", "package", "latest", "said"),
    [
        ("bad name", PACKAGE, None, "its model has ' '"),
        ("coder:q4_0", PACKAGE, None, "has a tag"),
        ("coder", Package(), None, "'num_ctx' is not set"),
        ("coder", Package(parameters={"num_ctx": 2048, "temprature": 1}), None, "no parameter 'temprature'"),
        ("coder", PACKAGE, "q6_K", "latest cannot point to 'q6_K'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sent(
    ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile], name: str, package: Package, latest: str | None, said: str
) -> None:
    with pytest.raises(OlpackError, match=said):
        register(client, name, files, package, latest)
    with pytest.raises(OlpackError, match="Two files would become"):
        register(client, "coder", [files[0], dataclasses.replace(files[1], tag="Q4_0")], PACKAGE)
    assert ollama_double.requests == []


def test_a_full_disk_leaves_what_was_there(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:1], PACKAGE)
    before = [(model.model, model.digest) for model in client.tags()]
    ollama_double.faults.disk_left = 200_000
    with pytest.raises(OlpackError, match="no space left"):
        register(client, "coder", files, PACKAGE)
    assert [(model.model, model.digest) for model in client.tags() if model.model == "coder:q4_0"] == before
    ollama_double.faults.disk_left = None
    assert register(client, "coder", files, PACKAGE)[0].done == "unchanged"


# -- the smoke test ------------------------------------------------------------------------------------------------------------------------


def test_smoke(ollama_double: OllamaDouble, client: OllamaClient, files: list[TagFile]) -> None:
    register(client, "coder", files[:1], PACKAGE)
    question = [{"role": "user", "content": "Write f."}]
    answer = smoke(client, "coder:q4_0", question)
    assert answer.stopped and "def answer" in answer.answer
    ollama_double.answer = lambda prompt: Answer(["again "], ends=False)
    endless = smoke(client, "coder:q4_0", question, num_predict=20)
    assert (endless.done_reason, endless.tokens, endless.stopped) == ("length", 20, False)
    ollama_double.answer = lambda prompt: Answer([])
    with pytest.raises(OlpackError, match="coder:q4_0 answers with nothing"):
        smoke(client, "coder:q4_0", question)
