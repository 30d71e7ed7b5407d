"""A comparison as files: for programs, for a spreadsheet, for a README, for a browser."""

from __future__ import annotations

from pathlib import Path

from olpack.compare.csv import to_csv
from olpack.compare.report import write_report
from olpack.compare.results import Results, write_results
from olpack.compare.table import markdown_table
from olpack.workspace import write_atomically


def write_outputs(results: Results, folder: Path, template: str, metrics: Path | None = None, identity: str | None = None) -> list[Path]:
    """Write `results.json`, `results.csv`, `results.md` and `report.html` into a folder; each is replaced whole or not at all.

    Args:
        template, metrics, identity: as for `write_report`.

    Returns:
        the files, `results.json` first.
    """
    paths = [folder / name for name in ("results.json", "results.csv", "results.md", "report.html")]
    write_results(results, paths[0])
    write_atomically(paths[1], to_csv(results))
    write_atomically(paths[2], f"# {results.name}\n\n{markdown_table(results)}\n")
    write_report(results, paths[3], template, metrics=metrics, identity=identity)
    return paths
