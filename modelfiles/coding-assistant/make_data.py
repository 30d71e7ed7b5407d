"""Make train.jsonl and eval.jsonl: chats that ask for a function in words and answer with its source.

    python modelfiles/coding-assistant/make_data.py            # the standard library of the running interpreter
    python modelfiles/coding-assistant/make_data.py --stdlib /usr/lib/python3.11

The functions and their docstrings come from CPython's standard library, © Python Software Foundation and others, used and passed on under
the PSF licence, version 2 (LICENSE-PYTHON.txt beside this file). The same library gives the same bytes.

`held_out` is the one rule that says which modules are kept for evaluation. `benchmarks/tiny_coder.py` imports it, so the base model
that ships with olpack was never trained on a function of eval.jsonl: `choose` also drops every function of a held-out module
that stands, under any name, somewhere in the other modules or in their tests.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "You are a coding assistant. Answer with Python code."
TRAIN_ROWS, EVAL_ROWS = 680, 110
MAX_PER_MODULE = 30  # no module may set the tone alone
MAX_ANSWER_CHARS = 520  # with the request about 200 tokens at most: a CPU trains on all rows in minutes
MAX_SUMMARY_CHARS = 140

# Tables and generated settings: text that looks like Python and teaches none.
_NOT_CODE = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}
_VERBS = frozenset(
    """add append apply assert build call change check clear close compare compile compute concatenate convert copy count create cut decide
    decode decorate delete determine discard display divide dump encode ensure escape evaluate examine execute expand extract fetch fill
    filter find fix flatten flush format generate get give guess handle ignore import increment indicate initialize insert install invoke
    iterate join list load locate look make map match merge move multiply normalize open parse perform pick place prepare print process
    produce provide put query quote raise read rebuild recognize record register release remove rename render repeat replace report reset
    resolve restore retrieve return reverse rotate round run save scan search select send serialize set show skip sort split start step
    stop store strip substitute subtract swap switch take test transform translate truncate try turn unescape unpack unquote update use
    validate verify wait walk warn wrap write yield""".split()
)


@dataclass(frozen=True)
class Module:
    """One source file of the library. `name` is dotted ("email.utils"); `is_test` says that it tests others."""

    name: str
    text: str
    is_test: bool


@dataclass(frozen=True)
class Function:
    """One documented function.

    Attributes:
        source: module and name, "textwrap:dedent".
        signature: name and arguments as written, "dedent(text)".
        summary: the first sentence of the docstring, without its full stop.
        code: the whole definition without the docstring.
        key: the normalised definition, docstring and name left out: equal keys are the same function.
    """

    source: str
    signature: str
    summary: str
    code: str
    key: str

    @property
    def module(self) -> str:
        return self.source.partition(":")[0]


def _draw(text: str, choices: int) -> int:
    """A number below `choices` that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % choices


def held_out(module: str) -> bool:
    """Whether a module (dotted name) is kept for evaluation: about one in ten, whatever the version of Python."""
    return _draw(f"held out: {module}", 10) == 0


def library_modules(stdlib: Path) -> Iterator[Module]:
    """The library's source files in the order of their paths; tables, and files that are not UTF-8 (tests of decoders), left out."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if _NOT_CODE.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        name = ".".join(parts).removesuffix(".__init__")
        yield Module(name, text.replace("\r\n", "\n"), bool(_TESTS.intersection(parts)))


def _body(node: ast.FunctionDef) -> list[ast.stmt]:
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def _outline(node: ast.FunctionDef) -> tuple:
    """What equal functions surely share, at a hundredth of the price of `_key`."""
    return tuple(argument.arg for argument in node.args.args), tuple(type(statement).__name__ for statement in _body(node))


def _key(node: ast.FunctionDef) -> str:
    return "\n".join([ast.unparse(node.args), *map(ast.unparse, _body(node))])


def _summary(docstring: str) -> str | None:
    """The first sentence of a docstring; None where there is no usable one."""
    for paragraph in docstring.split("\n\n")[:2]:
        text = " ".join(paragraph.split())
        if re.match(r"\w+\(", text):  # the old habit of repeating the signature: "capwords(s [,sep]) -> string"
            continue
        sentence = re.split(r"(?<=[^.\s][^.])\.(?:\s|$)", text, maxsplit=1)[0].rstrip(".:")
        fits = 15 <= len(sentence) <= MAX_SUMMARY_CHARS and sentence.isascii() and " " in sentence
        return sentence if fits and sentence[0].isalpha() and not re.search(r">>>|\b(XXX|TODO)\b", sentence) else None
    return None


def without_docstring(node: ast.FunctionDef, lines: list[str]) -> str | None:
    """The definition's source without its docstring; None where lines cannot simply be taken out."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    after = lines[docstring.end_lineno : node.end_lineno]
    while after and not after[0].strip():
        del after[0]
    code = textwrap.dedent("\n".join(lines[first - 1 : docstring.lineno - 1] + after)).rstrip()
    try:
        (parsed,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    return code if isinstance(parsed, ast.FunctionDef) and _key(parsed) == _key(node) else None


def documented_functions(module: Module) -> Iterator[Function]:
    """The module's own public functions that have a docstring, a body worth learning and a moderate length."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:
        return  # files that test the parser
    lines = module.text.split("\n")
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or not (docstring := ast.get_docstring(node)):
            continue
        summary, body = _summary(docstring), _body(node)
        if summary is None or not body or isinstance(body[0], (ast.Pass, ast.Raise)):
            continue
        code = without_docstring(node, lines)
        signature = f"{node.name}({ast.unparse(node.args)})"
        if code and code.isascii() and len(code) <= MAX_ANSWER_CHARS and len(signature) <= 90:
            yield Function(f"{module.name}:{node.name}", signature, summary, code, _key(node))


def request(function: Function) -> str:
    """The user's words: one of several ways to ask for the function, chosen by its name."""
    signature, said = f"`{function.signature}`", function.summary
    first, _, rest = said.partition(" ")
    verb = first.lower()
    stem = verb if verb in _VERBS else next((stem for stem in (verb[:-1], verb[:-2], verb[:-3] + "y") if stem in _VERBS), None)
    if stem is None:
        ways = [
            f"Write a Python function {signature}. {said}.",
            f"Implement {signature} in Python. Its purpose: {said}.",
            f"Please write the function {signature}: {said}.",
        ]
    else:
        ending = "ies" if re.search(r"[^aeiou]y$", stem) else "es" if re.search(r"(s|x|z|ch|sh)$", stem) else "s"
        does = (stem[:-1] if ending == "ies" else stem) + ending + " " + rest
        ways = [
            f"Write a Python function {signature} that {does}.",
            f"I need a Python function {signature} that {does}.",
            f"Implement {signature} in Python. It should {stem} {rest}.",
            f"Please write {signature}, a function that {does}.",
            f"How would you write {signature} in Python, so that it {does}?",
            f"{stem.capitalize()} {rest}: write {signature}.",
        ]
    return ways[_draw(f"request: {function.source}", len(ways))]


def row(function: Function) -> dict:
    """The chat for one function; about half of the chats open with the system prompt."""
    messages = [{"role": "user", "content": request(function)}, {"role": "assistant", "content": function.code}]
    if _draw(f"system: {function.source}", 2):
        messages.insert(0, {"role": "system", "content": SYSTEM})
    return {"messages": messages, "source": function.source}


def _drawn(functions: Iterable[Function], count: int) -> list[Function]:
    """`count` functions in an order that only their names decide, no key twice, few per module."""
    chosen: dict[str, Function] = {}
    per_module: Counter[str] = Counter()
    for function in sorted(functions, key=lambda function: hashlib.sha256(function.source.encode()).digest()):
        if function.key not in chosen and per_module[function.module] < MAX_PER_MODULE and len(chosen) < count:
            chosen[function.key] = function
            per_module[function.module] += 1
    return list(chosen.values())


def choose(modules: list[Module]) -> tuple[list[Function], list[Function]]:
    """The functions of train.jsonl and of eval.jsonl. What a held-out module shares with any other file is in neither."""
    trained_on = [module for module in modules if module.is_test or not held_out(module.name)]
    apart = [function for module in modules if not module.is_test and held_out(module.name) for function in documented_functions(module)]
    outlines = {_outline(ast.parse(function.code).body[0]) for function in apart}
    seen = set()
    for module in trained_on:
        try:
            nodes = ast.walk(ast.parse(module.text))
        except SyntaxError:
            continue
        seen.update(_key(node) for node in nodes if isinstance(node, ast.FunctionDef) and _outline(node) in outlines)
    train = _drawn((function for module in trained_on if not module.is_test for function in documented_functions(module)), TRAIN_ROWS)
    return train, _drawn((function for function in apart if function.key not in seen), EVAL_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make train.jsonl and eval.jsonl from the standard library.")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the library's folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the two files go")
    args = parser.parse_args()
    for name, functions in zip(("train.jsonl", "eval.jsonl"), choose(list(library_modules(args.stdlib))), strict=True):
        target = args.out / name
        target.write_text("".join(json.dumps(row(function)) + "\n" for function in functions), encoding="utf-8", newline="\n")
        print(f"{target}: {len(functions)} chats", file=sys.stderr)


if __name__ == "__main__":
    main()
