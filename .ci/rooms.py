"""Counts the imports between the rooms of olpack/, and fails on a cycle or an import that points upward.

    python .ci/rooms.py            # a table of the rooms: files, lines, and which rooms each imports
    python .ci/rooms.py --files    # besides, the lines of each file

A room is a folder, or a module at the top level. `ORDER` lists them from the bottom to the top; each imports only from those before it.
Imports inside functions and those for type checkers only count as well.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "olpack"
ORDER = (
    "printable", "errors", "installed", "__init__", "progress", "bounded_yaml", "bounded_json", "bounded_regex",
    "templating", "quants", "machine", "workers", "trials", "workspace", "package_index",
    "llamacpp", "model", "data", "deploy", "recipe", "train.ops", "train", "export", "importers", "compare", "memory", "stages", "commands",
    "cli", "reference", "__main__",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module by its dotted name without the leading package: "train.ops.loss", "cli"."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of olpack that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "olpack":
            package = node.module.removeprefix("olpack").removeprefix(".")
            for alias in node.names:
                whole = f"{package}.{alias.name}" if package else alias.name
                found.add(whole if whole in known else package or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("olpack").removeprefix(".") or "__init__" for alias in node.names if alias.name.startswith("olpack")}
    return found


def room(module: str) -> str:
    """The room that a module belongs to: the longest of ORDER that its name begins with."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in ORDER), module)


def main() -> int:
    known = modules()
    edges = {module: imports(path, known) - {module} for module, path in known.items()}
    rooms: dict[str, set[str]] = {}
    for module, others in edges.items():
        rooms.setdefault(room(module), set()).update({room(other) for other in others} - {room(module)})
    problems = [f"{name} is not in ORDER" for name in rooms if name not in ORDER]
    rank = {name: number for number, name in enumerate(ORDER)}
    for module, others in edges.items():
        problems += [f"{module} imports {other}, which lies above it" for other in others if rank.get(room(other), -1) > rank.get(room(module), -1)]
    # A folder's __init__ gathers names of its modules, which may import each other past it.
    plain = {module: {other for other in others if known[other].name != "__init__.py"} for module, others in edges.items()}
    try:
        TopologicalSorter(plain).prepare()
    except CycleError as error:
        problems.append(f"a cycle: {' -> '.join(error.args[1])}")
    for name in sorted(rooms, key=lambda one: rank.get(one, -1)):
        files = [path for module, path in known.items() if room(module) == name]
        lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
        print(f"{name:14} {len(files):3} files {sum(lines.values()):6,} lines  -> {' '.join(sorted(rooms[name], key=rank.get)) or '-'}")
        if "--files" in sys.argv:
            for path, count in lines.items():
                print(f"    {count:5,}  {path.relative_to(ROOT)}")
    print(f"{len(rooms)} rooms, {sum(map(len, rooms.values()))} edges between them, {len(known)} files, {len(problems)} problems")
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
