"""What `olpack data check` and `olpack data show` print: figures and findings, and a row with its target tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from olpack import printable
from olpack.data.check import Report, Side, histogram, percentile
from olpack.data.render import Renderer, pieces
from olpack.data.rows import TokenRow

if TYPE_CHECKING:
    from rich.console import Console

BEGIN, END = "⟦", "⟧"  # around target tokens, where there are no colours
_BAR = 40
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # control codes would act on the terminal


def print_report(report: Report) -> None:
    """The findings, one a line, then tables of both sides."""
    from rich.table import Table
    from rich.text import Text

    console = printable.console(highlight=False)
    for finding in report.findings:
        style = None if finding.fails else "yellow"
        console.print(Text(f"{finding.place}: {'' if finding.fails else 'warning: '}{finding.text}", style=style or ""), soft_wrap=True)
    if report.findings:
        console.print()
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="")
    for title in ("", "form"):
        table.add_column(title)
    for title in ("rows", "seen an epoch", "tokens", "target tokens"):
        table.add_column(title, justify="right")
    for title, side in (("train", report.train), ("eval", report.held_out)):
        for part in side.parts:
            rows = f"{part.chats:,}" if part.rows == part.chats else f"{part.chats:,} as {part.rows:,}"
            table.add_row(
                Text(f"{title}  {part.name}"),
                part.form,
                rows,
                f"{part.seen:,}" if side is report.train else "–",
                f"{part.tokens:,}",
                f"{part.targets / max(part.tokens, 1):.0%}",
            )
    console.print(table)
    for title, side in (("train", report.train), ("eval", report.held_out)):
        if side.lengths:
            _print_side(console, title, side, report.max_length)
    failing = sum(finding.fails for finding in report.findings)
    problems = f"{failing:,} {'problem' if failing == 1 else 'problems'} that a build refuses" if failing else "no problem"
    warnings = len(report.findings) - failing
    console.print(f"\n{problems}, {warnings:,} {'warning' if warnings == 1 else 'warnings'}")


def _print_side(console: Console, title: str, side: Side, limit: int) -> None:
    from rich.table import Table

    lengths = side.lengths
    counts = ", ".join(f"{count:,} with {turns} {'answer' if turns == 1 else 'answers'}" for turns, count in sorted(side.turns.items()) if turns)
    console.print(
        f"\n{title}: tokens a row, median {percentile(lengths, 0.5):,}, 95 % up to {percentile(lengths, 0.95):,}, longest {max(lengths):,}"
        + (f"; chats: {counts}" if counts else ""),
        soft_wrap=True,
    )
    bins = histogram(lengths)
    most = max(count for _, count in bins)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for upper, count in bins:
        too_long = " too long" if upper // 2 >= limit else ""
        table.add_row(f"up to {upper:,}", "█" * (round(_BAR * count / most) or (count > 0)), f"{count:,}{too_long}")
    console.print(table)


def print_row(row: TokenRow, renderer: Renderer, title: str) -> None:
    """A row as the model sees it: in colours on a terminal that has them, else with marks around target tokens. Control codes
    show as pictures, ␛.

    Args:
        row: as `renderer` made it.
        renderer: with the tokenizer.
        title: what the first line calls the row.
    """
    console = printable.console(highlight=False)
    colours = console.is_terminal and not console.no_color
    counts = f"{len(row.ids):,} tokens, {row.target_count:,} target tokens ({row.target_count / len(row.ids):.0%})"
    legend = "target tokens in green, special tokens in magenta" if colours else f"target tokens stand in {BEGIN} {END}"
    written = "".join(_coloured(row, renderer) if colours else _marked(row, renderer))
    if not colours:
        written = printable.visible(written.translate(_PICTURES))
    title = printable.visible(title)
    console.file.write(f"{title}: {counts}; {legend}\n\n{written}{'' if written.endswith(chr(10)) else chr(10)}")


def _marked(row: TokenRow, renderer: Renderer) -> Iterator[str]:
    for text, is_target, _ in pieces(row, renderer, by_kind=False):
        yield f"{BEGIN}{text}{END}" if is_target else text


def _coloured(row: TokenRow, renderer: Renderer) -> Iterator[str]:
    from rich.color import ColorSystem
    from rich.style import Style

    styles = {
        (True, False): Style(color="green"),
        (True, True): Style(color="magenta", bold=True, underline=True),
        (False, True): Style(color="magenta"),
        (False, False): Style(dim=True),
    }
    for text, is_target, special in pieces(row, renderer):
        # Line by line: a colour that goes on over a line break is lost in a pager.
        lines = printable.visible(text.translate(_PICTURES)).split("\n")
        yield "\n".join(styles[is_target, special].render(line, color_system=ColorSystem.STANDARD) for line in lines)
