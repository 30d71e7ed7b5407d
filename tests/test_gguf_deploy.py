"""An adapter on a model of the server is registered from that model: its weights are neither sent nor copied, and it is never touched."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import served_gguf
from ollama_double_store import encoded

from olpack.deploy import Package
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.deploy.ollama_store import place, store_of
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
