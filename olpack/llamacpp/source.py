"""Where llama.cpp's converter comes from: a checkout that the user names, or one pinned release, fetched once.

The converter is no package of its own. It travels in the source archive of llama-cpp-python, whose wheels leave it out, so the
archive of the very release that olpack runs gives converter, `gguf` package and shared library of one llama.cpp commit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from olpack import progress
from olpack.errors import OlpackError
from olpack.package_index import Distribution, download
from olpack.workspace import is_private, make_user_cache, remove, remove_leftovers, scratch, unfinished, user_cache

VERSION = "0.3.36"  # of llama-cpp-python
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TREE_SHA256 = "098b4f5efa4414222483d56243f2cbea26b47d9d82184e0ed65081213bc247e2"  # of `_tree_digest` of what is taken out of the archive
ARCHIVE_SIZE = 76_589_250  # bytes, for the progress bar
VARIABLE = "OLPACK_LLAMA_CPP"

# The files that are needed of llama.cpp's tree. The licence requires LICENSE among them.
_FILES = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE")
_FOLDERS = ("conversion", "gguf-py")
_TREE = PurePosixPath(f"llama_cpp_python-{VERSION}/vendor/llama.cpp")

# pip cannot download a source archive without asking its build backend for metadata, and the real backend would first be
# installed together with cmake. Nothing is built here, so this one answers in its place.
_BACKEND = f"""
import pathlib
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "llama_cpp_python-{VERSION}.dist-info"
    folder = pathlib.Path(metadata_directory, name)
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {VERSION}\\n")
    return name
"""


def converter_source() -> Path:
    """The folder with `convert_hf_to_gguf.py`, `conversion/` and `gguf-py/`.

    `OLPACK_LLAMA_CPP` wins: a llama.cpp checkout, an unpacked llama-cpp-python source archive, or that archive itself. Else the
    user's cache, which is filled once through pip (and so through the index, proxy and certificates that pip is set up with).

    Raises:
        OlpackError: `OLPACK_LLAMA_CPP` names something else, or the archive cannot be fetched.
    """
    named = os.environ.get(VARIABLE)
    if named and not named.endswith(".tar.gz"):
        return _checked(Path(named).expanduser())
    cached = _cached()
    if cached_source() is None:
        if os.path.lexists(cached):
            progress.warn(f"{cached} is not llama.cpp's converter as it was released: it is made again")
            remove(cached)
        if named:
            _unpack(_verified(Path(named).expanduser()), cached)
        else:
            _fetch(cached)
    return cached


def cached_source() -> Path | None:
    """The converter in the user's cache, None where it is not there yet or was changed.

    Its modules are executed, so every file must be as in the release, and nobody else may be able to write to the folder.
    """
    cached = _cached()
    return cached if cached.is_dir() and is_private(cached) and _tree_digest(cached) == TREE_SHA256 else None


def _cached() -> Path:
    return user_cache() / f"llama.cpp-{VERSION}"


def _tree_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files. What Python compiled of them is removed: nothing could tell whether it was changed."""
    for compiled in list(folder.rglob("__pycache__")):
        remove(compiled)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        content = "link" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES[:2]) and all((folder / name).is_dir() for name in _FOLDERS)


def _checked(folder: Path) -> Path:
    for candidate in (folder, folder / "vendor" / "llama.cpp"):
        if _is_complete(candidate):
            return candidate.resolve()
    raise OlpackError(
        f"{VARIABLE} is '{folder}', which contains no llama.cpp converter (convert_hf_to_gguf.py, conversion/, gguf-py/).",
        f"Point it to a llama.cpp checkout or to {ARCHIVE}, or unset it to have the right release fetched.",
    )


def _verified(archive: Path) -> Path:
    if not archive.is_file():
        raise OlpackError(f"{VARIABLE} is '{archive}', and there is no such file.", "Correct the path, or unset it.")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != ARCHIVE_SHA256:
        raise OlpackError(
            f"'{archive}' is not the source archive of llama-cpp-python {VERSION} (its SHA-256 is {digest[:12]}…).",
            f"Download {ARCHIVE} again, or unset {VARIABLE}.",
        )
    return archive


def _fetch(folder: Path) -> None:
    """Download the pinned archive with pip, into a folder that goes away, and keep the converter."""
    make_user_cache()
    with scratch() as home:
        (home / "backend" / "scikit_build_core").mkdir(parents=True)
        (home / "backend" / "scikit_build_core" / "__init__.py").touch()
        (home / "backend" / "scikit_build_core" / "build.py").write_text(_BACKEND, encoding="utf-8")
        archive = download(
            home,
            Distribution("llama-cpp-python", VERSION, ARCHIVE, ARCHIVE_SHA256, ARCHIVE_SIZE),
            "llama.cpp's converter",
            f"Connect to a package index once, or get {ARCHIVE} elsewhere and set {VARIABLE} to its path.",
            options=("--no-binary", ":all:", "--no-build-isolation"),
            modules=home / "backend",
        )
        _unpack(_verified(archive), folder)


def _unpack(archive: Path, folder: Path) -> None:
    """Take the converter out of the archive. `folder` appears when everything is in it; the first of concurrent runs wins."""
    make_user_cache()
    remove_leftovers(folder.parent)
    place = unfinished(folder)
    try:
        remove(place)
        place.mkdir(mode=0o700)
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                inside = _place(member)
                if inside is None:
                    continue
                target = place.joinpath(*inside.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                read = tar.extractfile(member)
                assert read is not None  # `_place` lets plain files pass only
                with read, target.open("wb") as write:
                    shutil.copyfileobj(read, write)
        if not _is_complete(place):
            raise OlpackError(f"'{archive}' does not contain llama.cpp's converter.", f"Unset {VARIABLE} to have the right release fetched.")
        try:
            place.rename(folder)
        except OSError:
            if not _is_complete(folder):
                raise
    except OSError as error:
        raise OlpackError(
            f"llama.cpp's converter could not be stored in '{folder}': {error.strerror}.",
            "Free space or give write access there, or set XDG_CACHE_HOME to another folder.",
        ) from error
    finally:
        remove(place)


def _place(member: tarfile.TarInfo) -> PurePosixPath | None:
    """Where a member of the archive goes, relative to the folder; None for what is not needed or is no plain file."""
    path = PurePosixPath(member.name)
    if not member.isfile() or ".." in path.parts or not path.is_relative_to(_TREE):
        return None
    inside = path.relative_to(_TREE)
    return inside if inside.parts[0] in _FOLDERS or str(inside) in _FILES else None
