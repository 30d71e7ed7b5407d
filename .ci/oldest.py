"""Prints the lowest version that pyproject.toml admits of each package, for `make test-oldest`: `numpy>=2.0` becomes `numpy==2.0`.

    python .ci/oldest.py > requirements.txt

The extras that the tests need are among them. pip resolves what these packages need in turn; where two lower bounds exclude each other, or one was
never released, it says so, and pyproject.toml promises what nobody can install. torch comes from constraints.txt: its builds take gigabytes.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from lock import pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINNED = ("torch",)
COMPILED = ("llama-cpp-python",)  # .ci/llama_cpp.py installs it


def requirements(project: dict, listed: list[str]) -> Iterator[Requirement]:
    """The requirements in a list of pyproject.toml; one of olpack's own extras stands for its list."""
    for text in listed:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != project["name"]:
            yield requirement
        for extra in requirement.extras if requirement.name == project["name"] else ():
            yield from requirements(project, project["optional-dependencies"][extra])


def lowest(requirement: Requirement) -> str:
    """The requirement, with its lower bound as the only version."""
    bounds = list(requirement.specifier)
    if len(bounds) != 1 or bounds[0].operator not in (">=", "=="):
        sys.exit(f"pyproject.toml: '{requirement}' has no lower bound alone; .ci/oldest.py reads '>=' and '=='")
    requirement.specifier = type(requirement.specifier)(f"=={bounds[0].version}")
    return str(requirement)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins()
    for requirement in requirements(project, [*project["dependencies"], *project["optional-dependencies"]["test"]]):
        if requirement.name not in COMPILED:
            print(pinned[requirement.name] if requirement.name in PINNED else lowest(requirement))


if __name__ == "__main__":
    main()
