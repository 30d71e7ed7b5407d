"""`olpack list` and `olpack show`: packages, what of each is built, and what the server has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from olpack import printable
from olpack.errors import OlpackError
from olpack.stages import records
from olpack.workspace import BuildPaths, packages, recipe_path, shipped


def package_rows(root: Path) -> list[dict[str, Any]]:
    """One entry for each package: its recipe, the quants in its build folder, the recommended tag, the tags on the server."""
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    tags = [tag.model for tag in client.tags()] if client.version() else None
    return [_row(name, BuildPaths(name, root / name), tags) for name in packages()]


def _row(name: str, paths: BuildPaths, tags: list[str] | None) -> dict[str, Any]:
    path = recipe_path(name)
    quants = {}
    for file in sorted((paths.root / "gguf").glob(f"{name}-*.gguf"), key=lambda file: file.stat().st_size):
        quants[file.stem.removeprefix(f"{name}-")] = file.stat().st_size
    base, named = _named_by_modelfiles(paths)
    quants |= named
    recommended = records.result(paths, "compare").get("recommended")
    return {
        "name": name,
        "recipe": str(path),
        "shipped": path.is_relative_to(shipped("modelfiles")),
        "trained": (paths.adapter / "adapter_config.json").is_file(),
        "quants": quants,
        "base": base,
        "recommended": recommended,
        "registered": None if tags is None else [tag for tag in tags if tag.lower().startswith(f"{name.lower()}:")],
    }


def _named_by_modelfiles(paths: BuildPaths) -> tuple[str | None, dict[str, int]]:
    """Of an adapter package, its base: a model of the server, a GGUF, or the folder of quants that it shares; and those quants, in bytes."""
    from olpack.deploy.modelfile import parse

    base, sizes = None, {}
    for path in paths.root.glob("modelfiles/*.Modelfile"):
        try:
            read = parse(path.read_text(encoding="utf-8"))
            file = (path.parent / read.source).resolve()
            if not read.adapter:
                continue
            if not file.is_file():  # a model of the server, by its name
                base = read.source
            elif file.parent.name == "gguf" and file.name.startswith(f"{file.parent.parent.name}-"):
                base = file.parent.parent.name
                sizes[file.stem.removeprefix(f"{base}-")] = file.stat().st_size
            else:
                base = file.name
                sizes[path.stem] = file.stat().st_size
        except (OSError, ValueError, OlpackError):
            continue
    return base, dict(sorted(sizes.items(), key=lambda item: item[1]))


def print_packages(rows: list[dict[str, Any]]) -> None:
    """The entries of `package_rows` as a table."""
    from rich import box
    from rich.table import Table

    from olpack.progress import quantity

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    bases = Counter(row["base"] for row in rows if row["base"])
    titles = ("package", "recipe", "trained", *(("base",) if bases else ()), "built", "recommended", "on the server")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        built = "\n".join(f"{quant} {quantity(size, 'B')}" for quant, size in row["quants"].items()) or "–"
        registered = "no server" if row["registered"] is None else "\n".join(row["registered"]) or "–"
        recipe = "ships with olpack" if row["shipped"] else row["recipe"]
        cells = [row["name"], recipe, "yes" if row["trained"] else "no", built, row["recommended"] or "–", registered]
        if bases:
            shared = f"\nshared by {bases[row['base']]} packages" if bases[row["base"]] > 1 else ""
            cells.insert(3, f"{row['base']}{shared}" if row["base"] else "–")
        table.add_row(*cells)
    printable.console().print(table, highlight=False)


def print_facts(facts: dict[str, Any]) -> None:
    """The facts of one build (`publish.facts`)."""
    from rich.table import Table

    from olpack.progress import quantity

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("package", f"{facts['name']}  ({facts['recipe']})")
    table.add_row("base", facts["base"])
    training = facts["training"]
    if "copied_from" in training:
        table.add_row("adapter", f"copied from {training['copied_from']}")
    elif training:
        losses = f"{training['eval_loss_before']:.3f} -> {training['eval_loss_after']:.3f}"
        table.add_row("training", f"eval loss {losses} in {training['steps']} steps on {training['device']}")
    for quant, file in facts["files"].items():
        if file:
            bits = f", {file['bits_per_weight']:.2f} bits per weight" if "bits_per_weight" in file else ""
            table.add_row(quant, f"{quantity(file['size'], 'B')}{bits}, sha256 {file['sha256'][:12]}…")
        else:
            table.add_row(quant, "not made yet")
    table.add_row("recommended", facts["recommended"] or "not compared yet")
    for model, digest in facts["registered"].items():
        table.add_row("registered", f"{model}  {digest[:12]}…")
    if facts["capabilities"]:
        table.add_row("capabilities", ", ".join(facts["capabilities"]))
    if facts["prompt"]:
        table.add_row("prompt", facts["prompt"])
    for unit, reason in facts["stale"].items():
        table.add_row("stale", f"{unit}: {reason}")
    printable.console().print(table, highlight=False)
