"""The page of figures that a benchmark ends with: printed, and written beside the script."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path


def command_line(script: str, text: str | None) -> argparse.ArgumentParser:
    """A benchmark's arguments to be: `--output` is there, by default the script's name with .md.

    Args:
        script: its `__file__`.
        text: its docstring.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(script).with_suffix(".md"))
    return parser


def measured_here(script: str) -> str:
    """When, where and with what a benchmark ran, and the command that runs it again."""
    from olpack.compare.hardware import describe_machine

    machine = describe_machine(None)
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine.cores} cores of {machine.cpu}; {versions}. `python benchmarks/{Path(script).name}`"


def publish(lines: Iterable[str], output: Path) -> None:
    """Print the page and write it."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    print(text)
    output.write_text(text, encoding="utf-8")


def environment() -> dict[str, str]:
    """Of a process that is to use the olpack of this repository."""
    packages = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": packages}
