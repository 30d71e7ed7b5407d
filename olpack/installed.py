"""How this olpack is installed, and so the command that adds a package to it."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from types import ModuleType

from olpack.errors import OlpackError


def install_command(*words: str) -> str:
    """The command that installs packages into the Python that runs olpack. In an environment of `uv tool install` there is no pip."""
    pip = ["uv", "pip", "install", "--python", sys.executable] if Path(sys.prefix, "uv-receipt.toml").is_file() else None
    return shlex.join([*(pip or [sys.executable, "-m", "pip", "install"]), *words])


def optional(module: str, subject: str) -> ModuleType:
    """Import a module of a package of the same name that only an extra of olpack installs.

    The error names the package and not the extra: the package index has another project of the name olpack.

    Args:
        subject: what needs it, as the subject of a sentence, in the plural: "Parquet files".

    Raises:
        OlpackError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise OlpackError(f"{subject} need the package {module}, which is not installed.", f"Install it: {install_command(module)}") from None
