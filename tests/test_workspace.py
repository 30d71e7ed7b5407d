"""Digests: what they depend on, and how often a file is read for one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from olpack import workspace
from olpack.workspace import file_digest, folder_fingerprint

USUAL = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "LICENSE",
    "LICENSE.txt",
]
EXTRA = [
    "notes.txt",
    "eval.json",
    "train.log",
    "model-Q8_0.gguf",
    "optimizer.pt",
    "trainer_state.json",
    "pytorch_model.bin",
    "plot.png",
    "MODEL",
    "backup.safetensors",
    "consolidated.safetensors",
    "README.md",
    ".gitattributes",
    "convert.py",
    "tokens.json.bak",
]


def all_of(folder: Path) -> str:
    """The digest of small files as it always was, each counted."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix != ".md":
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in USUAL:
        (folder / name).write_text(f"this is {name}")
    return folder


def test_a_folder_of_a_model_has_the_digest_that_it_had(model):
    assert folder_fingerprint(model) == all_of(model)


@pytest.mark.parametrize("name", EXTRA)
def test_a_file_that_is_no_part_of_the_model_changes_nothing(model, name):
    before = folder_fingerprint(model)
    (model / name).write_text("new")
    (model / "runs").mkdir()
    assert folder_fingerprint(model) == before


@pytest.mark.parametrize("name", USUAL)
def test_a_file_that_the_model_is_read_from_does(model, name):
    before = folder_fingerprint(model)
    (model / name).write_text("changed")
    assert folder_fingerprint(model) != before
    (model / name).unlink()
    assert folder_fingerprint(model) != before


def test_weights_that_an_index_names_count_whatever_they_are_called(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "first.safetensors"}}))
    before = folder_fingerprint(model)
    (model / "first.safetensors").write_text("weights")
    assert folder_fingerprint(model) != before
    assert folder_fingerprint(model) == all_of(model)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read for a digest, each as often as it is."""
    read, plain = [], hashlib.file_digest

    def digest(file, kind):
        read.append(Path(file.name).name)
        return plain(file, kind)

    monkeypatch.setattr("olpack.workspace.hashlib.file_digest", digest)
    return read


def aged(path: Path) -> Path:
    """With an inode whose times are old enough to be told from a write that comes now."""
    import time

    while time.time_ns() - path.stat().st_ctime_ns <= 2 * workspace._SAME_TIME_NS:
        time.sleep(0.01)
    return path


def test_a_file_is_read_once_until_it_is_written(tmp_path, hashed):
    path = tmp_path / "file"
    path.write_text("one")
    assert {file_digest(aged(path)) for _ in range(6)} == {hashlib.sha256(b"one").hexdigest()}
    assert len(hashed) == 1
    shutil.copy(path, tmp_path / "copy")
    assert file_digest(tmp_path / "copy") == file_digest(path)
    assert len(hashed) == 2


def test_a_write_of_the_same_size_and_time_is_seen(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    times = path.stat()
    file_digest(aged(path))
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()
    for text in ("red", "sun", "ice"):  # faster than the file system's clock
        path.write_text(text)
        assert file_digest(path) == hashlib.sha256(text.encode()).hexdigest()
