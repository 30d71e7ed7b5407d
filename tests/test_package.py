"""The wheel: what travels in it is found by those who have nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("olpack-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_all_that_a_build_needs(unpacked):
    for name in (
        "templates/Modelfile.j2",
        "templates/report.html.j2",
        "modelfiles/coding-assistant/recipe.yaml",
        "modelfiles/coding-assistant/train.jsonl",
        "examples/support/faq.csv",
        "examples/tools/README.md",
        "assets/tiny-coder/model.safetensors",
        "assets/tiny-coder/tokenizer.json",
        "assets/tiny-coder/README.md",
    ):
        assert (unpacked / "olpack" / name).is_file(), name
    assert (next(unpacked.glob("*.dist-info")) / "licenses/LICENSE").is_file()
    assert not (unpacked / "tests").exists()


def test_an_installed_olpack_finds_what_ships_with_it(unpacked, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "from olpack import recipe, workspace; from olpack.model.base import resolve\n"
        "path = workspace.recipe_path('coding-assistant'); found = recipe.load(path)\n"
        "print(path); print(resolve(found.base, relative_to=found.folder).path); print(len(workspace.template_source('Modelfile.j2')))"
    )
    child = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    recipe, base, length = child.stdout.splitlines()
    assert Path(recipe).is_relative_to(unpacked) and Path(base).is_relative_to(unpacked) and int(length) > 0


def test_the_version_of_llama_cpp_is_the_same_everywhere():
    from olpack.llamacpp.library import INSTALL
    from olpack.llamacpp.source import VERSION

    assert f"LLAMA_CPP := {VERSION}\n" in (ROOT / "Makefile").read_text()
    for name in ("pyproject.toml", "constraints.txt"):
        assert f"llama-cpp-python=={VERSION}" in (ROOT / name).read_text()
    assert INSTALL.endswith(f"llama-cpp-python=={VERSION}")
