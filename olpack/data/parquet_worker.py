"""Reads a Parquet file as `records` will, in a worker: `python -m olpack.data.parquet_worker`. The question is its path."""

from __future__ import annotations

from pathlib import Path

from olpack.data.records import parquet_records
from olpack.trials import serve


def attempt(path: str) -> None:
    """Read all rows."""
    for _ in parquet_records(Path(path)):
        pass


if __name__ == "__main__":
    serve(attempt)
