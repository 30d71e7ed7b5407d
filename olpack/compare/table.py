"""The comparison as tables: for a terminal or a log, as Markdown, as CSV, and what changed since an earlier one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olpack import printable
from olpack.compare.adapter_cost import adapter_notes
from olpack.compare.changes import Change, importance_gains
from olpack.compare.results import AdapterResult, BaseResult, ByGgml, Divergence, GainKept, Perplexity, QuantResult, Results, Spread
from olpack.progress import quantity

MISSING = "–"
_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\n]")  # what a cell begins with that a spreadsheet calculates


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the tables, gains and types of the quants, the flags and the recommendation to stdout, or to `console`.

    The tables fit 80 columns and contain the medians of the repeats.
    """
    console = console or printable.console()
    chosen = results.recommendation.tag if results.recommendation else None
    # Quality has a table of its own where there is more of it than the perplexity.
    compared = results.reference is not None or any(
        quant.divergence or quant.scores or (quant.adapter and quant.adapter.merged) for quant in results.quants
    )
    table = _table(["size", "bits/\nweight", "prompt\ntok/s", "gener.\ntok/s", "load", "peak\nmemory", *([] if compared else ["perplexity\n± s.e."])])
    for quant in results.quants:
        table.add_row(*_cells(quant, quant.tag == chosen), *([] if compared else [_perplexity(quant.perplexity)]), style=_style(quant, chosen))
    console.print(table)
    if compared:
        console.print(_quality(results, chosen))
    if _kept_by_any(results) or any(quant.other_text for quant in results.quants):
        console.print(_kept(results, chosen))
    if any(quant.suites for quant in results.quants):
        console.print(_suites(results, chosen))
    for note in _notes(results):
        console.print(Text(note, style="dim"), soft_wrap=True)
    for flag in results.flags:
        console.print(Text(flag.text, style="yellow"), soft_wrap=True)
    for quant in results.quants:
        for flag in quant.flags:
            # Hard line breaks would tear a path or a command.
            console.print(Text(f"{quant.quant}: {flag.text}", style="red" if flag.serious else "yellow"), soft_wrap=True)
    if results.recommendation:
        console.print(Text(f"Recommended: {results.recommendation.reason}"), soft_wrap=not console.is_terminal)


def markdown_table(results: Results) -> str:
    """The same table as Markdown, with what it was measured on and the recommendation below it."""
    titles = ["quant", "size", "bits per weight", "prompt tokens/s", "generated tokens/s", "load", "peak memory"]
    titles += ["perplexity ± s.e.", "KL divergence, millinats"]
    shown = _kept_by_any(results)
    titles += [f"gain kept in {what}" for _, what in shown]
    elsewhere = any(quant.other_text for quant in results.quants)
    titles += ["KL divergence on other text, millinats"] if elsewhere else []
    chosen = results.recommendation.tag if results.recommendation else None
    rows = [
        [
            *_cells(quant, quant.tag == chosen)[1:],
            _perplexity(quant.perplexity),
            _divergence(quant.divergence)[0],
            *(_gain_kept(kept(quant)) for kept, _ in shown),
            *(_divergence(quant.other_text)[:1] if elsewhere else []),
        ]
        for quant in results.quants
    ]
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---", *["---:"] * (len(titles) - 1)], *([escaped(cell) for cell in row] for row in rows))]
    engine = next((quant.speed.engine for quant in results.quants if quant.speed), None)
    measured = (
        f"Measured on {escaped(results.machine.cpu)}"
        + (f" with {escaped(engine)}" if engine else "")
        + (f"; perplexity of the answers in {results.rows.count} held-out rows." if results.rows else ".")
    )
    reason = [escaped(results.recommendation.reason)] if results.recommendation else []
    return "\n".join([*lines, "", measured, *reason, *(f"\n{escaped(note)}." for note in _notes(results))])


def escaped(text: str) -> str:
    """A text of others in Markdown: no HTML, no link, no image, no cell or line of its own."""
    text = " ".join(printable.visible(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[|\[\]`\\]", lambda mark: "\\" + mark[0], text)


def _notes(results: Results) -> list[str]:
    """What the fine-tune gained, how importance matrices and roundings changed the divergence, what adapters cost, and which types budgets chose."""
    notes = [note for kept, what, unit in _KEPT if (note := _gain(results, kept, what, unit))]
    if results.other_text and (far := next((quant.other_text for quant in results.quants if quant.other_text), None)):
        notes.append(f"other text: {results.other_text}, {far.tokens:,} tokens of {far.rows} texts that are no rows of the package")
    for gain in importance_gains(results):
        error = "" if gain.standard_error is None else f" ± {100 * gain.standard_error:.1f}"
        with_it, without = (plain(1000 * divergence.mean) for divergence in (gain.with_importance, gain.without_importance))
        notes.append(f"{gain.quant}: KL mean {with_it} mnat with the importance matrix, {without} without: {100 * gain.change:+.1f}{error}%")
    notes += [_against_ggml(quant.quant, quant.by_ggml) for quant in results.quants if quant.by_ggml]
    notes += [note for quant in results.quants for note in adapter_notes(quant)]
    return notes + [f"{quant.quant}: {types_in_short(quant.types)}" for quant in results.quants if quant.types]


def _against_ggml(quant: str, other: ByGgml) -> str:
    """ "Q4_K_M, search against ggml's rounding: KL mean -8.20 ± 0.30 mnat, same top token +2.1 ± 0.8%, perplexity -0.72 ± 0.20%"."""
    changes = [
        ("KL mean {} mnat", other.divergence_change, 1000, 2),
        ("same top token {}%", other.same_top_change, 100, 1),
        ("perplexity {}%", other.perplexity_change, 100, 2),
        ("tasks {}%", other.score_change, 100, 0),
    ]
    parts = []
    for form, change, unit, digits in changes:
        if change:
            error = "" if change.standard_error is None else f" ± {unit * change.standard_error:.{digits}f}"
            parts.append(form.format(f"{unit * change.value:+.{digits}f}{error}"))
    return f"{quant}, {other.rounding} against ggml's rounding: {', '.join(parts) or 'not measured'}"


_KEPT: tuple[tuple[Callable[[QuantResult], GainKept | None], str, str], ...] = (
    (lambda quant: quant.gain_kept, "held-out loss", " nats a token"),
    (lambda quant: quant.task_gain_kept, "task score", ""),
)
"""The gains of which a quant keeps a share, each with its name and unit."""


def _gain(results: Results, kept: Callable[[QuantResult], GainKept | None], what: str, unit: str) -> str:
    """What the fine-tune gained over the base, and why no quant's share of it is reported; "" where it was not measured."""
    gain = next((found for quant in results.quants if (found := kept(quant))), None)
    if gain is None:
        return ""
    reason = f"; the shares that the quants keep are not reported, because {gain.reason}" if gain.reason else ""
    return f"gain of the fine-tune in {what}: {with_error(gain.gain, gain.gain_standard_error)}{unit}{reason}"


def _kept_by_any(results: Results) -> list[tuple[Callable[[QuantResult], GainKept | None], str]]:
    """The gains of which at least one quant keeps a share that is known."""
    return [(kept, what) for kept, what, _ in _KEPT if any((found := kept(quant)) and found.value is not None for quant in results.quants)]


def _kept(results: Results, chosen: str | None) -> Table:
    """The shares of the fine-tune's gains that the quants keep, and their divergence outside the domain that it was trained on."""
    shown, elsewhere = _kept_by_any(results), any(quant.other_text for quant in results.quants)
    table = _table([*(f"gain kept in\n{what}" for _, what in shown), *(["other text: KL\nmean, mnat ± s.e."] if elsewhere else [])])
    for quant in results.quants:
        shares = [_gain_kept(kept(quant)) for kept, _ in shown]
        far = _divergence(quant.other_text)[:1] if elsewhere else []
        table.add_row("→" if quant.tag == chosen else "", quant.quant, *shares, *far, style=_style(quant, chosen))
        if elsewhere and quant.by_ggml:
            table.add_row("", "  by ggml", *("" for _ in shown), *_divergence(quant.by_ggml.other_text)[:1], style="dim")
    return table


def _gain_kept(kept: GainKept | None) -> str:
    if kept is None or kept.value is None:
        return MISSING
    return _share(kept.value, kept.standard_error, 2 if kept.standard_error is not None and kept.standard_error < 0.001 else 1)


def _table(titles: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", width=1)
    table.add_column("quant", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _style(quant: QuantResult, chosen: str | None) -> str:
    return "bold green" if quant.tag == chosen else "red" if any(flag.serious for flag in quant.flags) else ""


def _cells(quant: QuantResult, chosen: bool) -> list[str]:
    speed = quant.speed
    return [
        "→" if chosen else "",
        quant.quant,
        quantity(quant.size_bytes, "B"),
        MISSING if quant.bits_per_weight is None else f"{quant.bits_per_weight:.2f}",
        rate(speed.prompt[-1].tokens_per_s if speed and speed.prompt else None),
        rate(speed.generation_tokens_per_s if speed else None),
        seconds(speed.load_warm_s.median if speed and speed.load_warm_s else None),
        quantity(speed.peak_memory_bytes, "B") if speed and speed.peak_memory_bytes is not None else MISSING,
    ]


def _quality(results: Results, chosen: str | None) -> Table:
    """Quality and task scores of the base, of every file, with the same by ggml's rounding below it, and of the unquantized fine-tune, which the
    files are compared with."""
    tasks = ["tasks\n± s.e."] if results.tasks else []
    table = _table(["perplexity\n± s.e.", "KL mean\nmnat ± s.e.", "KL 99%\nmnat", "same top\ntoken ± s.e.", *tasks])  # thousandths of a nat
    rows: list[tuple[str, str, BaseResult | QuantResult | ByGgml, str]] = []
    if results.base:
        rows.append(("", f"base {results.base.quant}", results.base, "dim"))
    for quant in results.quants:
        rows.append(("→" if quant.tag == chosen else "", quant.quant, quant, _style(quant, chosen)))
        if quant.by_ggml:
            rows.append(("", "  by ggml", quant.by_ggml, "dim"))
        if quant.adapter and quant.adapter.merged:
            rows.append(("", f"{quant.quant} merged", quant.adapter.merged, "dim"))
    for mark, name, file, style in rows:
        scores = [_share(file.scores.mean, file.scores.standard_error, 0) if file.scores else MISSING] if tasks else []
        table.add_row(mark, name, _perplexity(file.perplexity), *_divergence(file.divergence), *scores, style=style)
    if results.reference:
        known = results.reference.scores
        scores = [_share(known.mean, known.standard_error, 0) if known else MISSING] if tasks else []
        table.add_row("", "unquantized", _perplexity(results.reference.perplexity), "0", "0", "100%", *scores, style="dim")
    return table


def _suites(results: Results, chosen: str | None) -> Table:
    """A row for each metric of a suite, because there may be many of them, and a column for each file."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("suite", overflow="fold")
    for quant in results.quants:
        table.add_column(f"{'→ ' if quant.tag == chosen else ''}{quant.quant}", justify="right", no_wrap=True, style=_style(quant, chosen))
    for suite, metric in dict.fromkeys((score.suite, score.metric) for quant in results.quants for score in quant.suites):
        cells = []
        for quant in results.quants:
            score = next((score for score in quant.suites if (score.suite, score.metric) == (suite, metric)), None)
            cells.append(MISSING if score is None else with_error(score.value, score.standard_error))
        table.add_row(f"{suite} {metric}", *cells)
    return table


def _perplexity(score: Perplexity | None) -> str:
    return MISSING if score is None or score.value is None else with_error(score.value, score.standard_error)


def _divergence(divergence: Divergence | None) -> list[str]:
    """Mean and 99th percentile in millinats, and the share of equal top tokens."""
    if divergence is None:
        return [MISSING] * 3
    error = None if divergence.standard_error is None else 1000 * divergence.standard_error
    share = _share(divergence.same_top, divergence.same_top_standard_error)
    return [with_error(1000 * divergence.mean, error), plain(1000 * divergence.p99), share]


def _share(value: float, error: float | None, digits: int = 1) -> str:
    """ "83.3 ± 12.7%"."""
    return f"{100 * value:.{digits}f}{'' if error is None else f' ± {100 * error:.{digits}f}'}%"


def with_error(value: float, error: float | None) -> str:
    """ "8.52 ± 0.60": a figure, with its standard error where there is one."""
    return plain(value) if error is None else f"{plain(value)} ± {plain(error)}"


def rate(spread: Spread | None) -> str:
    """Tokens per second: the median, to three digits."""
    return MISSING if spread is None else plain(spread.median)


def seconds(value: float | None) -> str:
    """A load time: "0.06 s", "4.2 s", "38 s"."""
    return MISSING if value is None else f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def plain(value: float) -> str:
    """A figure to about three digits: 1,234 · 123 · 12.3 · 1.23 · 0.012."""
    size = abs(value)
    if size >= 1e6:
        return f"{value:.1e}"
    digits = 0 if size >= 100 else 1 if size >= 20 else 2 if size >= 0.095 else 3
    return f"{value:,.{digits}f}"


def types_in_short(types: Mapping[str, Mapping[str, int]]) -> str:
    """ "token_embd q6_K, attn_v q6_K ×6 q8_0 ×2": the types of each kind of matrix, the commonest type first. The number follows where a
    kind has several matrices."""
    kinds = []
    for kind, counts in types.items():
        several = sum(counts.values()) > 1
        words = [f"{name} ×{count}" if several else name for name, count in sorted(counts.items(), key=lambda pair: -pair[1])]
        kinds.append(f"{kind} {' '.join(words)}")
    return ", ".join(kinds)


def print_changes(changes: Sequence[Change], old: Results) -> None:
    """The changes since `old` as a table on stdout; figures within the noise are counted, not listed."""
    console = printable.console()
    listed = [change for change in changes if change.verdict != "same"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("quant", "figure"):
        table.add_column(title, no_wrap=True)
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for change in listed:
        relative = "" if change.relative is None else f"{change.relative:+.1%}"
        style = "green" if change.verdict == "better" else "red"
        table.add_row(change.quant, change.figure, plain(change.before), plain(change.after), relative, change.verdict, style=style)
    if listed:
        console.print(table)
    same = len(changes) - len(listed)
    console.print(Text(f"Against {old.created}: {len(listed)} figures changed, {same} are the same within their spread."), soft_wrap=True)


def to_csv(results: Results) -> str:
    """The figures as CSV, a line for each quant, below a line with the names of the columns, which have the units in them. What was not measured
    is empty. A text that a spreadsheet would calculate has an apostrophe in front.
    """
    rows = [{name: _cell(value) for name, value in _csv_row(quant, results).items()} for quant in results.quants]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: object) -> object:
    """A value as a spreadsheet may show it: a text of others, such as a model's name, is no formula. Numbers are as they were."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # a lone \r is not quoted, and ends the line
    return f"'{value}" if _FORMULA.match(value) else value


def _csv_row(quant: QuantResult, results: Results) -> dict[str, object]:
    row: dict[str, object] = {
        "quant": quant.quant,
        "tag": quant.tag,
        "sha256": quant.sha256,
        "recommended": results.recommendation is not None and results.recommendation.tag == quant.tag,
        "size_bytes": quant.size_bytes,
        "bits_per_weight": quant.bits_per_weight,
    }
    if speed := quant.speed:
        row["engine"] = speed.engine
        row["load_cold_s"] = speed.load_cold_s
        spreads = {"load_warm_s": speed.load_warm_s, "generation_tokens_per_s": speed.generation_tokens_per_s}
        spreads |= {f"prompt_tokens_per_s_at_{prompt.prompt_tokens}": prompt.tokens_per_s for prompt in speed.prompt}
        for name, spread in spreads.items():
            if spread is not None:
                row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
        row["peak_memory_bytes"] = speed.peak_memory_bytes
        row["gpu_memory_bytes"] = speed.gpu_memory_bytes
    if quant.perplexity:
        row |= {"perplexity": quant.perplexity.value, "perplexity_standard_error": quant.perplexity.standard_error}
    if quant.loss:
        row |= {"loss_relative": quant.loss.relative, "loss_standard_error": quant.loss.standard_error}
    if quant.divergence:
        row |= {
            "kl_divergence": quant.divergence.mean,
            "kl_divergence_standard_error": quant.divergence.standard_error,
            "kl_divergence_p99": quant.divergence.p99,
            "same_top": quant.divergence.same_top,
        }
    for name, kept in (("gain_kept", quant.gain_kept), ("task_gain_kept", quant.task_gain_kept)):
        if kept:
            row |= {name: kept.value, f"{name}_standard_error": kept.standard_error}
    if quant.divergence_without_importance:
        row["kl_divergence_without_importance"] = quant.divergence_without_importance.mean
    if quant.other_text:
        row |= {"other_text_kl_divergence": quant.other_text.mean, "other_text_kl_divergence_standard_error": quant.other_text.standard_error}
    if other := quant.by_ggml:
        row |= {
            "ggml_perplexity": other.perplexity.value if other.perplexity else None,
            "ggml_kl_divergence": other.divergence and other.divergence.mean,
            "ggml_other_text_kl_divergence": other.other_text and other.other_text.mean,
        }
        for name in ("perplexity", "divergence", "same_top", "score"):
            change = getattr(other, f"{name}_change")
            row |= {f"{name}_against_ggml": change and change.value, f"{name}_against_ggml_standard_error": change and change.standard_error}
    if quant.adapter:
        row |= _adapter_columns(quant.adapter)
    row["flags"] = "; ".join(flag.text for flag in quant.flags)
    return row


def _adapter_columns(adapter: AdapterResult) -> dict[str, object]:
    row: dict[str, object] = {"adapter_bytes": adapter.size_bytes}
    for speed in adapter.speeds[-1:]:  # a server's, where there is one
        row["adapter_cost_engine"] = speed.engine
        for name, rates in (("prompt", speed.prompt), ("generation", speed.generation)):
            if rates:
                row |= {f"adapter_cost_of_{name}": rates.cost, f"adapter_cost_of_{name}_standard_error": rates.standard_error}
    if merged := adapter.merged:
        row["merged_bytes"] = merged.size_bytes
        row["merged_perplexity"] = merged.perplexity and merged.perplexity.value
        row["merged_kl_divergence"] = merged.divergence and merged.divergence.mean
    return row
