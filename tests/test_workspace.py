"""Digests: what they depend on, and how often a file is read for one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from olpack import workspace
from olpack.errors import OlpackError
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


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_removed_when_the_build_folder_is_locked(tmp_path, dead):
    for place in (
        tmp_path / f".adapter.{dead}.tmp" / "weights",
        tmp_path / "gguf" / f".a.gguf.{dead}.partial",
        tmp_path / f".plan.json.{os.getpid()}.tmp",
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    running = tmp_path / f".adapter.{os.getppid()}.tmp"
    running.mkdir()
    with workspace.locked(tmp_path):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == sorted([".lock", running.name, "gguf"])


def test_a_folder_that_a_dead_process_moved_away_is_put_back(tmp_path, dead):
    for name in (f".adapter.{dead}.old", f".adapter.{dead}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kind").write_text(name[-3:])
    with workspace.locked(tmp_path):
        assert (tmp_path / "adapter/kind").read_text() == "old"
        assert not list(tmp_path.glob(".adapter*"))


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(workspace, "_exchange", lambda *_: False)
    for text in ("one", "two"):
        with workspace.folder_atomically(tmp_path / "adapter") as folder:
            (folder / "a").write_text(text)
        assert (tmp_path / "adapter/a").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_there_is_a_whole_folder_at_every_moment(tmp_path, monkeypatch):
    """A process that is killed at any rename or removal leaves an adapter: here each of these calls fails."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "a").write_text("one")

    def fail(*_):
        raise OSError(5, "killed")

    with pytest.raises(OlpackError), workspace.folder_atomically(adapter) as folder:
        (folder / "a").write_text("two")
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(workspace, "_exchange", lambda *_: False)
    assert (adapter / "a").read_text() == "one"
    monkeypatch.undo()
    seen = []
    remove = workspace.remove
    monkeypatch.setattr(workspace, "remove", lambda path: (seen.append((adapter / "a").read_text()), remove(path)))
    with workspace.folder_atomically(adapter) as folder:
        (folder / "a").write_text("two")
        monkeypatch.setattr(os, "replace", fail)
    assert seen[-1] == "two" and set(seen) <= {"one", "two"}


def test_outputs_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with workspace.folder_atomically(tmp_path / "adapter") as folder:
            (folder / "private").touch(mode=0o600)
        workspace.write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("adapter", "adapter/private", "file")] == [0o750, 0o640, 0o640]


def test_links_in_the_place_of_outputs_are_not_followed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    build = tmp_path / "build"
    build.mkdir()
    (build / "adapter").symlink_to(target)
    (build / f".adapter.{os.getpid()}.tmp").symlink_to(target)
    (build / "file").symlink_to(target / "mine")
    (build / f".file.{os.getpid()}.tmp").symlink_to(target / "mine")
    with workspace.folder_atomically(build / "adapter") as folder:
        (folder / "a").write_text("a")
    workspace.write_atomically(build / "file", "text")
    assert [path.name for path in target.iterdir()] == ["mine"] and (target / "mine").read_text() == "mine"
    assert not (build / "adapter").is_symlink() and (build / "file").read_text() == "text"
    assert sorted(path.name for path in build.iterdir()) == ["adapter", "file"]


def test_scratch_folders_of_dead_processes_are_removed(tmp_path, monkeypatch, dead):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workspace._remove_scratch.cache_clear()
    (tmp_path / f"olpack-{dead}-abc").mkdir(mode=0o700)
    (tmp_path / f"olpack-{dead}-abc/file").touch()
    (tmp_path / f"olpack-{os.getppid()}-abc").mkdir(mode=0o700)
    (tmp_path / "olpack-notes").mkdir()
    with workspace.scratch() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, f"olpack-{os.getppid()}-abc", "olpack-notes"])
    workspace._remove_scratch.cache_clear()


def test_a_cache_folder_that_others_can_write_to_is_closed_and_one_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "olpack").mkdir()
    (tmp_path / "olpack").chmod(0o777)
    assert stat.S_IMODE(workspace.user_cache().stat().st_mode) == 0o755
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(OlpackError, match="Other users can put code into the cache folder .* set XDG_CACHE_HOME"):
        workspace.user_cache()


def test_a_cache_folder_that_cannot_be_made_ends_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OlpackError, match="Nothing can be written in the cache folder .*Not a directory. .*set XDG_CACHE_HOME"):
        workspace.make_user_cache()
