"""What was measured before, kept by everything that it depends on."""

from __future__ import annotations

import json
from pathlib import Path

from olpack.workspace import value_digest, write_atomically


class Cache:
    """A folder with one JSON file per quant and kind of figure. A figure of an older key is replaced by that of the new one.

    Args:
        folder: it is made when something is kept; None: nothing is kept or found.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def find(self, tag: str, unit: str, key: dict) -> dict | None:
        """What was kept under exactly this key."""
        if self._folder is None:
            return None
        try:
            kept = json.loads(self._path(tag, unit).read_bytes())
        except (OSError, ValueError):
            return None
        return kept.get("data") if isinstance(kept, dict) and kept.get("key") == value_digest(key) else None

    def keep(self, tag: str, unit: str, key: dict, data: dict) -> None:
        """Keep a measurement at once."""
        if self._folder is not None:
            write_atomically(self._path(tag, unit), json.dumps({"key": value_digest(key), "data": data}, ensure_ascii=False))

    def _path(self, tag: str, unit: str) -> Path:
        return self._folder / f"{tag}.{unit}.json"
