"""The Modelfile: written, read back by the server's grammar, and honest about what the grammar cannot hold."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from olpack.deploy import Package, differences, parse, render, unrepresentable
from olpack.errors import OlpackError

SHIPPED = Path(__file__).parent.parent.joinpath("templates/Modelfile.j2").read_text(encoding="utf-8")

HELD = {
    "plain": "You are a coding assistant.",
    "Arabic": "أنت مساعد برمجة. اكتب كودًا نظيفًا.",
    "CJK and Hebrew": "日本語、한국어、עברית",
    "emoji": "Be kind 🙂 and quick ⚡️ 🏳️",
    "accents, composed and not": "café cafe\u0301",
    "lines": "one\ntwo\n\nfour",
    "line end at the end": "one\n",
    "line ends only": "\n\n",
    "line end at the start": "\none",
    "CRLF": "one\r\ntwo\r\n",
    "CR": "one\rtwo",
    "tabs": "\tdef f():\n\t\treturn 1",
    "spaces around": "  one  ",
    "spaces before line ends": "one  \ntwo\t\n",
    "backslashes": "C:\\temp\\new \\n \\u0041 \\",
    "one quote": '"',
    "a quoted text": '"quoted"',
    "a quote at the end": 'say "yes"',
    "single quotes": "it's '''so'''",
    "three quotes in a line": 'use """ with care',
    "three quotes at the very end": 'end with """',
    "three quotes at the very start": '"""start',
    "only three quotes": '"""',
    "six quotes": '""""""',
    "one-line docstring, more after it": 'def f(): """Doc.""" ; return 1\nok',
    "two quotes at a line's end": 'a ""\nb',
    "hash": "# not a comment\n# neither",
    "commands": "FROM x\nSYSTEM y\nPARAMETER temperature 9\n",
    "template syntax": "{{ .System }} {% if x %}{# no #}{% endif %} {{ quoted }}",
    "special tokens": "<|im_start|>system\n<|im_end|>",
    "JSON": '{"a": ["b", null, 1.5]}\n{"c": "\\""}',
    "a long line": "x" * 70_000,
    "dollars and percent": "$HOME %s %% `ls` $(rm)",
}

LOST = {
    "docstring": ('def f():\n    """Return 1."""\n    return 1', 'ends in """ (line 2)'),
    "docstring over lines": ('def f():\n    """\n    Return 1.\n    """\n    return 1', 'ends in """ (line 2, 4)'),
    "three quotes, then spaces": ('a """  \nb', 'ends in """ (line 1)'),
    "three quotes alone on the first line": ('"""\ntext', 'ends in """ (line 1)'),
    "three quotes before CRLF": ('a"""\r\nb', 'ends in """ (line 1)'),
    "no-break space": ("10\u00a0kB", "U+00A0 no-break space"),
    "narrow no-break space": ("10\u202fkB", "U+202F narrow no-break space"),
    "ideographic space": ("a\u3000b", "U+3000 ideographic space"),
    "joined emoji": ("👩\u200d💻", "U+200D zero width joiner"),
    "zero width space": ("a\u200bb", "U+200B zero width space"),
    "soft hyphen": ("a\u00adb", "U+00AD soft hyphen"),
    "right-to-left mark": ("قائمة؟\u200f", "U+200F right-to-left mark"),
    "byte order mark": ("\ufeffa", "U+FEFF"),
    "line separator": ("a\u2028b", "U+2028 line separator"),
    "control character": ("a\x00b\x1b", "U+0000 control character, U+001B control character"),
    "private use": ("\ue000", "U+E000"),
    "both": ('a"""\n\u00a0b', 'ends in """ (line 1) and has characters that would vanish: U+00A0'),
}


def _read_back(package: Package) -> Package:
    return parse(render(package, "./model.gguf", SHIPPED)).package


@pytest.mark.parametrize("text", HELD.values(), ids=HELD.keys())
def test_texts_that_come_back_unchanged(text: str) -> None:
    package = Package(
        system=text,
        template=text,
        license=text,
        messages=({"role": "user", "content": text}, {"role": "assistant", "content": text}),
        parameters={"num_ctx": 2048, "stop": [text]},
    )
    assert unrepresentable(package) == []
    assert _read_back(package) == package
    assert differences(parse(render(package, "./model.gguf", SHIPPED)), package) == []


@pytest.mark.parametrize(("text", "reason"), LOST.values(), ids=LOST.keys())
def test_texts_that_the_grammar_cannot_hold_are_named(text: str, reason: str) -> None:
    package = Package(system=text, parameters={"num_ctx": 2048})
    [problem] = unrepresentable(package)
    assert problem.startswith("The system prompt has ")
    assert reason in problem
    written = render(package, "./model.gguf", SHIPPED)
    assert f"# Not held by this file, and carried by 'olpack deploy': {problem}\n" in written
    with contextlib.suppress(OlpackError):  # as `ollama create` would refuse it
        assert differences(parse(written), package)


def test_every_field_has_its_place() -> None:
    package = Package(
        system="S",
        license="Apache-2.0",
        messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}),
        parameters={
            "temperature": 0.2,
            "num_ctx": 2048,
            "use_mmap": True,
            "stop": ["<|im_end|>", "###"],
            "top_p": 1,
            "repeat_penalty": 1e-05,
        },
    )
    written = render(package, Path("../gguf/coder Q4_K_M.gguf"), SHIPPED)
    read = parse(written)
    assert read.source == "../gguf/coder Q4_K_M.gguf"
    assert read.package == package
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "###"\n' in written
    assert "PARAMETER use_mmap true\n" in written
    assert written.splitlines()[0].startswith("# Written by olpack")


def test_a_bare_package_is_one_line() -> None:
    assert [line for line in render(Package(), "m.gguf", SHIPPED).splitlines() if line and not line.startswith("#")] == ['FROM "m.gguf"']


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("FROM x\nSYSTEM hello  world \n", Package(system="hello  world")),
        ("from x\nsystem hi\nparameter temperature 1\n", Package(system="hi", parameters={"temperature": 1.0})),
        ("\ufeffFROM x\r\nSYSTEM a\r\n", Package(system="a")),
        ("# a comment\n\n  FROM x\nSYSTEM # no comment\n", Package(system="# no comment")),
        ('FROM x\nSYSTEM "two\nlines"\n', Package(system="two\nlines")),
        ('FROM x\nSYSTEM """open at the end of the file"""', Package(system="open at the end of the file")),
        ("FROM x\nLICENSE a\nLICENSE b\n", Package(license="a\nb")),
        ("FROM x\nMESSAGE user hi: there\n", Package(messages=({"role": "user", "content": "hi: there"},))),
        ("FROM x\nSYSTEM one\nSYSTEM two\n", Package(system="two")),
    ],
)
def test_the_grammar(text: str, package: Package) -> None:
    assert parse(text) == type(parse(text))("x", package)


def test_other_commands_are_kept() -> None:
    assert parse("FROM x\nADAPTER ./a.gguf\nRENDERER qwen\n").others == (("renderer", "qwen"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SYSTEM x\n", "no FROM"),
        ("FROM x\nSYSTEMS y\n", "line 2: 'systems' is no command"),
        ("FROM x\nSYSTEM\n", "line 2: SYSTEM has no value"),
        ("FROM x\nMESSAGE tool hi\n", "'tool' is no role"),
        ('FROM x\nSYSTEM """open\n', "the quotes after SYSTEM are not closed"),
        ("FROM x\nPARAMETER temprature 1\n", "'temprature', which is no parameter"),
        ("FROM x\nPARAMETER temperature hot\n", "temperature to 'hot'"),
        ("FROM x\nPARAMETER num-ctx 1\n", "parameter 'num-' is not complete"),
        ("FROM", "FROM has no value"),
    ],
)
def test_what_the_server_would_refuse(text: str, said: str) -> None:
    with pytest.raises(OlpackError) as caught:
        parse(text)
    assert said in caught.value.problem


def test_a_users_own_template_that_says_something_else_is_caught() -> None:
    package = Package(system="Be brief.", parameters={"num_ctx": 2048, "temperature": 0})
    written = render(package, "m.gguf", "FROM {{ gguf }}\nSYSTEM {{ system | upper | quoted }}\nPARAMETER num_ctx 4096\nPARAMETER top_k 1\n")
    assert differences(parse(written), package) == [
        "system: the package has 'Be brief.', the Modelfile has 'BE BRIEF.'",
        "parameter num_ctx: the package has 2048, the Modelfile has 4096",
        "parameter temperature: the package has 0, the Modelfile has None",
        "parameter top_k: the package has None, the Modelfile has 1",
    ]


@pytest.mark.parametrize(("template", "said"), [("FROM {{ gguf", "error in line 1"), ("FROM {{ path }}", "'path' is undefined")])
def test_a_broken_template_is_one_sentence(template: str, said: str) -> None:
    with pytest.raises(OlpackError, match="Modelfile template") as caught:
        render(Package(), "m.gguf", template)
    assert said in caught.value.problem


TRIPLE = 'Call it """raw""" text, "quoted" at its end: """x"'
WAYS = [TRIPLE, '"""', '"" "', 'a\n"""b"""\nc "', '"one" and "two"', '"""\n"""']


@pytest.mark.parametrize("text", WAYS)
def test_three_quotes_in_any_field_come_back_or_are_named(text: str) -> None:
    """ollama/ollama#5715, #6103: nothing of a text is lost or taken for the end of its quotes without a word."""
    package = Package(system=text, parameters={"num_ctx": 64, "stop": [text, "\n\n"]}, messages=({"role": "user", "content": text},))
    told = unrepresentable(package)
    assert len(told) in (0, 3)  # all three fields, or none
    if not told:
        read = parse(render(package, "m.gguf", SHIPPED))
        assert not differences(read, package)
        assert read.package.system == read.package.parameters["stop"][0] == read.package.messages[0]["content"] == text
