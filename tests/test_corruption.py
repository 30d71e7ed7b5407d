"""A bit that a disk flips in what a build keeps is found before the file is used, with the file's time and size as they were."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from olpack.compare.cache import Cache
from olpack.stages import records
from olpack.stages.records import Step
from olpack.stages.stage import Artefact
from olpack.workspace import BuildPaths, file_digest


def flip(path: Path, place: int) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "importance.gguf", "sensitivity.json", "compare/results.json"])
def test_a_flipped_bit_in_an_output_makes_its_step_stale_and_names_the_file(tmp_path, name):
    paths, output = BuildPaths("a", tmp_path), tmp_path / name
    output.parent.mkdir(exist_ok=True)
    output.write_bytes(bytes(5000))
    records.finish(paths, Step("train", "train", {"a": 1}, "new"), [output], {"adapter_digest": "0" * 64})
    assert records.damage(paths, "train", records.read(paths, "train")) == ""
    flip(output, 3000)
    assert records.damage(paths, "train", records.read(paths, "train")) == f"{output} was changed"


def test_a_flipped_bit_in_a_measured_figure_has_it_measured_again(tmp_path, capsys):
    cache, key, figures = Cache(tmp_path), {"a": 1}, {"losses": (1.25, 2.5), "text": "é"}
    cache.store("q4_K_M", "perplexity", key, figures)
    assert cache.load("q4_K_M", "perplexity", key) == {"losses": [1.25, 2.5], "text": "é"}
    (file,) = tmp_path.iterdir()
    flip(file, file.read_bytes().index(b"1.25"))
    assert cache.load("q4_K_M", "perplexity", key) is None
    assert f"{file} is damaged: perplexity is measured again" in capsys.readouterr().err
    cache.store("q4_K_M", "perplexity", key, figures)
    flip(file, file.read_bytes().index(b"digest"))
    assert cache.load("q4_K_M", "perplexity", key) is None
    assert f"{file} is damaged: perplexity is measured again" in capsys.readouterr().err


def test_a_figure_of_an_earlier_version_has_no_digest_and_is_used(tmp_path):
    cache, key = Cache(tmp_path), {"a": 1}
    cache.store("q4_K_M", "perplexity", key, {"losses": [1.25]})
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    begin, end = text.index('"digest"'), text.index('"data"')
    file.write_text(text[:begin] + text[end:])
    assert cache.load("q4_K_M", "perplexity", key) == {"losses": [1.25]}


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[BuildPaths, Path]:
    """A build with one output that is too large to be read at every command."""
    monkeypatch.setattr(records, "_ALWAYS_READ", 1000)
    paths, output = BuildPaths("a", tmp_path), tmp_path / "gguf/a-Q8_0.gguf"
    output.parent.mkdir()
    output.write_bytes(bytes(5000))
    records.finish(paths, Step("export", "export-Q8_0", {"a": 1}, "new"), [output], {"size": 5000, "sha256": "0" * 64})
    return paths, output


def damage(paths: BuildPaths) -> str:
    record = records.read(paths, "export-Q8_0")
    assert record
    return records.damage(paths, "export-Q8_0", record)


def test_a_flipped_bit_in_a_large_output_is_found_although_it_is_read_once(large, monkeypatch):
    paths, output = large
    with monkeypatch.context() as patch:
        patch.setattr(records, "file_digest", lambda path: pytest.fail("it was read again"))
        assert damage(paths) == ""
    flip(output, 3000)
    assert damage(paths) == f"{output} was changed"
    flip(output, 3000)
    assert damage(paths) == ""


def test_a_large_output_of_an_earlier_version_or_of_a_copied_folder_is_read_once(large, monkeypatch):
    paths, output = large
    record = paths.stage("export-Q8_0")
    saved = json.loads(record.read_text())
    record.write_text(json.dumps({name: saved[name] for name in ("inputs", "outputs", "result")}))
    copied = output.with_name("copy")
    shutil.copy2(output, copied)
    copied.replace(output)
    read = []
    monkeypatch.setattr(records, "file_digest", lambda path: read.append(path) or file_digest(path))
    assert damage(paths) == "" and read == [output]
    records.remember_compared(paths, "export-Q8_0")
    assert damage(paths) == "" and read == [output]
    assert json.loads(record.read_text())["outputs"] == saved["outputs"]


@pytest.mark.parametrize("place", ['"learning_rate"', "0.25", "adapter_digest", "4242", '"digest"', '"outputs"', "{"])
def test_a_flipped_bit_in_a_record_is_named(tmp_path, place):
    paths, output = BuildPaths("a", tmp_path), tmp_path / "adapter/adapter_model.safetensors"
    output.parent.mkdir()
    output.write_bytes(bytes(4242))
    inputs = {"learning_rate": 0.25}
    records.finish(paths, Step("train", "train", inputs, "new"), [output], {"adapter_digest": "0" * 64})
    record, build = paths.stage("train"), SimpleNamespace(paths=paths)
    artefact = Artefact("train", 1, lambda build, unit: inputs, stale=lambda *_: "")
    assert artefact.step(build).reason == ""
    flip(record, record.read_bytes().index(place.encode()) + len(place) - 1)
    assert records.read(paths, "train") is None
    assert artefact.step(build).reason == f"{record} is damaged"


def test_a_record_of_an_earlier_version_has_no_digest_and_is_valid(tmp_path):
    paths = BuildPaths("a", tmp_path)
    records.finish(paths, Step("train", "train", {"a": (1, 2)}, "new"), [], {"adapter_digest": "0" * 64})
    written = records.read(paths, "train")
    saved = json.loads(paths.stage("train").read_text())
    assert saved.pop("digest")
    paths.stage("train").write_text(json.dumps(saved))
    assert records.read(paths, "train") == written and written.inputs == {"a": [1, 2]}
