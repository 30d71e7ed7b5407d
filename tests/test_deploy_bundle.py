"""The archive: what is in it, that it works where it is unpacked, and that it is always the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import served_gguf

from olpack.deploy import Package, parse, render
from olpack.deploy.bundle import beside, bundle
from olpack.deploy.register import TagFile
from olpack.errors import OlpackError
from olpack.workspace import template_source

PACKAGE = Package(system="FROM here on,\nfrom ./there\nyou write Python.", parameters={"num_ctx": 2048, "stop": ["<|im_end|>"]})


@pytest.fixture
def files(tmp_path: Path) -> list[TagFile]:
    (tmp_path / "gguf").mkdir()
    made = [("q4_0", tmp_path / "gguf/coder-Q4_0.gguf", 2), ("q4_K_M", tmp_path / "gguf/coder-Q4_K_M.gguf", 15)]
    return [TagFile(tag, path, served_gguf.write(path, served_gguf.CHAT, number)) for tag, path, number in made]


@pytest.fixture
def modelfiles(tmp_path: Path, files: list[TagFile]) -> list[Path]:
    (tmp_path / "modelfiles").mkdir()
    paths = []
    for file in files:
        paths.append(tmp_path / "modelfiles" / f"{file.tag}.Modelfile")
        paths[-1].write_text(render(PACKAGE, Path("../gguf") / file.path.name, template_source("Modelfile.j2")), encoding="utf-8")
    return paths


@pytest.fixture
def report(tmp_path: Path) -> Path:
    (tmp_path / "report.html").write_text("<h1>Which one?</h1>", encoding="utf-8")
    return tmp_path / "report.html"


def test_what_is_in_it(files: list[TagFile], modelfiles: list[Path], report: Path, tmp_path: Path) -> None:
    out = bundle("coder", files, modelfiles, [report], tmp_path / "out/coder.zip")
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere/coder"
    names = {"coder-Q4_0.gguf", "coder-Q4_K_M.gguf", "q4_0.Modelfile", "q4_K_M.Modelfile", "report.html", "README.txt", "SHA256SUMS"}
    assert {path.name for path in folder.iterdir()} == names
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names - {"SHA256SUMS"}}
    for file in files:
        assert sums[file.path.name] == file.sha256
        told = parse((folder / f"{file.tag}.Modelfile").read_text(encoding="utf-8"))
        assert (folder / told.source).samefile(folder / file.path.name)
        assert told.package == PACKAGE
    readme = (folder / "README.txt").read_text()
    assert len(readme.splitlines()) == 5
    assert "ollama create coder:q4_0 -f q4_0.Modelfile" in readme
    assert [path.name for path in out.parent.iterdir()] == ["coder.zip"]


def test_the_same_files_give_the_same_bytes(files: list[TagFile], modelfiles: list[Path], report: Path, tmp_path: Path) -> None:
    first = bundle("coder", files, modelfiles, [report], tmp_path / "first.zip").read_bytes()
    for path in (*modelfiles, report, *(file.path for file in files)):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    assert bundle("coder", files, modelfiles, [report], tmp_path / "second.zip").read_bytes() == first


def test_a_file_beyond_what_a_plain_zip_holds(files: list[TagFile], modelfiles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100_000)
    out = bundle("coder", files, modelfiles, [], tmp_path / "coder.zip")
    with zipfile.ZipFile(out) as archive:
        assert archive.read("coder/coder-Q4_0.gguf") == files[0].path.read_bytes()
        assert archive.getinfo("coder/coder-Q4_0.gguf").extract_version == zipfile.ZIP64_VERSION


def test_a_file_that_changed_since(files: list[TagFile], modelfiles: list[Path], tmp_path: Path) -> None:
    out = bundle("coder", files, modelfiles, [], tmp_path / "coder.zip")
    before = out.read_bytes()
    files[0].path.write_bytes(files[0].path.read_bytes()[:-1] + b"x")
    with pytest.raises(OlpackError, match=r"coder-Q4_0.gguf is not the file it was"):
        bundle("coder", files, modelfiles, [], out)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_full_disk_leaves_what_was_there(
    files: list[TagFile], modelfiles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "coder.zip").write_bytes(b"what was there")
    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OlpackError, match=r"coder.zip could not be written: No space left"):
        bundle("coder", files, modelfiles, [], tmp_path / "coder.zip")
    assert (tmp_path / "coder.zip").read_bytes() == b"what was there"
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_too_small(files: list[TagFile], modelfiles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olpack.deploy.bundle.free_bytes", lambda _path: 1000)
    with pytest.raises(OlpackError, match=r"276.\d kB are needed for .*coder.zip, and 1.0 kB are free"):
        bundle("coder", files, modelfiles, [], tmp_path / "coder.zip")


def test_mistakes(files: list[TagFile], modelfiles: list[Path], report: Path, tmp_path: Path) -> None:
    out = tmp_path / "coder.zip"
    with pytest.raises(OlpackError, match=r"q4_K_M.Modelfile names ../gguf/coder-Q4_K_M.gguf, which is not among"):
        bundle("coder", files[:1], modelfiles, [], out)
    with pytest.raises(OlpackError, match="have the same name"):
        bundle("coder", files, modelfiles, [report, report], out)
    with pytest.raises(OlpackError, match=r"There is no .*gone.html"):
        bundle("coder", files, modelfiles, [tmp_path / "gone.html"], out)
    with pytest.raises(OlpackError, match=r"There is no .*gone.Modelfile"):
        bundle("coder", files, [tmp_path / "gone.Modelfile"], [], out)
    with pytest.raises(OlpackError, match="would be a zip archive under another name. Call it coder.zip"):
        bundle("coder", files, modelfiles, [], tmp_path / "coder.tar")
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    [
        "FROM ../gguf/a.gguf\nSYSTEM hi\n",
        '# FROM nowhere\n\n  from "../gguf/a.gguf"\nSYSTEM """x\nFROM y\n"""\n',
        "FROM /anywhere/at/all/a.gguf",
    ],
)
def test_from_names_the_file_beside(tmp_path: Path, text: str) -> None:
    (tmp_path / "Modelfile").write_text(text)
    moved = parse(beside(tmp_path / "Modelfile", {"a.gguf"}))
    assert (moved.source, moved.package) == ("./a.gguf", parse(text).package)


def test_a_modelfile_that_hides_its_from(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text('SYSTEM """x\nFROM y\n"""\nFROM a.gguf\n')
    with pytest.raises(OlpackError, match=r"FROM of .* could not be changed"):
        beside(tmp_path / "Modelfile", {"a.gguf"})
