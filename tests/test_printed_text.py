"""Names and paths are printed as they are, also where they read like rich's markup or an emoji's name."""

from __future__ import annotations

import pytest

from olpack import progress
from olpack.commands import show
from olpack.commands.doctor import Finding, print_findings

ODD = "runs[bold]/[/red]x:smile:"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_a_list_of_packages(capsys):
    show.print_packages(
        [{"name": ODD, "recipe": ODD, "shipped": False, "trained": True, "quants": {}, "base": None, "recommended": None, "registered": [ODD]}]
    )
    assert capsys.readouterr().out.count(ODD) == 3


def test_what_doctor_found(capsys):
    print_findings([Finding(ODD, "broken", ODD, ODD)])
    printed = capsys.readouterr().out
    assert printed.count(ODD) == 3 and "✗" in printed and "[dim]" not in printed


def test_a_task_shown_as_a_bar(capsys):
    bars = progress._make_bars()
    bars.add_task(ODD, total=1, note=ODD)
    bars.console.print(bars.get_renderable())
    assert capsys.readouterr().err.count(ODD) == 2
