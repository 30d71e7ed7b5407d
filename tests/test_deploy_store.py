"""A store written without a server: the digests of the recording, and a server that serves from it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble
from ollama_double_store import CHATML, encoded, encoded_parameters
from transformers import PreTrainedTokenizerFast

from olpack.deploy import Package
from olpack.deploy.client import OllamaClient
from olpack.deploy.ollama_store import compose, models_folder, write_store
from olpack.deploy.prompt_identity import check_identity
from olpack.deploy.register import TagFile, point_latest, register
from olpack.errors import OlpackError
from olpack.model.chat_template import protect
from olpack.model.gguf_header import Header, read_header

TRANSCRIPT = [json.loads(line) for line in Path(__file__).with_name("data").joinpath("ollama/transcript.jsonl").read_text().splitlines()]
TAGS = {"q4_0": 2, "q4_K_M": 15, "q5_K_M": 17, "q8_0": 7}
PACKAGE = Package(
    system='Answer in <Python> & more.\n"""Docstrings."""\nBe kind\u00a0🙂\u2028',
    license="Apache-2.0",
    parameters={"temperature": 1.0, "num_ctx": 2048, "stop": ("<|im_end|>",), "use_mmap": True, "top_p": 0.9},
    messages=({"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "hello"}),
)


@pytest.fixture
def files(tmp_path: Path) -> list[TagFile]:
    template = protect(CHATML.jinja, {})
    made = [(tag, tmp_path / f"coder-{tag.upper()}.gguf", number) for tag, number in TAGS.items()]
    return [TagFile(tag, path, served_gguf.write(path, template, number, filling=number)) for tag, path, number in made]


def _recorded(path: str, model: str) -> dict:
    return next(
        one["response"]["body"][0] if path == "/api/show" else one["request"]["json"]
        for one in TRANSCRIPT
        if one["request"]["path"] == path and (one["request"]["json"] or {}).get("model") == model
    )


def _tree(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


# -- as the real server wrote it -----------------------------------------------------------------------------------------------------------


def _header(model: str) -> Header:
    metadata = _recorded("/api/show", model)["model_info"]
    return Header(metadata, {"all": ((metadata["general.parameter_count"],), 0)})


def test_the_recorded_manifest_with_all_layers() -> None:
    """What the server put in for a template that it knows is given here as the package's own."""
    asked = _recorded("/api/create", "coder:q4_K_M")
    [digest] = asked["files"].values()
    size = next(raw for one in TRANSCRIPT if one["request"]["path"].endswith(digest) and (raw := one["request"]["raw_bytes"]))
    template = _recorded("/api/show", "coder:q4_K_M")["template"]
    package = Package(asked["system"], template, asked["parameters"], asked["license"], tuple(asked["messages"]))
    manifest, blobs = compose(digest, size, _header("coder:q4_K_M"), package)
    listed = next(one["response"]["body"][0]["models"] for one in TRANSCRIPT if one["note"] == "tags")
    assert [hashlib.sha256(manifest).hexdigest(), size + sum(map(len, blobs.values()))] == [listed[0]["digest"], listed[0]["size"]]
    said = [line["status"] for one in TRANSCRIPT if one["request"]["json"] == asked for line in one["response"]["body"]]
    created = [status.removeprefix("creating new layer ") for status in said if status.startswith("creating")]
    assert set(created) < set(blobs)  # the others are the template's and the config's


def test_the_recorded_manifest_of_bare_weights() -> None:
    digest = "sha256:cfb97842be25a0a0598a6bab2e4a2ab912db29ea51d5174ace63d13228f69b6f"
    listed = next(model for model in TRANSCRIPT[-1]["response"]["body"][0]["models"] if model["name"] == "near:latest")
    config = len(b"".join(compose(digest, 0, _header("near"), Package())[1].values()))
    manifest, _ = compose(digest, listed["size"] - config, _header("near"), Package())
    assert hashlib.sha256(manifest).hexdigest() == listed["digest"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (33_536, "34K"), (40_081_152, "40.08M"), (40_000_000, "40M"), (1_543_714_304, "1.5B"), (7_000_000_000, "7B")],
)
def test_parameters_are_counted_as_the_server_shows_them(count: int, shown: str) -> None:
    _, blobs = compose("sha256:" + "0" * 64, 1, Header({"general.architecture": "llama", "general.file_type": 0}, {"all": ((count,), 0)}), Package())
    [config] = [json.loads(content) for content in blobs.values()]
    assert (config["model_type"], config["model_family"], config["file_type"]) == (shown, "llama", "unknown")


def test_the_header_of_a_gguf(files: list[TagFile], tmp_path: Path) -> None:
    header = read_header(files[1].path)
    assert (header.metadata["general.architecture"], header.metadata["general.file_type"]) == ("qwen2", 15)
    assert header.metadata["tokenizer.chat_template"] == protect(CHATML.jinja, {})
    assert (header.metadata["tokenizer.ggml.add_bos_token"], header.parameters) == (False, 261 * 128)
    for content in (b"", b"GGUF", b"nothing of the kind, and long enough for a header", files[0].path.read_bytes()[:3000]):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(OlpackError, match=r"broken.gguf is no whole GGUF"):
            read_header(tmp_path / "broken.gguf")


# -- as a server reads it ------------------------------------------------------------------------------------------------------------------


def test_a_server_writes_the_same_files(ollama_double: OllamaDouble, files: list[TagFile], tmp_path: Path) -> None:
    stored = write_store(tmp_path / "offline", "coder", files, PACKAGE, latest="q4_K_M")
    assert [one.model for one in stored] == ["coder:q4_0", "coder:q4_K_M", "coder:q5_K_M", "coder:q8_0", "coder:latest"]
    assert [one.how for one in stored] == ["linked"] * 4 + ["there"]
    registered = register(client := OllamaClient(ollama_double.url), "coder", files, PACKAGE)
    point_latest(client, "coder", "q4_K_M")
    assert [one.digest for one in stored[:4]] == [one.digest for one in registered]
    assert stored[4].digest == stored[1].digest
    assert _tree(tmp_path / "offline") == _tree(ollama_double.store.root)


def test_a_server_serves_it(files: list[TagFile], tmp_path: Path) -> None:
    with OllamaDouble(tmp_path) as double:
        client = OllamaClient(double.url)
        stored = write_store(double.store.root, "coder", files, PACKAGE, latest="q8_0")  # while it runs
        assert {model.model: model.digest for model in client.tags()} == {one.model: one.digest for one in stored}
        shown = client.show("coder")
        assert (shown.system, shown.license, shown.messages, shown.blob) == (
            PACKAGE.system,
            PACKAGE.license,
            PACKAGE.messages,
            f"sha256:{files[3].sha256}",
        )
        assert shown.parameters == {"temperature": 1, "num_ctx": 2048, "stop": ["<|im_end|>"], "use_mmap": True, "top_p": 0.9}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=served_gguf.tokenizer(), eos_token="<|im_end|>", bos_token="<s>")
        tokenizer.chat_template = CHATML.jinja
        assert check_identity(client, "coder:q4_K_M", tokenizer).identical
        assert [one.done for one in register(client, "coder", files, PACKAGE)] == ["unchanged"] * 4
        assert client.bytes_sent == 0


def test_again_does_nothing(files: list[TagFile], tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = write_store(store, "coder", files, PACKAGE, latest="q4_0")
    moments = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    again = write_store(store, "coder", files, PACKAGE, latest="q4_0")
    assert again == [dataclasses.replace(one, how="there", done="unchanged") for one in first]
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == moments


def test_nothing_of_other_models_is_touched(ollama_double: OllamaDouble, files: list[TagFile]) -> None:
    client = OllamaClient(ollama_double.url)
    register(client, "other", files[:1], PACKAGE)
    before = _tree(ollama_double.store.root)
    write_store(ollama_double.store.root, "coder", files, dataclasses.replace(PACKAGE, system="Be brief."))
    after = _tree(ollama_double.store.root)
    assert {path: after[path] for path in before} == before
    assert client.show("other:q4_0").system == PACKAGE.system


def test_a_changed_package_replaces_the_manifest_only(files: list[TagFile], tmp_path: Path) -> None:
    store = tmp_path / "store"
    [first] = write_store(store, "coder", files[:1], PACKAGE)
    before = set(_tree(store))
    [second] = write_store(store, "coder", files[:1], dataclasses.replace(PACKAGE, system="Be brief."))
    assert (second.how, second.done, second.blob) == ("there", "written", first.blob)
    assert second.digest != first.digest
    assert len(set(_tree(store)) - before) == 1  # the new system prompt


@pytest.mark.parametrize("other", ["other:Q4_k_m", "coder:q4_k_m", "Coder:q8_0"])
def test_the_same_tag_in_another_case(ollama_double: OllamaDouble, files: list[TagFile], other: str) -> None:
    """The server looks a name up as some model spells it, so that is how it must lie there."""
    client, (name, _, tag) = OllamaClient(ollama_double.url), other.partition(":")
    register(client, name, [dataclasses.replace(files[0], tag=tag)], PACKAGE)
    [stored] = write_store(ollama_double.store.root, "coder", files[1:2], PACKAGE)
    assert client.show("coder:q4_K_M").blob == stored.blob == f"sha256:{files[1].sha256}"
    assert stored.model in [model.model for model in client.tags()]
    spelled = [model.model.lower() for model in client.tags()]
    assert len(spelled) == len(set(spelled))


def test_names_with_a_namespace_and_a_host(files: list[TagFile], tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert [one.model for one in write_store(store, "me/coder", files[:1], PACKAGE)] == ["me/coder:q4_0"]
    assert [one.model for one in write_store(store, "my.host:5000/me/coder", files[:1], PACKAGE)] == ["my.host:5000/me/coder:q4_0"]
    assert (store / "manifests/my.host:5000/me/coder/q4_0").is_file()


# -- how files get there -------------------------------------------------------------------------------------------------------------------


def test_hard_links_take_no_space(files: list[TagFile], tmp_path: Path) -> None:
    [stored] = write_store(tmp_path / "store", "coder", files[:1], PACKAGE)
    assert (tmp_path / "store/blobs" / stored.blob.replace(":", "-")).samefile(files[0].path)
    assert files[0].path.stat().st_nlink == 2


def test_without_links_it_is_copied(files: list[TagFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    [stored] = write_store(tmp_path / "store", "coder", files[:1], PACKAGE)
    blob = tmp_path / "store/blobs" / stored.blob.replace(":", "-")
    assert stored.how in ("cloned", "copied")
    assert blob.read_bytes() == files[0].path.read_bytes() and not blob.samefile(files[0].path)


def test_as_root_files_are_the_stores_owners(files: list[TagFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, given = tmp_path / "store", []
    store.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "chown", lambda path, user, group: given.append((path, user, group)))
    write_store(store, "coder", files[:1], PACKAGE)
    owner = store.stat()
    assert {(user, group) for _, user, group in given} == {(owner.st_uid, owner.st_gid)}
    named = {path.name.partition(".")[0] for path, _, _ in given}
    assert named == {path.name.partition(".")[0] for path in store.rglob("*")} - {f"sha256-{files[0].sha256}"}


@pytest.mark.parametrize("same", [True, False])
def test_another_users_file_is_not_linked(files: list[TagFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """The server could not touch it."""
    seen = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = list(seen(path, **options))
        if path.suffix == ".gguf" and not same:
            found[4] += 1  # st_uid
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    [stored] = write_store(tmp_path / "store", "coder", files[:1], PACKAGE)
    assert (stored.how == "linked") is same


def test_a_half_blob_is_replaced(files: list[TagFile], tmp_path: Path) -> None:
    blob = tmp_path / "store/blobs" / f"sha256-{files[0].sha256}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"half")
    write_store(tmp_path / "store", "coder", files[:1], PACKAGE)
    assert blob.read_bytes() == files[0].path.read_bytes()


def test_without_a_digest_the_file_is_hashed(files: list[TagFile], tmp_path: Path) -> None:
    [stored] = write_store(tmp_path / "store", "coder", [TagFile("q4_0", files[0].path)], PACKAGE)
    assert stored.blob == f"sha256:{files[0].sha256}"


def test_a_file_that_changed_since_leaves_nothing(files: list[TagFile], tmp_path: Path) -> None:
    files[0].path.write_bytes(files[0].path.read_bytes()[:-1] + b"x")
    with pytest.raises(OlpackError, match="is not the file it was"):
        write_store(tmp_path / "store", "coder", files[:1], PACKAGE)
    assert not [path for path in _tree(tmp_path / "store") if files[0].sha256 in path or "manifests" in path or path.endswith(".tmp")]


def test_a_manifest_is_there_whole_or_not_at_all(files: list[TagFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    write_store(store, "coder", files[:1], PACKAGE)
    before = (store / "manifests/registry.ollama.ai/library/coder/q4_0").read_bytes()
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if "manifests" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OlpackError, match=r"store .* could not be written: No space left"):
        write_store(store, "coder", files, dataclasses.replace(PACKAGE, system="Be brief."))
    tree = _tree(store)
    assert {path: content for path, content in tree.items() if "manifests" in path} == {"manifests/registry.ollama.ai/library/coder/q4_0": before}
    assert not [path for path in tree if path.endswith(".tmp")]


def test_every_named_blob_is_there(files: list[TagFile], tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, "coder", files, PACKAGE, latest="q4_0")
    for path in store.glob("manifests/*/*/*/*"):
        manifest = json.loads(path.read_bytes())
        assert encoded(manifest) == path.read_bytes()
        for layer in [manifest["config"], *manifest["layers"]]:
            content = (store / "blobs" / layer["digest"].replace(":", "-")).read_bytes()
            assert (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}") == (layer["size"], layer["digest"])


@pytest.mark.parametrize(
    ("name", "package", "latest", "said"),
    [
        ("bad name", PACKAGE, None, "its model has ' '"),
        ("coder", Package(), None, "'num_ctx' is not set"),
        ("coder", PACKAGE, "q6_K", "latest cannot point to 'q6_K'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    files: list[TagFile], tmp_path: Path, name: str, package: Package, latest: str | None, said: str
) -> None:
    with pytest.raises(OlpackError, match=said):
        write_store(tmp_path / "store", name, files, package, latest)
    assert not (tmp_path / "store").exists()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OlpackError, match=r"gone.gguf does not exist"):
        write_store(tmp_path / "store", "coder", [TagFile("q4_0", tmp_path / "gone.gguf", "0" * 64)], PACKAGE)


def test_where_a_server_keeps_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert models_folder() == tmp_path
    monkeypatch.delenv("OLLAMA_MODELS")
    assert models_folder() == Path.home() / ".ollama/models"


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (5e-05, "0.00005"),
        (1e-06, "0.000001"),
        (9.5e-07, "9.5e-7"),
        (1e-07, "1e-7"),
        (1.5e-10, "1.5e-10"),
        (-5e-05, "-0.00005"),
        (0.1, "0.1"),
        (1.0, "1"),
        (0.0, "0"),
        (-0.0, "-0"),
        (0, "0"),
        (42, "42"),
        (-1, "-1"),
        (1e16, "10000000000000000"),
        (123456789012345680000.0, "123456789012345680000"),
        (1e21, "1e+21"),
        (10**21, "1e+21"),
        (1.25e22, "1.25e+22"),
        (2**53 + 1, "9007199254740992"),
        (1 / 3, "0.3333333333333333"),
        (1.7e308, "1.7e+308"),
        (5e-324, "5e-324"),
        (True, "true"),
    ],
)
def test_numbers_are_written_as_go_writes_them(ollama_double: OllamaDouble, number: float, written: str) -> None:
    """By encoding/json: a float64 has an exponent below 1e-6 and from 1e21 on, without a zero before it. The double has a rule of its own."""
    _, blobs = compose("sha256:" + "0" * 64, 1, Header({}, {}), Package(parameters={"x": number, "stop": ["1e-05"]}))
    assert f'{{"stop":["1e-05"],"x":{written}}}\n'.encode() in blobs.values()
    assert encoded_parameters({"x": number, "stop": ["1e-05"]}) == f'{{"stop":["1e-05"],"x":{written}}}\n'.encode()
