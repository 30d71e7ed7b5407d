"""Reads a Parquet file as `records` will, in a worker: `python -m olpack.data.parquet_worker`. The question is its path."""

from __future__ import annotations

from pathlib import Path

from olpack.data.records import parquet_records
from olpack.errors import OlpackError
from olpack.trials import serve


def attempt(path: str) -> None:
    """Read all rows, and leave out none of the errors that name memory: those that name the file come again in the process that asks."""
    import pyarrow

    try:
        for _ in parquet_records(Path(path)):
            pass
    except MemoryError:
        raise
    except (OlpackError, pyarrow.ArrowException, OSError, UnicodeDecodeError):
        return


if __name__ == "__main__":
    serve(attempt)
