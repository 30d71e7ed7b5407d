"""The wheel: what travels in it is found by those who have nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
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


def test_the_source_archive_has_all_that_make_needs(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("olpack-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert names >= {
        "Makefile", "constraints.txt", ".ci/llama_cpp.py", ".ci/llama_cpp.cmake", ".ci/requirements/olpack.txt", ".ci/requirements/test.txt",
        ".ci/requirements/llama-cpp.txt", ".ci/audit.py", "README.md", "AGENTS.md", "CHANGELOG.md", "LICENSE", "docs/install.md", "tests/conftest.py",
    }  # fmt: skip
    assert not [name for name in names if name.startswith((".venv", "build/", ".hypothesis")) or "__pycache__" in name]


def test_the_version_is_that_of_the_changelog_and_no_step_depends_on_it(tmp_path, monkeypatch):
    import olpack
    from olpack import recipe, workspace
    from olpack.stages import export
    from olpack.stages.build import Build
    from olpack.stages.order import all_steps

    assert re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == olpack.__version__
    keys = []
    for version in (olpack.__version__, "99.0"):
        for module in (olpack, export):
            monkeypatch.setattr(module, "__version__", version)
        build = Build(recipe.load(workspace.recipe_path("coding-assistant")), tmp_path)
        keys.append({step.unit: step.key for step in all_steps(build)})
    assert keys[0] == keys[1] and len(keys[0]) > 5


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


def test_the_shipped_package_is_planned_without_the_packages_of_extras(tmp_path):
    code = "import sys; sys.modules |= dict.fromkeys(['lm_eval', 'datasets', 'pyarrow', 'triton']); from olpack import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "plan", "coding-assistant"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_of_llama_cpp_is_the_same_everywhere():
    from olpack.llamacpp.library import INSTALL
    from olpack.llamacpp.source import VERSION

    assert f"LLAMA_CPP := {VERSION}\n" in (ROOT / "Makefile").read_text()
    for name in ("pyproject.toml", "constraints.txt"):
        assert f"llama-cpp-python=={VERSION}" in (ROOT / name).read_text()
    assert INSTALL.endswith(f"llama-cpp-python=={VERSION}")
