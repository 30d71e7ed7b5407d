"""The converter comes from the place that the user names, or is fetched once and whole."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from olpack.errors import OlpackError
from olpack.llamacpp import source
from olpack.llamacpp.source import ARCHIVE, VERSION, converter_source

RELEASE = os.environ.get("OLPACK_LLAMA_CPP", "")  # of `make test`: the archive of the release


def write_checkout(folder: Path) -> Path:
    for name in ("conversion", "gguf-py/gguf"):
        (folder / name).mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).touch()
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OLPACK_LLAMA_CPP", raising=False)
    return tmp_path / "cache" / "olpack"


def test_a_checkout_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OLPACK_LLAMA_CPP", str(write_checkout(tmp_path / "llama.cpp")))
    assert converter_source() == tmp_path / "llama.cpp"


def test_an_unpacked_source_archive_is_taken_too(tmp_path, monkeypatch):
    checkout = write_checkout(tmp_path / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp")
    monkeypatch.setenv("OLPACK_LLAMA_CPP", str(checkout.parents[1]))
    assert converter_source() == checkout


@pytest.mark.parametrize(("name", "reason"), [("nothing", "contains no llama.cpp converter"), ("nothing.tar.gz", "there is no such file")])
def test_a_wrong_place_is_refused(tmp_path, monkeypatch, name, reason):
    monkeypatch.setenv("OLPACK_LLAMA_CPP", str(tmp_path / name))
    with pytest.raises(OlpackError, match=reason):
        converter_source()


def test_another_archive_is_refused(tmp_path, monkeypatch, empty_cache):
    archive = tmp_path / ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, arcname="test.py")
    monkeypatch.setenv("OLPACK_LLAMA_CPP", str(archive))
    with pytest.raises(OlpackError, match="is not the source archive of llama-cpp-python"):
        converter_source()
    assert not empty_cache.exists()


def test_without_an_index_the_error_says_what_to_do(tmp_path, monkeypatch, empty_cache):
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OlpackError, match=f"could not be fetched: pip reports .*get {ARCHIVE} elsewhere and set OLPACK_LLAMA_CPP"):
        converter_source()
    assert list(empty_cache.iterdir()) == []


def test_an_archive_is_unpacked_once_and_without_what_is_not_needed(tmp_path, empty_cache):
    """`_unpack` on a small archive of the same shape, with members that must not get out."""
    checkout = write_checkout(tmp_path / "tree" / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp")
    (checkout / "conversion" / "base.py").write_text("# the converter")
    (checkout / "gguf-py" / "gguf" / "__init__.py").touch()
    (checkout / "src").mkdir()
    (checkout / "src" / "llama.cpp").touch()
    (checkout / "conversion" / "link.py").symlink_to("/etc/passwd")
    archive = tmp_path / "small.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "tree", arcname=".")
        tar.add(__file__, arcname=f"llama_cpp_python-{VERSION}/vendor/llama.cpp/conversion/../../../../../out.py")
    target = empty_cache / "llama.cpp"
    source._unpack(archive, target)
    source._unpack(archive, target)  # a second run that started at the same time
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == ["conversion/base.py", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "gguf-py/gguf/__init__.py"]
    assert list(empty_cache.iterdir()) == [target]


@pytest.mark.parametrize("change", ["a flipped bit", "a module more", "writable by others"])
def test_a_converter_that_was_changed_is_made_again(monkeypatch, empty_cache, capsys, change):
    monkeypatch.setenv("OLPACK_LLAMA_CPP", RELEASE)
    folder = converter_source()
    module = folder / "conversion" / "base.py"
    whole = module.read_bytes()
    if change == "a flipped bit":
        module.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    elif change == "a module more":
        (folder / "torch.py").write_text("import os")
    else:
        folder.chmod(0o777)
    assert source.cached_source() is None
    assert converter_source() == folder == source.cached_source()
    assert module.read_bytes() == whole
    assert f"{folder} is not llama.cpp's converter as it was released: it is made again" in capsys.readouterr().err
    assert [path.name for path in empty_cache.iterdir()] == [folder.name]


def test_what_python_compiled_of_the_converter_is_not_executed(monkeypatch):
    monkeypatch.setenv("OLPACK_LLAMA_CPP", RELEASE)
    compiled = converter_source() / "conversion" / "__pycache__"
    compiled.mkdir()
    (compiled / "base.pyc").touch()
    assert converter_source() and not compiled.exists()
