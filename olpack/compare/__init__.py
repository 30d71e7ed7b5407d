"""Which quant, and why: speed, memory and quality of the published files, and the report.

    results = measure(files, rows, prompts, MeasureSettings(), server=None, name="coding-assistant", cache=folder)
    write_results(results, folder / "results.json")
    print_table(results)
    write_report(results, folder / "report.html", template=text_of_report_html_j2, metrics=folder / "metrics.jsonl")

Public here:
    MeasureSettings, ComparedFile   what to measure, and how
    ReferenceModels                 what to compare it with: the unquantized fine-tune, the base, quants without their importance matrix
    MergedModels                    of an adapter package, how to make the merged files that could be served in its place
    measure(files, rows, prompts, settings, server, name, cache, references, tasks, examples, merged) -> Results
    Results, read_results(path), write_results(results, path)
    recommend(results) -> Recommendation | None    (measure has already put it into the results)
    print_table(results, console=None), markdown_table(results) -> str
    render_report(results, template, metrics=None, identity=None) -> str, write_report(results, path, template, metrics=None, identity=None)
"""

from __future__ import annotations

from olpack.compare.measure import measure
from olpack.compare.recommend import recommend
from olpack.compare.reference_models import MergedModels, ReferenceModels
from olpack.compare.report import render_report, write_report
from olpack.compare.results import Results, read_results, write_results
from olpack.compare.settings import ComparedFile, MeasureSettings
from olpack.compare.table import markdown_table, print_table

__all__ = [
    "ComparedFile",
    "MeasureSettings",
    "MergedModels",
    "ReferenceModels",
    "Results",
    "markdown_table",
    "measure",
    "print_table",
    "read_results",
    "recommend",
    "render_report",
    "write_report",
    "write_results",
]
