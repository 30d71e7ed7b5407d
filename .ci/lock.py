"""Writes .ci/requirements/ from constraints.txt: every pin but torch with the SHA-256 of all its files, for pip's `--require-hashes`.

    python .ci/lock.py UV        # a program `uv`, which asks the package index for the hashes

`olpack.txt` is what olpack and the build of llama.cpp need, `test.txt` what tests, lint and the site need besides. `llama-cpp.txt` is the source
archive of llama-cpp-python, which .ci/llama_cpp.py compiles. torch is in none of them: the machine decides which of its builds is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".ci/requirements"
_OLDEST = "3.11.5"  # which pymdown-extensions needs
APART = ("torch", "llama-cpp-python")
# What builds llama.cpp and an editable olpack without pip's build isolation, which would install what it finds.
BUILD = ("cmake", "editables", "hatchling", "ninja", "scikit-build-core")


def pins() -> dict[str, str]:
    """The lines of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(re.split("[=;]", line)[0]): line for line in lines if line and not line.startswith("#")}


def needed(names: list[str]) -> set[str]:
    """The packages and all that they need in turn, by what is installed beside this script's Python."""
    from importlib.metadata import PackageNotFoundError, requires

    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        try:
            further = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # nothing of another platform is followed
        for extra in extras or {""}:
            environment = {**default_environment(), "extra": extra}
            waiting += [requirement for requirement in further if requirement.marker is None or requirement.marker.evaluate(environment)]
    return found


def lock(uv: str, lines: list[str], out: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        command = [
            uv,
            "pip",
            "compile",
            "--no-deps",
            "--universal",
            "--python-version",
            _OLDEST,
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
            "-q",
            file.name,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    out.write_text(f"# `make lock` writes this file from constraints.txt.\n{done.stdout}", encoding="utf-8")


def main(uv: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins()
    own = needed([*project["dependencies"], *BUILD]) & pinned.keys() - set(APART)
    FOLDER.mkdir(exist_ok=True)
    lock(uv, [pinned[name] for name in sorted(own)], FOLDER / "olpack.txt")
    lock(uv, [pinned[name] for name in sorted(pinned.keys() - own - set(APART))], FOLDER / "test.txt")
    lock(uv, [pinned["llama-cpp-python"]], FOLDER / "llama-cpp.txt")


if __name__ == "__main__":
    main(sys.argv[1])
