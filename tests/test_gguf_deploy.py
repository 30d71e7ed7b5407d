"""An adapter on a model of the server is registered from that model: its weights are neither sent nor copied, and it is never touched."""

from __future__ import annotations

import json
import shutil
import socket
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import httpx
import numpy as np
import ollama_double_pull
import pytest
import served_gguf
from ollama_double_store import encoded

from olpack.deploy import Package, ollama_store
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.deploy.loopback_registry import LoopbackRegistry, pull_tag, reaches
from olpack.deploy.ollama_store import ComposedTag, place, store_of
from olpack.deploy.register import Origin, TagFile, drift, register
from olpack.deploy.remove import owned, remove
from olpack.errors import OlpackError

PACKAGE = Package(system="Be brief.", parameters={"num_ctx": 512, "temperature": 0.0})
OWN = {"temperature": 0.7, "top_k": 9, "stop": ["<|im_end|>"]}


@pytest.fixture
def served(ollama_double, tmp_path, monkeypatch):
    """A server with `tiny:1b`: a Go template, parameters and a licence of its own."""
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama_double.store.root))
    monkeypatch.setattr("olpack.deploy.ollama_store._OF_SERVICES", ())
    path = tmp_path / "base.gguf"
    served_gguf.write(path, None)
    client = OllamaClient(ollama_double.url)
    client.upload(path, digest := blob_digest(path))
    fields = {"template": "{{ .Prompt }}", "parameters": OWN, "license": "Tiny licence", "system": "Be wordy."}
    client.create({"model": "tiny:1b", "files": {"base.gguf": digest}, **fields})
    ollama_double.requests.clear()
    return ollama_double


def adapter(path: Path, filling: float = 0.0) -> Path:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.full((4, 128), filling, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def on_tiny(client: OllamaClient, path: Path) -> TagFile:
    info = client.show("tiny:1b")
    assert info is not None and info.blob is not None
    return TagFile("q4_K_M", Path("/nowhere/base.gguf"), info.blob.removeprefix("sha256:"), path, Origin("tiny:1b", info))


def test_only_the_adapter_is_sent(served, tmp_path):
    client = OllamaClient(served.url)
    file = on_tiny(client, adapter(tmp_path / "a.gguf"))
    blobs = {path.name for path in (served.store.root / "blobs").iterdir()}
    served.requests.clear()
    [made] = register(client, "support", [file], PACKAGE)
    sent = [
        (request.method, request.path.split("sha256")[0], request.sent) for request in served.requests if request.sent and request.path != "/api/show"
    ]
    size = (tmp_path / "a.gguf").stat().st_size
    assert [one[:2] for one in sent] == [("POST", "/api/blobs/"), ("POST", "/api/create")] and sent[0][2] == size
    assert made.bytes_sent == sum(one[2] for one in sent) < size + 500
    [create] = [request.body for request in served.requests if request.path == "/api/create"]
    assert create["from"] == "tiny:1b" and "files" not in create and "template" not in create and "license" not in create
    new = {path.name for path in (served.store.root / "blobs").iterdir()} - blobs
    assert file.adapter and blob_digest(file.adapter).replace(":", "-") in new
    assert sum((served.store.root / "blobs" / name).stat().st_size for name in new) < size + 2000
    info = client.show("support:q4_K_M")
    assert info is not None and info.blob == made.blob == file.origin.info.blob and info.adapter == blob_digest(file.adapter)
    assert info.system == "Be brief." and info.license == "Tiny licence" and info.template == "{{ .Prompt }}"
    assert info.parameters == {**OWN, **PACKAGE.parameters}
    assert drift(info, file, PACKAGE) == [] and "system is 'Be brief.'" in drift(info, file, Package("Other.", parameters=PACKAGE.parameters))[0]


def test_what_did_not_change_is_not_sent_again(served, tmp_path):
    client = OllamaClient(served.url)
    file = on_tiny(client, adapter(tmp_path / "a.gguf"))
    before = register(client, "support", [file], PACKAGE)
    served.requests.clear()
    [again] = register(client, "support", [file], PACKAGE, before)
    assert again.done == "unchanged" and served.count("POST", "/api/create") == 0 and again.bytes_sent == 0
    changed = Package(system="Rhyme.", parameters=PACKAGE.parameters)
    [again] = register(client, "support", [file], changed, before)
    assert again.done == "updated" and served.count("POST", "/api/blobs/") == 0 and again.bytes_sent < 500
    assert client.show("support:q4_K_M").adapter == blob_digest(file.adapter)
    [again] = register(client, "support", [on_tiny(client, adapter(tmp_path / "b.gguf", 1.0))], changed, before)
    shown = json.loads(served.store.manifest_path(served.store.find("support:q4_K_M")[0]).read_text())
    assert [layer["mediaType"] for layer in shown["layers"]].count("application/vnd.ollama.image.adapter") == 1


def test_many_adapters_share_a_model_and_leave_without_it(served, tmp_path):
    client = OllamaClient(served.url)
    made = {name: register(client, name, [on_tiny(client, adapter(tmp_path / f"{name}.gguf", at))], PACKAGE) for at, name in enumerate("abc")}
    assert len({record.blob for [record] in made.values()}) == 1 and len({record.digest for [record] in made.values()}) == 3
    assert remove(client, "a", made["a"], adapted=True) == ["a:q4_K_M"]
    assert sorted(tag.model for tag in client.tags()) == ["b:q4_K_M", "c:q4_K_M", "tiny:1b"]
    client.copy("tiny:1b", "b:latest")  # somebody's own, with the weights of the record and no adapter
    client.copy("b:q4_K_M", "c:latest")
    assert owned(client, "b", made["b"], adapted=True) == ["b:q4_K_M"]
    remove(client, "b", made["b"], adapted=True)
    assert sorted(tag.model for tag in client.tags()) == ["b:latest", "c:latest", "c:q4_K_M", "tiny:1b"]
    assert owned(client, "c", made["c"], adapted=True) == ["c:latest", "c:q4_K_M"]


def test_the_store_of_a_newer_server_gets_the_same_tag(served, tmp_path):
    """A server that creates no adapters: what is written has the layers of the model, and its renderer and parser."""
    client = OllamaClient(served.url)
    name, manifest = served.store.find("tiny:1b")
    config = json.loads(served.store.blob(manifest["config"]["digest"]).read_text()) | {"renderer": "qwen3-coder", "parser": "qwen3-coder"}
    digest, _ = served.store.put(encoded(config))
    served.store.manifest_path(name).write_bytes(
        encoded({**manifest, "config": {**manifest["config"], "digest": digest, "size": len(encoded(config))}})
    )
    file = on_tiny(client, adapter(tmp_path / "a.gguf"))
    file = TagFile(file.tag, served.store.blob(f"sha256:{file.sha256}"), file.sha256, file.adapter, file.origin)
    served.store.refuses_adapters = True
    served.requests.clear()
    made = place(client, store_of(client), "support", file, PACKAGE)
    assert made.bytes_sent == 0 and served.count("POST", "/api/blobs/") == served.count("POST", "/api/create") == 0
    info = client.show("support:q4_K_M")
    assert (info.system, info.license, info.template) == ("Be brief.", "Tiny licence", "{{ .Prompt }}") and info.parameters == {
        **OWN,
        **PACKAGE.parameters,
    }
    written = served.store.find("support:q4_K_M")[1]
    kept = json.loads(served.store.blob(written["config"]["digest"]).read_text())
    assert (kept["renderer"], kept["parser"]) == ("qwen3-coder", "qwen3-coder")
    assert place(client, store_of(client), "support", file, PACKAGE).done == "unchanged"
    client.delete("tiny:1b")
    with pytest.raises(OlpackError, match="has no tiny:1b any more. Run `ollama pull tiny:1b`"):
        place(client, store_of(client), "support", file, PACKAGE)
    assert client.show("support:q4_K_M").blob == info.blob  # what was registered stays whole


# -- a store that cannot be written: the server pulls ----------------------------------------------------------------------------------------


@pytest.fixture
def newer(served):
    """A server that creates no adapters."""
    served.store.refuses_adapters = True
    return served


def read(client: OllamaClient, path: Path) -> TagFile:
    file = on_tiny(client, path)
    return TagFile(file.tag, client_file(client, file), file.sha256, file.adapter, file.origin)


def client_file(client: OllamaClient, file: TagFile) -> Path:
    return store_of(client) / "blobs" / f"sha256-{file.sha256}"


def on_disk(served) -> dict[str, bytes]:
    return {str(path.relative_to(served.store.root)): path.read_bytes() for path in served.store.root.rglob("*") if path.is_file()}


def test_a_server_pulls_the_tag_that_its_store_would_get(newer, tmp_path):
    client = OllamaClient(newer.url)
    file = read(client, adapter(tmp_path / "a.gguf"))
    assert file.adapter and file.origin
    before = on_disk(newer)
    newer.requests.clear()
    made = pull_tag(client, "support", file, PACKAGE)
    assert made.done == "created" and [tag.model for tag in client.tags() if tag.digest == made.digest] == ["support:q4_K_M"]
    assert sorted(tag.model for tag in client.tags()) == ["support:q4_K_M", "tiny:1b"]
    assert newer.count("POST", "/api/create") == newer.count("POST", "/api/blobs/") == 0
    asked = [(request.method, request.path.rpartition("/")[2]) for request in newer.fetched]
    adapter_digest = blob_digest(file.adapter)
    assert [method for method, name in asked if name == adapter_digest] == ["HEAD", "GET", "GET"]
    assert not [name for _, name in asked if name == made.blob], "the weights of the base were asked for"
    assert made.bytes_sent == sum(request.sent for request in newer.fetched) < file.adapter.stat().st_size + 2500
    info = client.show("support:q4_K_M")
    assert info is not None and info.blob == file.origin.info.blob and info.adapter == adapter_digest
    assert (info.system, info.license, info.template) == ("Be brief.", "Tiny licence", "{{ .Prompt }}")
    pulled = on_disk(newer)
    assert before.items() <= pulled.items()
    client.delete("support:q4_K_M")
    assert place(client, store_of(client), "support", file, PACKAGE).digest == made.digest and on_disk(newer) == pulled


def test_stores_that_cannot_be_looked_into_are_passed_over(newer, tmp_path, monkeypatch):
    """As the home of the service's user is on Ubuntu, 0750. Root may look into all, so a name that is too long gives the error."""
    client = OllamaClient(newer.url)
    file = read(client, adapter(tmp_path / "a.gguf"))
    locked, known = tmp_path / ("x" * 300), ollama_store.model_stores()
    monkeypatch.setattr(ollama_store, "model_stores", lambda: [locked, *known])
    assert store_of(client) == newer.store.root
    hidden = replace(file, origin=replace(file.origin, info=replace(file.origin.info, path=None)))
    assert pull_tag(client, "support", hidden, PACKAGE).done == "created"
    monkeypatch.setattr(ollama_store, "model_stores", lambda: [locked])
    with pytest.raises(OlpackError, match="no folder with the models of the server"):
        store_of(client)
    with pytest.raises(OlpackError, match="The manifest of tiny:1b is not found"):
        pull_tag(client, "other", hidden, PACKAGE)


def test_a_pull_of_the_same_or_another_adapter(newer, tmp_path):
    client = OllamaClient(newer.url)
    files = [read(client, adapter(tmp_path / f"{at}.gguf", at)) for at in range(2)]
    pull_tag(client, "support", files[0], PACKAGE)
    first = on_disk(newer)
    newer.requests.clear()
    newer.fetched.clear()
    assert pull_tag(client, "support", files[0], PACKAGE).done == "unchanged" and not newer.fetched and newer.count("POST", "/api/pull") == 0
    made = pull_tag(client, "support", files[1], PACKAGE)
    assert made.done == "updated" and client.show("support:q4_K_M").adapter == blob_digest(files[1].adapter)
    assert len(on_disk(newer)) == len(first), "the adapter that was replaced stayed"
    changed = pull_tag(client, "support", files[1], Package(system="Rhyme.", parameters=PACKAGE.parameters))
    assert changed.bytes_sent < 2500 and client.show("support:q4_K_M").system == "Rhyme."


def test_a_file_of_ones_own_is_pulled_in_parts(newer, tmp_path, monkeypatch):
    monkeypatch.setattr(ollama_double_pull, "PART", 40_000)
    client = OllamaClient(newer.url)
    sha256 = served_gguf.write(path := tmp_path / "own.gguf", served_gguf.CHAT, filling=1.0)
    file = TagFile("q4_K_M", path, sha256, adapter(tmp_path / "a.gguf"))
    made = pull_tag(client, "own", file, PACKAGE)
    parts = [request.sent for request in newer.fetched if request.path.endswith(sha256) and request.method == "GET" and request.sent]
    assert made.blob == f"sha256:{sha256}" and len(parts) > 2 and sum(parts) == path.stat().st_size
    assert client.show("own:q4_K_M").template == served_gguf.CHAT  # no other template is put in its place, as when a server creates it


def test_a_pull_that_fails_leaves_the_tag_as_it_was(newer, tmp_path, monkeypatch):
    client = OllamaClient(newer.url)
    files = [read(client, adapter(tmp_path / f"{at}.gguf", at)) for at in range(2)]
    before = pull_tag(client, "support", files[0], PACKAGE)

    def refused(reason: str) -> None:
        with pytest.raises(OlpackError, match=reason):
            pull_tag(client, "support", files[1], PACKAGE)
        assert {tag.model: tag.digest for tag in client.tags()}.get("support:q4_K_M") == before.digest
        assert sorted(tag.model for tag in client.tags()) == ["support:q4_K_M", "tiny:1b"]

    assert reaches(client)
    newer.faults.no_loopback = True
    assert not reaches(client)
    refused("does not find a registry on this machine's 127.0.0.1; it may run in a container.*`package: merged`")
    newer.faults.no_loopback = False
    newer.faults.corrupt_pulls = True
    refused("digest mismatch")
    newer.faults.corrupt_pulls = False
    newer.faults.disk_left = 10
    refused("no space left")
    newer.faults.disk_left = None
    with monkeypatch.context() as patch:
        patch.setattr(OllamaClient, "copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pull_tag(client, "support", files[1], PACKAGE)
    assert sorted(tag.model for tag in client.tags()) == ["support:q4_K_M", "tiny:1b"]
    weights = client_file(client, files[1])
    shutil.move(weights, tmp_path / "base.gguf")
    newer.store.facts(f"sha256:{files[1].sha256}")
    gone = TagFile(files[1].tag, tmp_path / "base.gguf", files[1].sha256, files[1].adapter, files[1].origin)
    with pytest.raises(OlpackError, match="no longer has the weights of the tag's base"):
        pull_tag(client, "support", gone, PACKAGE)


def test_what_a_killed_deploy_left_goes_with_the_next(newer, tmp_path):
    client = OllamaClient(newer.url)
    with LoopbackRegistry(None) as registry:
        for model in (registry.model, registry.model.replace("127.0.0.1", "192.0.2.1")):
            client.copy("tiny:1b", model)
        file = read(client, adapter(tmp_path / "a.gguf"))
        pull_tag(client, "support", file, PACKAGE)
        assert registry.model in {tag.model for tag in client.tags()}  # that deploy may still run
    assert pull_tag(client, "support", file, PACKAGE).done == "unchanged"  # it may have been killed after it named the tag
    assert sorted(tag.model for tag in client.tags() if "olpack-" in tag.model) == [registry.model.replace("127.0.0.1", "192.0.2.1")]


def test_a_connection_that_breaks_prints_nothing(capfd):
    with LoopbackRegistry(None) as registry:
        host, _, port = registry.host.partition(":")
        for sent in (b"", b"GET /v2/"):
            with socket.create_connection((host, int(port))) as broken:
                broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it ends with a reset
                broken.sendall(sent)
        assert httpx.get(f"http://{registry.host}/v2/").status_code == 404
    assert capfd.readouterr().err == ""


def test_the_registry_has_one_tag_for_who_knows_its_name(tmp_path):
    (path := tmp_path / "a.bin").write_bytes(bytes(range(200)))
    digest, small = blob_digest(path), "sha256:" + "1" * 64
    tag = ComposedTag(b'{"layers": []}', digest, {small: b"text"}, {digest: path})
    with LoopbackRegistry(tag) as registry:
        host, space = registry.model.removesuffix("/tag:new").split("/")
        assert host.startswith("127.0.0.1:") and len(space) > 32
        url = f"http://{host}/v2/{space}/tag"
        assert httpx.get(f"{url}/manifests/new").content == tag.manifest
        whole = httpx.get(f"{url}/blobs/{digest}")
        assert whole.content == path.read_bytes() and whole.headers["location"] == f"{url}/blobs/{digest}"
        head = httpx.head(f"{url}/blobs/{digest}")
        assert head.headers["content-length"] == "200" and head.headers["connection"] == "close"
        part = httpx.get(f"{url}/blobs/{digest}", headers={"Range": "bytes=10-19"})
        assert part.status_code == 206 and part.content == bytes(range(10, 20)) and part.headers["content-range"] == "bytes 10-19/200"
        assert httpx.get(f"{url}/blobs/{small}", headers={"Range": "bytes=1-99"}).content == b"ext"
        assert httpx.get(f"{url}/blobs/{digest}", headers={"Range": "bytes=200-300"}).status_code == 416
        assert httpx.get(f"{url.upper().replace('HTTP', 'http')}/manifests/NEW".replace("/V2/", "/v2/")).status_code == 200
        for other in (
            f"{url}/manifests/old",
            f"{url}/blobs/sha256:{'2' * 64}",
            f"{url}/blobs/../../../../etc/passwd",
            f"{url}/blobs/{path}",
            f"http://{host}/v2/",
            f"http://{host}/v2/olpack-{'0' * 32}/tag/manifests/new",
        ):
            assert httpx.get(other).status_code == 404, other
        assert httpx.post(f"{url}/manifests/new").status_code == 501
        assert registry.bytes_taken == len(tag.manifest) + 204
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/manifests/new")
