"""JSON that others wrote, read only from a file, and only where its size, its depth and its integers are those of settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError

MOST_BYTES = 256 << 20  # the largest tokenizer.json have 35 MB
MOST_LEVELS = 50
_DIGITS = 40  # tokenizers write 10^30 for "no limit"


def check_regular(path: Path) -> None:
    """Refuse what is neither a file nor a folder: reading a pipe or a device can wait or go on for ever.

    Raises:
        OlpackError: it is there, and is neither.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OlpackError(f"{path} is a pipe, a socket or a device and no file.", "Write its content into a file, and name that.")


def read(path: Path, remedy: str, *, most: int = MOST_BYTES, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        remedy: what the user can do where it cannot be read.
        most: bytes that the file may have.
        object_hook: as of `json.loads`.

    Raises:
        OlpackError: it is not there, no file, too large, no UTF-8, no JSON, or nested too deep.
    """
    check_regular(path)
    try:
        if path.stat().st_size > most:
            raise OlpackError(f"{path} has {path.stat().st_size:,} bytes, and at most {most:,} are read.", remedy)
        value = loads(path.read_bytes(), object_hook=object_hook)
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", remedy) from None
    except (OSError, ValueError) as error:
        raise OlpackError(f"{path} cannot be read as JSON: {str(error).rstrip('.')}.", remedy) from None
    return value


def read_object(path: Path, remedy: str, *, most: int = MOST_BYTES, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    """As `read`, of a file that must contain an object."""
    value = read(path, remedy, most=most, object_hook=object_hook)
    if not isinstance(value, dict):
        raise OlpackError(f"{path} contains no JSON object.", remedy)
    return value


def loads(text: str | bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, has an integer of more than 40 digits, or is nested too deep.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_hook=object_hook, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        if not (level := [part for one in level for part in (one.values() if isinstance(one, dict) else one) if isinstance(part, dict | list)]):
            return value
    raise ValueError(f"it is nested too deep, in more than {MOST_LEVELS} levels")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer has {len(digits):,} digits")
    return int(digits)
