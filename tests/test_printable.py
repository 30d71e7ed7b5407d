"""Text of others does nothing to the terminal, and shows no secret of the environment."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from olpack import cli, printable, progress
from olpack.commands import chat, show
from olpack.commands.doctor import Finding, print_findings
from olpack.compare.results import Flag, MachineInfo, QuantResult, Results
from olpack.compare.table import print_table
from olpack.deploy.answers import Chatted
from olpack.errors import OlpackError
from olpack.printable import redacted, visible

ATTACK = "a\x1b[31mred\x1b[0m\x1b]0;title\x1b\\\x1b]52;c;cm0gLXJm\x1b\\\x9b2J\x90q\x9c\x08\x0d\x7f\u202eb"
SEEN = "aredb"
ARABIC = "مرحبا\u200f\u2067 בעולם\u2069 \u200d👩\u200d💻"


def acts(text: str) -> set[str]:
    """The characters of a text that would act on a terminal."""
    return {char for char in text if (ord(char) < 32 and char not in "\n\t") or 0x7F <= ord(char) < 0xA0 or char in "\u202d\u202e"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("two\r\nlines", "two\nlines"),
        ("over\rwritten", "overwritten"),
        (ATTACK, SEEN),
        (ARABIC, ARABIC),
        ("\u0627\u202e\u0628", "\u0627\u0628"),
        ("\x1b[38;2;255;0;0mx", "x"),
        ("\x1b(0x\x1b=y\x1bcz", "xyz"),
        ("\x1b]8;;javascript:x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;never ends", "0;never ends"),
        ("\x1b\x1b[[31m", "31m"),
        ("\ud800x", "\ufffdx"),
        ("\x00\x07\x85", ""),
    ],
)
def test_what_is_shown_of_a_text(text: str, shown: str) -> None:
    assert visible(text) == shown and not acts(visible(text))


def test_a_long_text_without_an_end_is_shown_in_linear_time() -> None:
    for start in ("\x1b]0;", "\x1b[", "\x90", "\x1b[0"):
        assert not acts(visible(start * 200_000))


@pytest.mark.parametrize("mode", ["lines", "json", "bars"])
def test_progress(mode, capsys) -> None:
    progress.use(mode, every=0)
    try:
        progress.say(ATTACK)
        progress.warn(ATTACK)
        with progress.task(ATTACK, 2, "rows") as task:
            task.advance(1, note=ATTACK)
            task.advance(1)
    finally:
        progress.use("lines")
    printed = capsys.readouterr().err
    if mode == "json":
        assert not acts(printed) and json.loads(printed.splitlines()[0])["text"] == ATTACK  # for programs: whole, and escaped
    elif mode == "lines":
        assert not acts(printed) and printed.count(SEEN) >= 4
    else:
        assert "\x1b[31m" not in printed and "\x1b]" not in printed and "\x9b" not in printed and "\x07" not in printed


def test_json_results_lose_nothing(capsys) -> None:
    cli._print_json({"text": ATTACK + "\ud800"})
    printed = capsys.readouterr().out
    assert not acts(printed) and json.loads(printed) == {"text": ATTACK + "\ud800"}


def test_tables(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    print_findings([Finding(ATTACK, "broken", ATTACK, ATTACK)])
    show.print_packages(
        [
            {
                "name": ATTACK,
                "recipe": "r",
                "shipped": False,
                "trained": True,
                "quants": {},
                "base": ATTACK,
                "recommended": None,
                "registered": [ATTACK],
            }
        ]
    )
    quant = QuantResult(quant=ATTACK, tag=ATTACK, file="", sha256="", size_bytes=1, flags=[Flag(code="failed", text=ATTACK, serious=True)])
    machine = MachineInfo(cpu=ATTACK, cores=1, memory_bytes=1, system=ATTACK, busy=0, versions={})
    print_table(Results(name=ATTACK, created="", machine=machine, settings={}, quants=[quant]))
    printed = capsys.readouterr().out
    assert not acts(printed) and printed.count(SEEN) >= 7


def test_a_terminal_gets_the_colours_of_the_table_alone(capsys) -> None:
    from rich.text import Text

    printable.console(force_terminal=True, color_system="standard").print(Text(ATTACK, style="green"))
    assert capsys.readouterr().out == f"\x1b[32m{SEEN}\x1b[0m\n"


def test_answers_of_a_model(capsys) -> None:
    pieces = ["a\x1b", "[31mb", "\x1b[2Jc\n", ARABIC]
    assert chat._print(iter(pieces)) == "".join(pieces)  # the conversation goes on with what the model said
    list(chat._spoken(iter([Chatted.model_validate({"message": {"thinking": ATTACK}}), Chatted.model_validate({"message": {}, "done": True})])))
    printed = capsys.readouterr()
    assert not acts(printed.out) and printed.out.endswith(f"c\n{ARABIC}\n") and printed.err.startswith(SEEN) and not acts(printed.err)


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["olpack", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    progress.use("lines")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "words", [["plan", ATTACK], ["--debug", "plan", ATTACK], ["build", "x", "--only", ATTACK], ["compare", "m", "--against", ATTACK]]
)
def test_errors_name_paths_as_text(monkeypatch, capsys, words, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert run(monkeypatch, *words) in (1, 2)
    printed = capsys.readouterr()
    assert printed.err and not acts(printed.err) and not acts(printed.out)


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host/x", "http://***@host/x"),
        ("socks5h://u:p@127.0.0.1:9 and https://t0ken@host", "socks5h://***@127.0.0.1:9 and https://***@host"),
        ("mail me@host, http://host/a@b", "mail me@host, http://host/a@b"),
        ("Bearer hf_plantedplanted.", "Bearer ***."),
        ("the key k-planted-9", "the key ***"),
        ("pr0xypass alone", "*** alone"),
        ("a%b and a%25bcdef, aXb", "a%b and ***, aXb"),
        ("h0stpass alone", "*** alone"),
        ("a true and a 1", "a true and a 1"),
    ],
)
def test_secrets_are_taken_out(monkeypatch, text: str, shown: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplanted")
    monkeypatch.setenv("OLLAMA_API_KEY", "k-planted-9\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr0xypass@proxy:3128")
    monkeypatch.setenv("ftp_proxy", "http://me:a%25bcdef@proxy:3128")
    monkeypatch.setenv("OLLAMA_HOST", "you:h0stpass@host:11434")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert redacted(text) == shown
    assert str(OlpackError(text, text)) == f"{shown} {shown}"


def test_what_libraries_log_has_no_secret(monkeypatch, caplog) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplanted")
    usual = logging.getLogRecordFactory()
    try:
        printable.redact_libraries()
        logging.getLogger("library").warning("%s at http://user:secret@host, hf_plantedplanted, \x1b[31mred", "Retrying")
        logging.getLogger("library").warning("100 % of")
    finally:
        logging.setLogRecordFactory(usual)
    assert [record.getMessage() for record in caplog.records] == ["Retrying at http://***@host, ***, red", "100 % of"]


def test_a_remedy_does_not_repeat_what_the_problem_hides() -> None:
    error = OlpackError("https://user:password@host is no name.", "A legal one: 'user:password-host'.")
    assert (error.problem, error.remedy) == ("https://***@host is no name.", "A legal one: '***-host'.")
