"""Which quant, and why: speed, memory and quality of the published files, and the report.

    results = measure(files, rows, prompts, MeasureSettings(), server=None, name="coding-assistant", cache=folder)
    write_results(results, folder / "results.json")
    print_table(results)
    write_report(results, folder / "report.html", template=text_of_report_html_j2, metrics=folder / "metrics.jsonl")

Public are the modules below; this one imports none of them, because a process that measures needs few.

    settings            MeasureSettings, ComparedFile: what to measure, and how
    reference_models    ReferenceModels: what to compare it with: the unquantized fine-tune, the base, quants without their importance matrix;
                        MergedModels: of an adapter package, how to make the merged files that could be served in its place
    measure             measure(files, rows, prompts, settings, server, name, cache, references, tasks, examples, merged) -> Results
    results             Results, read_results(path), write_results(results, path)
    recommend           recommend(results) -> Recommendation | None    (measure has already put it into the results)
    table               print_table(results, console=None), markdown_table(results) -> str
    report              render_report(results, template, metrics=None, identity=None) -> str, write_report(results, path, …)
"""
