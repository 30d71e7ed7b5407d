"""Installs llama-cpp-python into this Python from its source archive, built as olpack needs it.

    python .ci/llama_cpp.py ARCHIVE

Compiling takes minutes, so the wheel stays in the user's cache, in a folder that only this user can write to, with its SHA-256. The next
environment takes it from there if archive, settings, platform, Python and compiler are the same and the wheel is unchanged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from olpack.errors import OlpackError  # noqa: E402
from olpack.llamacpp.source import ARCHIVE_SHA256, VERSION  # noqa: E402
from olpack.workspace import file_digest, folder_atomically, is_private, make_user_cache, remove, user_cache, value_digest  # noqa: E402

LEFT_OUT = ROOT / ".ci/llama_cpp.cmake"
# GGML_NATIVE: some compilers miscompile the native build for CPUs with AMX, and it crashes on quantized models. The projector library
# (LLAVA_BUILD) reads images, which olpack does not. `LEFT_OUT` leaves out llama.cpp's library for command lines.
SETTINGS = {"GGML_NATIVE": "OFF", "LLAVA_BUILD": "OFF", "CMAKE_PROJECT_llama.cpp_INCLUDE": LEFT_OUT.as_posix()}
_DIGEST = "sha256"  # the file beside the wheel
_FROM_OUTSIDE = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")


def main(archive: Path) -> None:
    if (digest := file_digest(archive)) != ARCHIVE_SHA256:
        raise OlpackError(f"{archive} is not the source archive of llama-cpp-python {VERSION} (its SHA-256 is {digest[:12]}…).", "Remove it.")
    os.umask(0o077)
    folder = user_cache() / f"llama-cpp-python-{VERSION}-{key()[:16]}"
    wheel = kept(folder)
    if wheel is None:
        print(f"compiling llama.cpp {VERSION} for {folder}, once; this takes some minutes", flush=True)
        remove(folder)
        make_user_cache()
        with folder_atomically(folder) as place:
            built = build(archive, place)
            (place / _DIGEST).write_text(file_digest(built) + "\n", encoding="ascii")
        wheel = folder / built.name
    else:
        print(f"llama.cpp {VERSION} was compiled before: {wheel}", flush=True)
    _pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))


def key() -> str:
    """What the wheel depends on, as a digest: the archive, the settings, the platform, this Python, the compiler and its flags."""
    compilers = {}
    for variable, default in (("CC", "cc"), ("CXX", "c++")):
        program = shutil.which(os.environ.get(variable, default))
        asked = subprocess.run([program, "--version"], capture_output=True, text=True) if program else None
        compilers[variable] = asked.stdout.partition("\n")[0] if asked else None
    left_out = hashlib.sha256(LEFT_OUT.read_bytes()).hexdigest()
    settings = {name: value for name, value in SETTINGS.items() if value != LEFT_OUT.as_posix()}
    variables = {name: os.environ[name] for name in _FROM_OUTSIDE if name in os.environ}
    return value_digest([ARCHIVE_SHA256, settings, left_out, sysconfig.get_platform(), sys.implementation.cache_tag, compilers, variables])


def kept(folder: Path) -> Path | None:
    """The wheel in a folder of the cache; None where there is none, where others could have written it, or where it was changed."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or not (folder / _DIGEST).is_file() or not all(map(is_private, (folder, wheels[0], folder / _DIGEST))):
        return None
    same = (folder / _DIGEST).read_text(encoding="ascii", errors="replace").strip() == file_digest(wheels[0])
    return wheels[0] if same and zipfile.is_zipfile(wheels[0]) else None


def build(archive: Path, folder: Path) -> Path:
    """Compile the archive to a wheel in `folder`. pip's own cache is left out: it ignores the settings."""
    options = [word for name, value in SETTINGS.items() for word in ("-C", f"cmake.define.{name}={value}")]
    _pip("wheel", "--no-deps", "--no-cache-dir", "--no-build-isolation", *options, "-w", str(folder), str(archive))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", words[0], "-q", *words[1:]])
    if done.returncode:
        raise OlpackError(f"pip {words[0]} ended with exit code {done.returncode}.", "A C++ compiler is needed: `apt install g++`.")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except OlpackError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
