"""Small Python functions composed of parts, each with words that ask for it, its code, and what it must return.

A kind of function (`KINDS`) draws parts: which numbers of a list, what becomes of each, what all of them become. `"the sum of the squares of
the even numbers"` and `sum(n * n for n in numbers if n % 2 == 0)` come from the same three parts. Every part also has a Python function that
does the same without the code, so that `verified` can run each answer against values that the code had no hand in.
"""

from __future__ import annotations

import builtins
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Part:
    """One step of a function.

    Attributes:
        key: its name in a combination.
        words: ways to say it; `{x}` is what it is applied to, `{k}` a constant, `{p}` the function's parameter of that value.
        code: an expression in the same placeholders.
        run: the same on values: `run(value)`, or `run(value, k)` where a constant or a parameter takes part.
        constants: what `{k}` may be; empty where there is none.
        parameters: names that `{p}` may have; empty where the value is no parameter.
        label: how it shows in a function's name; "" where it does not.
        does: ways to say it with a verb, "adds up the {x}".
    """

    key: str
    words: tuple[str, ...]
    code: str
    run: Callable[..., Any]
    constants: tuple[Any, ...] = ()
    parameters: tuple[str, ...] = ()
    label: str = ""
    does: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exercise:
    """One function to ask for.

    Attributes:
        combination: kind and keys of the parts. Constants, names and wording are not in it.
        signature: "sum_even_squares(numbers)".
        wanted: what it returns, "the sum of the …" or "whether …"; or what it does, "adds up the …", which begins with a verb.
        code: the whole definition.
        asserts: statements that hold after it.
        telling: the name alone says what the function does.
        verbal: `wanted` begins with a verb.
    """

    combination: tuple[str, ...]
    signature: str
    wanted: str
    code: str
    asserts: tuple[str, ...]
    telling: bool = False
    verbal: bool = False


@dataclass(frozen=True)
class _Drawn:
    """A part with its wording, constant and parameter chosen."""

    part: Part
    words: str
    constant: Any
    parameter: str

    def say(self, what: str = "") -> str:
        return self.words.format(x=what, k=self.constant, p=f"`{self.parameter}`")

    def write(self, what: str = "") -> str:
        return self.part.code.format(x=what, k=repr(self.constant), p=self.parameter)

    def run(self, value: Any, *given: Any) -> Any:
        if self.part.parameters:
            return self.part.run(value, *given)
        return self.part.run(value, self.constant) if self.part.constants else self.part.run(value)


def _draw(rng: random.Random, part: Part) -> _Drawn:
    constant = rng.choice(part.constants) if part.constants else None
    return _Drawn(part, rng.choice(part.words), constant, rng.choice(part.parameters) if part.parameters else "")


_SMALL = tuple(range(2, 13)) + (15, 20, 25, 50, 100)
_LIMITS = ("limit", "bound", "k", "threshold", "minimum")
_ANY = Part("any", ("{x}",), "", lambda value: True)

NUMBER_TESTS = (
    Part("even", ("even {x}", "{x} that are even"), "{x} % 2 == 0", lambda n: n % 2 == 0, label="even"),
    Part("odd", ("odd {x}", "{x} that are odd"), "{x} % 2 == 1", lambda n: n % 2 == 1, label="odd"),
    Part("positive", ("positive {x}", "{x} greater than zero"), "{x} > 0", lambda n: n > 0, label="positive"),
    Part("negative", ("negative {x}", "{x} below zero"), "{x} < 0", lambda n: n < 0, label="negative"),
    Part("nonzero", ("{x} that are not zero", "nonzero {x}"), "{x} != 0", lambda n: n != 0, label="nonzero"),
    Part("above", ("{x} greater than {k}", "{x} above {k}"), "{x} > {k}", lambda n, k: n > k, _SMALL, label="large"),
    Part("below", ("{x} less than {k}", "{x} below {k}"), "{x} < {k}", lambda n, k: n < k, _SMALL, label="small"),
    Part("multiple", ("{x} divisible by {k}", "multiples of {k}"), "{x} % {k} == 0", lambda n, k: n % k == 0, tuple(range(3, 12)), label="multiple"),
    Part("over", ("{x} greater than {p}", "{x} above {p}"), "{x} > {p}", lambda n, p: n > p, (1, 4, 6), _LIMITS, "over"),
    Part("under", ("{x} less than {p}", "{x} below {p}"), "{x} < {p}", lambda n, p: n < p, (2, 5, 8), _LIMITS, "under"),
    Part(
        "divided",
        ("{x} divisible by {p}", "multiples of {p}"),
        "{x} % {p} == 0",
        lambda n, p: n % p == 0,
        (2, 3),
        ("divisor", "k", "step"),
        "divisible",
    ),
)
NUMBER_CHANGES = (
    Part("square", ("squares of {x}",), "{x} * {x}", lambda n: n * n, label="squares"),
    Part("cube", ("cubes of {x}",), "{x} ** 3", lambda n: n**3, label="cubes"),
    Part("double", ("doubles of {x}", "{x}, doubled"), "{x} * 2", lambda n: n * 2, label="doubles"),
    Part("half", ("halves of {x}", "{x}, halved"), "{x} / 2", lambda n: n / 2, label="halves"),
    Part("negate", ("negatives of {x}", "{x}, negated"), "-{x}", lambda n: -n, label="negated"),
    Part("absolute", ("absolute values of {x}",), "abs({x})", abs, label="absolute"),
    Part("plus", ("{x}, each increased by {k}", "{x} plus {k}"), "{x} + {k}", lambda n, k: n + k, _SMALL, label="increased"),
    Part("times", ("{x}, each multiplied by {k}", "{x} times {k}"), "{x} * {k}", lambda n, k: n * k, tuple(range(3, 13)), label="multiplied"),
)
_LISTS = ((3, 8, -2, 5, 0, 12), (1, 2, 3, 4, 5, 6), (-4, 7, 10, 15, -9), (6, 30, 9, 120, 55, 8), (), (7,))


def _first(values: Sequence, default: Any = None) -> Any:
    return values[0] if values else default


# How many of a kind become one. `{x}` is a generator's text, "n * n for n in numbers if n > 0".
NUMBER_ENDS = (
    Part("list", ("a list of the {x}", "all {x}", "the {x} as a list"), "[{x}]", list, label="list"),
    Part("sum", ("the sum of the {x}", "the total of the {x}"), "sum({x})", sum, label="sum", does=("adds up the {x}", "sums the {x}")),
    Part(
        "largest", ("the largest of the {x}, or None if there is none",), "max(({x}), default=None)", lambda v: max(v, default=None), label="largest"
    ),
    Part(
        "smallest",
        ("the smallest of the {x}, or None if there is none",),
        "min(({x}), default=None)",
        lambda v: min(v, default=None),
        label="smallest",
    ),
    Part("sorted", ("the {x} in ascending order", "a sorted list of the {x}"), "sorted({x})", sorted, label="sorted", does=("sorts the {x}",)),
    Part("descending", ("the {x} in descending order",), "sorted(({x}), reverse=True)", lambda v: sorted(v, reverse=True), label="descending"),
    Part("set", ("the set of the {x}", "a set of the {x}"), "{{{x}}}", set, label="set"),
    Part("first", ("the first of the {x}, or None if there is none",), "next(({x}), None)", _first, label="first"),
    Part("product", ("the product of the {x}",), "math.prod({x})", math.prod, label="product", does=("multiplies the {x}",)),
)
COUNT = Part("count", ("the number of {x}", "the count of {x}"), "sum(1 for {x})", len, label="count", does=("counts the {x}",))

_LETTERS = ("a", "b", "c", "s", "t", "x", "z")
WORD_TESTS = (
    Part(
        "longer",
        ("{x} longer than {k} characters", "{x} with more than {k} characters"),
        "len({x}) > {k}",
        lambda w, k: len(w) > k,
        _SMALL[:9],
        label="long",
    ),
    Part(
        "shorter",
        ("{x} shorter than {k} characters", "{x} with fewer than {k} characters"),
        "len({x}) < {k}",
        lambda w, k: len(w) < k,
        _SMALL[:9],
        label="short",
    ),
    Part("starting", ("{x} that start with '{k}'", "{x} beginning with '{k}'"), "{x}.startswith({k})", str.startswith, _LETTERS, label="starting"),
    Part("ending", ("{x} that end with '{k}'", "{x} ending in '{k}'"), "{x}.endswith({k})", str.endswith, _LETTERS, label="ending"),
    Part("containing", ("{x} that contain '{k}'", "{x} with '{k}' in them"), "{k} in {x}", lambda w, k: k in w, _LETTERS, label="containing"),
    Part("filled", ("{x} that are not empty", "nonempty {x}"), "{x}", bool, label="nonempty"),
    Part(
        "prefixed",
        ("{x} that start with {p}", "{x} beginning with {p}"),
        "{x}.startswith({p})",
        str.startswith,
        ("a", "ba"),
        ("prefix", "start", "letter"),
        "prefixed",
    ),
    Part(
        "sized",
        ("{x} of length {p}", "{x} with {p} characters"),
        "len({x}) == {p}",
        lambda w, p: len(w) == p,
        (3, 5),
        ("size", "length", "count"),
        "sized",
    ),
)
WORD_CHANGES = (
    Part("upper", ("{x} in upper case", "{x}, all in capitals"), "{x}.upper()", str.upper, label="upper"),
    Part("lower", ("{x} in lower case",), "{x}.lower()", str.lower, label="lower"),
    Part("strip", ("{x} without the white space around them", "{x}, stripped of white space"), "{x}.strip()", str.strip, label="stripped"),
    Part("backwards", ("{x} written backwards", "{x}, each reversed"), "{x}[::-1]", lambda w: w[::-1], label="reversed"),
    Part("lengths", ("lengths of {x}",), "len({x})", len, label="lengths"),
    Part("title", ("{x} with a capital first letter", "{x}, capitalized"), "{x}.capitalize()", str.capitalize, label="capitalized"),
    Part("twice", ("{x}, each written twice", "{x}, each repeated twice"), "{x} * 2", lambda w: w * 2, label="doubled"),
)
_WORDS = (("apple", "fig", "banana", "cat", "zebra"), ("tax", "Sun", "bus", "bat", "xxs", "abcabc"), (" tea ", "", "coffee", "as", "at"), (), ("a",))
WORD_ENDS = (
    *NUMBER_ENDS[:1],
    *NUMBER_ENDS[4:8],
    Part(
        "comma",
        ("the {x}, joined with commas", "a text of the {x}, separated by commas"),
        "','.join({x})",
        ",".join,
        label="commas",
        does=("joins the {x} with commas",),
    ),
    Part(
        "spaced",
        ("the {x}, joined with spaces", "a text of the {x}, separated by spaces"),
        "' '.join({x})",
        " ".join,
        label="spaced",
        does=("joins the {x} with spaces",),
    ),
    Part(
        "dashed",
        ("the {x}, joined with dashes", "a text of the {x}, separated by dashes"),
        "'-'.join({x})",
        "-".join,
        label="dashed",
        does=("joins the {x} with dashes",),
    ),
    Part(
        "longest",
        ("the longest of the {x}, or an empty text if there is none",),
        "max(({x}), key=len, default='')",
        lambda v: max(v, key=len, default=""),
        label="longest",
    ),
)

CHARACTER_TESTS = (
    Part("vowels", ("vowels", "vowels"), "{x}.lower() in 'aeiou'", lambda c: c.lower() in "aeiou", label="vowels"),
    Part("digits", ("digits",), "{x}.isdigit()", str.isdigit, label="digits"),
    Part("letters", ("letters",), "{x}.isalpha()", str.isalpha, label="letters"),
    Part("capitals", ("upper case letters", "capital letters"), "{x}.isupper()", str.isupper, label="capitals"),
    Part("smalls", ("lower case letters",), "{x}.islower()", str.islower, label="lowercase"),
    Part("spaces", ("spaces",), "{x} == ' '", lambda c: c == " ", label="spaces"),
    Part(
        "given",
        ("characters equal to {p}", "occurrences of {p}"),
        "{x} == {p}",
        lambda c, p: c == p,
        ("a", "o"),
        ("letter", "char", "character"),
        "given",
    ),
    Part(
        "inside",
        ("characters that are in {p}", "characters found in {p}"),
        "{x} in {p}",
        lambda c, p: c in p,
        ("abc", "lo1"),
        ("allowed", "chars", "alphabet"),
        "allowed",
    ),
)
_TEXTS = ("Hello World 42", "aardvark Oboe", "A1 b2 C3", "loop: solo", "")
CHARACTER_ENDS = (
    Part(
        "text", ("a text of the {x} in {t}", "the {x} of {t} as one text"), "''.join({x})", "".join, label="only", does=("keeps only the {x} of {t}",)
    ),
    Part("list", ("a list of the {x} in {t}", "all {x} of {t} as a list"), "[{x}]", list, label="list"),
    Part("set", ("the set of the {x} in {t}",), "{{{x}}}", set, label="set"),
    Part("count", ("the number of {x} in {t}", "how many {x} {t} has"), "sum(1 for {x})", len, label="count", does=("counts the {x} in {t}",)),
    Part("sorted", ("the {x} of {t} in sorted order", "a sorted list of the {x} in {t}"), "sorted({x})", sorted, label="sorted"),
)
CHARACTER_CHANGES = (
    Part("upper", ("{x}, in upper case",), "{x}.upper()", str.upper, label="upper"),
    Part("lower", ("{x}, in lower case",), "{x}.lower()", str.lower, label="lower"),
    Part("twice", ("{x}, each written twice",), "{x} * 2", lambda c: c * 2, label="doubled"),
)

TEXT_STEPS = (
    Part("strip", ("without the white space around it", "stripped of white space"), "{x}.strip()", str.strip, label="strip"),
    Part("lower", ("in lower case",), "{x}.lower()", str.lower, label="lower"),
    Part("upper", ("in upper case",), "{x}.upper()", str.upper, label="upper"),
    Part("backwards", ("reversed", "written backwards"), "{x}[::-1]", lambda t: t[::-1], label="reverse"),
    Part(
        "dashes",
        ("with dashes instead of spaces", "with spaces replaced by dashes"),
        "{x}.replace(' ', '-')",
        lambda t: t.replace(" ", "-"),
        label="dashes",
    ),
    Part(
        "underscores",
        ("with underscores instead of spaces", "with spaces replaced by underscores"),
        "{x}.replace(' ', '_')",
        lambda t: t.replace(" ", "_"),
        label="underscores",
    ),
    Part("unspaced", ("without its spaces", "with all spaces removed"), "{x}.replace(' ', '')", lambda t: t.replace(" ", ""), label="compact"),
    Part("start", ("cut to its first {k} characters",), "{x}[:{k}]", lambda t, k: t[:k], _SMALL[:9], label="start"),
    Part("end", ("cut to its last {k} characters",), "{x}[-{k}:]", lambda t, k: t[-k:], _SMALL[:9], label="end"),
    Part("title", ("in title case",), "{x}.title()", str.title, label="title"),
)

NUMBER_PAIRS = (
    Part("add", ("the sum of {x}",), "{x} + {y}", lambda a, b: a + b, label="sum"),
    Part("subtract", ("the difference of {x}",), "{x} - {y}", lambda a, b: a - b, label="difference"),
    Part("multiply", ("the product of {x}",), "{x} * {y}", lambda a, b: a * b, label="product"),
    Part("larger", ("the larger of {x}", "the maximum of {x}"), "max({x}, {y})", max, label="max"),
    Part("smaller", ("the smaller of {x}", "the minimum of {x}"), "min({x}, {y})", min, label="min"),
    Part("distance", ("the absolute difference of {x}", "the distance between {x}"), "abs({x} - {y})", lambda a, b: abs(a - b), label="distance"),
    Part("mean", ("the average of {x}", "the mean of {x}"), "({x} + {y}) / 2", lambda a, b: (a + b) / 2, label="average"),
)
PAIR_CHANGES = (
    Part("plain", ("{x}",), "{x}", lambda n: n),
    Part("square", ("the squares of {x}",), "{x} ** 2", lambda n: n**2, label="squares"),
    Part("cube", ("the cubes of {x}",), "{x} ** 3", lambda n: n**3, label="cubes"),
    Part("absolute", ("the absolute values of {x}",), "abs({x})", abs, label="absolute"),
    Part("double", ("the doubles of {x}",), "{x} * 2", lambda n: n * 2, label="doubles"),
)
PAIR_ENDS = (
    Part("plain", ("{x}",), "{x}", lambda n: n),
    Part("plus", ("{x}, plus {k}", "{x}, increased by {k}"), "{x} + {k}", lambda n, k: n + k, _SMALL, label="plus"),
    Part("times", ("{x}, times {k}", "{x}, multiplied by {k}"), "({x}) * {k}", lambda n, k: n * k, tuple(range(2, 13)), label="times"),
    Part("negate", ("the negative of {x}",), "-({x})", lambda n: -n, label="negative"),
    Part("square", ("the square of {x}",), "({x}) ** 2", lambda n: n**2, label="squared"),
)

BOUNDS = (
    Part(
        "both",
        ("kept between {low} and {high}", "limited to the range from {low} to {high}", "bounded by {low} and {high}"),
        "max({low}, min({x}, {high}))",
        lambda x, low, high: max(low, min(x, high)),
        label="clamp",
        does=(
            "keeps {x} between {low} and {high}",
            "limits {x} to the range from {low} to {high}",
            "keeps {x} within two bounds",
            "limits {x} to two bounds",
            "keeps {x} between two limits",
            "restricts {x} to a range",
        ),
    ),
    Part(
        "least", ("but at least {low}", "raised to {low} where it is smaller"), "max({x}, {low})", lambda x, low, high: max(x, low), label="at_least"
    ),
    Part(
        "most", ("but at most {high}", "lowered to {high} where it is larger"), "min({x}, {high})", lambda x, low, high: min(x, high), label="at_most"
    ),
)
BOUND_CHANGES = (
    Part("plain", ("{x}",), "{x}", lambda n: n),
    Part("square", ("the square of {x}",), "{x} ** 2", lambda n: n**2, label="square"),
    Part("double", ("the double of {x}", "twice {x}"), "{x} * 2", lambda n: n * 2, label="double"),
    Part("cube", ("the cube of {x}",), "{x} ** 3", lambda n: n**3, label="cube"),
    Part("triple", ("the triple of {x}", "three times {x}"), "{x} * 3", lambda n: n * 3, label="triple"),
    Part("half", ("half of {x}",), "{x} / 2", lambda n: n / 2, label="half"),
    Part("absolute", ("the absolute value of {x}",), "abs({x})", abs, label="absolute"),
    Part("negate", ("the negative of {x}",), "-{x}", lambda n: -n, label="negative"),
    Part("plus", ("{x} plus {k}", "{x} increased by {k}"), "{x} + {k}", lambda n, k: n + k, _SMALL, label="plus"),
    Part("minus", ("{x} minus {k}", "{x} decreased by {k}"), "{x} - {k}", lambda n, k: n - k, _SMALL, label="minus"),
    Part("digits", ("the number of digits of {x}",), "len(str(abs({x})))", lambda n: len(str(abs(n))), label="digits"),
)

LIST_ORDERS = (
    Part("plain", ("{x}",), "{x}", list),
    Part("sorted", ("{x} in sorted order", "{x} in ascending order"), "sorted({x})", sorted, label="sorted"),
    Part("descending", ("{x} in descending order",), "sorted({x}, reverse=True)", lambda v: sorted(v, reverse=True), label="descending"),
    Part("backwards", ("{x} in reverse order", "{x}, reversed"), "{x}[::-1]", lambda v: list(v)[::-1], label="reversed"),
    Part("headless", ("{x} without its first item", "{x} after the first item"), "{x}[1:]", lambda v: v[1:], label="after_first"),
    Part("tailless", ("{x} without its last item", "{x} up to the last item"), "{x}[:-1]", lambda v: v[:-1], label="before_last"),
    Part("alternate", ("every second item of {x}",), "{x}[::2]", lambda v: v[::2], label="alternate"),
    Part(
        "distinct",
        ("{x} without duplicates", "the distinct items of {x}"),
        "list(dict.fromkeys({x}))",
        lambda v: list(dict.fromkeys(v)),
        label="unique",
    ),
)
_COUNTS = ("n", "count", "size", "k", "number")
LIST_CUTS = (
    Part("first", ("the first {p} items of {x}",), "{x}[:{p}]", lambda v, p: v[:p], (2,), _COUNTS, "first"),
    Part(
        "rest", ("all but the first {p} items of {x}", "the items of {x} after the first {p}"), "{x}[{p}:]", lambda v, p: v[p:], (2,), _COUNTS, "skip"
    ),
    Part("last", ("the last {p} items of {x}",), "{x}[-{p}:]", lambda v, p: v[-p:], (2,), _COUNTS, "last"),
    Part("every", ("every {p}-th item of {x}",), "{x}[::{p}]", lambda v, p: v[::p], (2, 3), ("step", "n", "k"), "every"),
    Part("head", ("the first item of {x}",), "{x}[0]", lambda v: v[0], label="head"),
    Part("tail", ("the last item of {x}",), "{x}[-1]", lambda v: v[-1], label="tail"),
    Part(
        "chunks",
        ("{x} in lists of at most {p} items", "lists of at most {p} items of {x}"),
        "[{x}[i:i + {p}] for i in range(0, len({x}), {p})]",
        lambda v, p: [v[i : i + p] for i in range(0, len(v), p)],
        (2, 3),
        _COUNTS,
        "chunks",
        ("splits {x} into lists of at most {p} items", "cuts {x} into lists of at most {p} items"),
    ),
    Part(
        "pairs",
        ("a list of pairs of neighbours in {x}", "the pairs of each item of {x} and the next"),
        "list(zip({x}, {x}[1:]))",
        lambda v: list(pairwise(v)),
        label="pairs",
    ),
)

VALUE_TESTS = NUMBER_TESTS[:10]
DICT_ENDS = (
    Part("dict", ("a dict of the items of {d} with {x}", "the entries of {d} that have {x}"), "{{{k}: {v} for {f}}}", dict, label="items"),
    Part("keys", ("a list of the keys of {d} with {x}", "the keys in {d} that have {x}"), "[{k} for {f}]", lambda m: list(m), label="keys"),
    Part(
        "values",
        ("a list of the values of {d}, only {x}", "the values in {d} that are {x}"),
        "[{v} for {f}]",
        lambda m: list(m.values()),
        label="values",
    ),
    Part(
        "sum",
        ("the sum of the values of {d}, only {x}", "the total of the values in {d} that are {x}"),
        "sum({v} for {f})",
        lambda m: sum(m.values()),
        label="sum",
    ),
    Part("count", ("how many keys of {d} have {x}", "the number of entries of {d} with {x}"), "sum(1 for {f})", len, label="count"),
)
_DICTS = ({"a": 3, "b": 8, "c": -2}, {"x": 10, "y": 15, "z": 0, "w": 7}, {"one": 6, "two": -9, "three": 12}, {})

_LIST_NAMES = ("numbers", "values", "items", "nums", "data", "xs")
_GENERIC = ("compute", "solve", "calculate", "process", "result", "answer", "get_result", "f", "run", "transform")


def _name(rng: random.Random, *parts: Part, joined: str = "_") -> tuple[str, bool]:
    """A name for a function, and whether it says all that the function does."""
    labels = [part.label for part in parts if part.label]
    if rng.random() < 0.3 or not labels:
        return rng.choice(_GENERIC), False
    name = joined.join(labels)
    name = f"get_{name}" if hasattr(builtins, name) else name
    whole = len(labels) == sum(part is not _ANY for part in parts) and not any(part.constants for part in parts)
    return name, whole and len(labels) <= 2


def _exercise(
    combination: Sequence[str],
    name: str,
    arguments: Sequence[str],
    wanted: str,
    body: Sequence[str],
    samples: Sequence[tuple],
    run: Callable[..., Any],
    telling: bool = False,
    verbal: bool = False,
) -> Exercise:
    asserts = []
    for sample in samples:
        try:
            value = run(*sample)
        except (IndexError, ZeroDivisionError):
            continue  # the first item of an empty list: nothing was asked about it
        asserts.append(f"assert {name}({', '.join(map(repr, sample))}) == {_repr(value)}")
    code = "\n".join([f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in body)])
    return Exercise(tuple(combination), f"{name}({', '.join(arguments)})", wanted, code, tuple(asserts[:4]), telling, verbal)


def _repr(value: Any) -> str:
    """As `repr`; sets in sorted order, which theirs is not."""
    return f"{{{', '.join(map(repr, sorted(value)))}}}" if isinstance(value, set) and value else repr(value)


def _place(rng: random.Random, name: str, thing: str) -> str:
    return rng.choice((f"in a {thing}", f"in `{name}`", f"in the {thing} `{name}`"))


def _fitting(name: str, parameter: str) -> str:
    return parameter if parameter != name else f"{parameter}_"


def _filtered(rng: random.Random, kind: str, thing: str, names: Sequence[str], variable: str, tests, changes, ends, lists) -> Exercise:
    """Some members of a list, something done to each, all of them made one."""
    name = rng.choice(names)
    test, change, end = rng.choice((_ANY, *tests, *tests)), rng.choice((_ANY, _ANY, *changes)), rng.choice((*ends, COUNT))
    if end is COUNT:
        change, test = _ANY, rng.choice(tests)
    if change.key == "lengths" and end.key in ("comma", "spaced", "dashed", "longest"):
        end = ends[0]
    if test is _ANY and change is _ANY and end.key in ("list", "first"):
        test = rng.choice(tests)
    tested, changed, ended = _draw(rng, test), _draw(rng, change), _draw(rng, end)
    place = _place(rng, name, "list")
    noun = tested.say(thing)
    inner = f"the {noun} {place}" if change.words[0].find("of {x}") >= 0 else f"{noun} {place}"
    verbal = bool(end.does) and rng.random() < 0.4
    wanted = rng.choice(end.does).format(x=changed.say(inner)) if verbal else ended.say(changed.say(inner))
    wanted = wanted.replace("the the ", "the ")
    condition = f" if {tested.write(variable)}" if test is not _ANY else ""
    made = changed.write(variable) if change is not _ANY else variable
    generator = f"{variable} in {name}{condition}" if end is COUNT else f"{made} for {variable} in {name}{condition}"
    written = ended.write(generator)
    if test is _ANY and change is _ANY:  # nobody writes `sorted(n for n in numbers)`
        written = f"set({name})" if end.key == "set" else end.code.replace("({x})", "{x}" if "({x})," in end.code else "({x})").format(x=name)
    body = [f"return {written}"]
    if end.key == "product":
        looped = [f"    if {tested.write(variable)}:", f"        result *= {made}"] if condition else [f"    result *= {made}"]
        body = ["result = 1", f"for {variable} in {name}:", *looped, "return result"]
    given = [tested.constant] if test.parameters else []

    def run(values: Sequence, *rest: Any) -> Any:
        return end.run([changed.run(value) if change is not _ANY else value for value in values if test is _ANY or tested.run(value, *rest)])

    function, telling = _name(rng, end, test, change)
    arguments = [name, *([_fitting(name, tested.parameter)] if given else [])]
    return _exercise(
        (kind, test.key, change.key, end.key), function, arguments, wanted, body, [(list(values), *given) for values in lists], run, telling, verbal
    )


def numbers(rng: random.Random) -> Exercise:
    """Of a list of numbers."""
    return _filtered(rng, "numbers", "numbers", _LIST_NAMES, "n", NUMBER_TESTS, NUMBER_CHANGES, NUMBER_ENDS, _LISTS)


def words(rng: random.Random) -> Exercise:
    """Of a list of words."""
    return _filtered(rng, "words", "words", ("words", "texts", "names", "strings", "items"), "w", WORD_TESTS, WORD_CHANGES, WORD_ENDS, _WORDS)


def quantified(rng: random.Random) -> Exercise:
    """Whether any or all members of a list pass a test."""
    kind, tests, lists, variable, thing = rng.choice((("numbers", NUMBER_TESTS, _LISTS, "n", "number"), ("words", WORD_TESTS, _WORDS, "w", "word")))
    name = rng.choice(_LIST_NAMES if kind == "numbers" else ("words", "texts", "names", "strings"))
    which, test = rng.choice(("any", "all", "none")), rng.choice(tests)
    tested = _draw(rng, test)
    place = _place(rng, name, "list")
    subject = tested.say(f"{thing}s")
    wanted = {
        "any": f"whether there are any {subject} {place}",
        "all": f"whether {place.replace('of ', 'in ', 1)} there are only {subject}",
        "none": f"whether there are no {subject} {place}",
    }[which]
    call = f"{'all' if which == 'all' else 'any'}({tested.write(variable)} for {variable} in {name})"
    given = [tested.constant] if test.parameters else []

    def run(values: Sequence, *rest: Any) -> bool:
        found = [bool(tested.run(value, *rest)) for value in values]
        return {"any": any(found), "all": all(found), "none": not any(found)}[which]

    function, telling = _name(rng, Part("", (), "", bool, label={"any": "has", "all": "all", "none": "no"}[which]), test)
    arguments = [name, *([_fitting(name, tested.parameter)] if given else [])]
    body = [f"return {'not ' if which == 'none' else ''}{call}"]
    return _exercise((kind, which, test.key), function, arguments, wanted, body, [(list(values), *given) for values in lists], run, telling)


def tested_number(rng: random.Random) -> Exercise:
    """Whether a number passes one test or two."""
    name = rng.choice(("n", "number", "value", "x", "num"))
    plain = NUMBER_TESTS[:8]
    first, second = rng.sample(plain, 2)
    joint = rng.choice(("", "", "and", "or"))
    drawn = [_draw(rng, part) for part in ((first, second) if joint else (first,))]
    adjectives = {"even": "even", "odd": "odd", "positive": "positive", "negative": "negative", "nonzero": "not zero"}
    said = [
        adjectives.get(one.part.key) or one.words.format(x="", k=one.constant, p="").strip().replace("multiples of", "a multiple of") for one in drawn
    ]
    subject = rng.choice(("a number", f"`{name}`"))
    wanted = f"whether {subject} is {f' {joint} '.join(said)}"
    body = [f"return {f' {joint} '.join(one.write(name) for one in drawn)}"]

    def run(value: int) -> bool:
        found = [bool(one.run(value)) for one in drawn]
        return all(found) if joint != "or" else any(found)

    function, telling = _name(rng, Part("", (), "", bool, label="is"), *(one.part for one in drawn), joined="_")
    if joint and telling:
        function = f"is_{drawn[0].part.label}_{joint}_{drawn[1].part.label}"
    keys = [one.part.key for one in drawn]
    samples = [(value,) for value in (6, 7, -4, 0)] + [(one.constant + 1,) for one in drawn if one.constant]
    return _exercise(("test", joint or "one", *keys), function, [name], wanted, body, samples, run, telling)


def characters(rng: random.Random) -> Exercise:
    """Some characters of a text."""
    name = rng.choice(("text", "string", "s", "word", "line"))
    test, end = rng.choice(CHARACTER_TESTS), rng.choice(CHARACTER_ENDS)
    change = rng.choice((_ANY, _ANY, *CHARACTER_CHANGES)) if end.key not in ("count",) else _ANY
    negated = rng.random() < 0.35
    tested, changed = _draw(rng, test), _draw(rng, change)
    noun = f"characters that are not {tested.say().removeprefix('characters that are ')}" if negated else tested.say()
    noun = noun.replace("not characters ", "not ").replace("not occurrences of", "not")
    place = rng.choice(("a text", f"`{name}`", f"the text `{name}`"))
    verbal = bool(end.does) and change is _ANY and rng.random() < 0.4
    wanted = rng.choice(end.does if verbal else end.words).format(x=noun, t=place)
    if verbal and negated and end.key == "text":
        wanted = f"removes the {tested.say()} from {place}"
    wanted = wanted if change is _ANY else changed.say(wanted)
    condition = tested.write("c")
    if negated:
        reworded = condition.replace("==", "!=").replace(" in ", " not in ")
        condition = reworded if reworded != condition else f"not {condition}"
    made = changed.write("c") if change is not _ANY else "c"
    generator = f"c in {name} if {condition}" if end.key == "count" else f"{made} for c in {name} if {condition}"
    given = [tested.constant] if test.parameters else []

    def run(text: str, *rest: Any) -> Any:
        kept = [c for c in text if bool(tested.run(c, *rest)) != negated]
        return end.run([changed.run(c) if change is not _ANY else c for c in kept])

    function, telling = _name(rng, end, *([Part("", (), "", bool, label="non")] if negated else []), test, change)
    arguments = [name, *([_fitting(name, tested.parameter)] if given else [])]
    keys = ("characters", "not" if negated else "yes", test.key, change.key, end.key)
    return _exercise(
        keys, function, arguments, wanted, [f"return {end.code.format(x=generator)}"], [(text, *given) for text in _TEXTS], run, telling, verbal
    )


def text_steps(rng: random.Random) -> Exercise:
    """A text, changed in one to three steps."""
    name = rng.choice(("text", "string", "s", "title", "line"))
    steps = [_draw(rng, part) for part in rng.sample(TEXT_STEPS, rng.choice((1, 2, 2, 2, 3)))]
    said = [step.say() for step in steps]
    subject = rng.choice(("a text", f"`{name}`", f"the text `{name}`"))
    wanted = f"{subject} {said[0]}" + "".join(f", then {more}" for more in said[1:])
    written = reduce(lambda inner, step: step.write(inner), steps, name)

    def run(text: str) -> str:
        return reduce(lambda value, step: step.run(value), steps, text)

    function, telling = _name(rng, *(step.part for step in steps))
    samples = [(text,) for text in (" Hello big World ", "one two", "ABC def GHI jkl", "")]
    return _exercise(("text", *(step.part.key for step in steps)), function, [name], wanted, [f"return {written}"], samples, run, telling)


def arithmetic(rng: random.Random) -> Exercise:
    """Two numbers made one."""
    first, second = rng.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("m", "n")))
    pair, change, end = rng.choice(NUMBER_PAIRS), _draw(rng, rng.choice(PAIR_CHANGES)), _draw(rng, rng.choice(PAIR_ENDS))
    both = rng.choice((f"{first} and {second}", f"`{first}` and `{second}`", "two numbers"))
    wanted = end.say(rng.choice(pair.words).format(x=change.say(both)))
    inner = pair.code.format(x=change.write(first), y=change.write(second))
    written = end.write(inner)
    if pair.key in ("larger", "smaller", "distance"):  # a call needs no parentheses around it
        written = written.replace(f"({inner})", inner)

    def run(a: float, b: float) -> Any:
        return end.run(pair.run(change.run(a), change.run(b)))

    function, telling = _name(rng, pair, change.part, end.part)
    keys = ("arithmetic", change.part.key, pair.key, end.part.key)
    return _exercise(keys, function, [first, second], wanted, [f"return {written}"], [(2, 3), (7, -4), (0, 5), (10, 4)], run, telling)


def bounded(rng: random.Random) -> Exercise:
    """A number kept within bounds."""
    name = rng.choice(("value", "n", "x", "number", "amount"))
    low, high = rng.choice((("low", "high"), ("lower", "upper"), ("minimum", "maximum"), ("start", "end"), ("a", "b")))
    bound = rng.choice((*BOUNDS, BOUNDS[0]))
    chosen = rng.sample(BOUND_CHANGES[1:], 2) if rng.random() < 0.3 else [rng.choice((*BOUND_CHANGES, *BOUND_CHANGES[:1] * 3))]
    changes = [_draw(rng, part) for part in chosen]
    marked = rng.random() < 0.6
    names = {"low": f"`{low}`" if marked else low, "high": f"`{high}`" if marked else high}
    subject = reduce(lambda inner, change: change.say(inner), changes, rng.choice(("a value", f"`{name}`", name, "a number")))
    verbal = bool(bound.does) and rng.random() < 0.6
    wanted = rng.choice(bound.does).format(x=subject, **names) if verbal else f"{subject} {rng.choice(bound.words).format(**names)}"
    changed = changes[0].write(name)
    for change in changes[1:]:  # only an operator needs parentheses around what it is applied to
        changed = change.write(changed if "({x})" in change.part.code or changed.endswith(")") else f"({changed})")
    written = bound.code.format(x=changed, low=low, high=high)
    used = {"both": [low, high], "least": [low], "most": [high]}[bound.key]

    def run(value: float, *limits: float) -> Any:
        lower, upper = {"both": limits, "least": (*limits, 0), "most": (0, *limits)}[bound.key]
        return bound.run(reduce(lambda kept, change: change.run(kept), changes, value), lower, upper)

    samples = {"both": [(5, 0, 10), (-7, 0, 10), (40, 2, 9)], "least": [(5, 3), (-8, 0), (1, 9)], "most": [(5, 3), (-8, 0), (1, 9)]}[bound.key]
    function = rng.choice(("clamp", "limit", "bound", "restrict", "keep_within", "constrain")) if bound.key == "both" else bound.label
    if changes[0].part.label and rng.random() < 0.5:
        function = "_".join([function, *(change.part.label for change in changes)])
    keys = ("bounded", *(change.part.key for change in changes), bound.key)
    return _exercise(
        keys, function, [name, *used], wanted, [f"return {written}"], samples, run, bound.key == "both" and chosen[0].key == "plain", verbal
    )


def cuts(rng: random.Random) -> Exercise:
    """Some items of a list by their place."""
    name = rng.choice(("items", "values", "numbers", "data", "xs", "sequence"))
    orders = [_draw(rng, part) for part in (rng.sample(LIST_ORDERS[1:], 2) if rng.random() < 0.35 else [rng.choice(LIST_ORDERS)])]
    if {order.part.key for order in orders} == {"sorted", "descending"}:
        del orders[1]
    cut = _draw(rng, rng.choice(LIST_CUTS))
    plain = orders[0].part.key == "plain"
    subject = rng.choice(("a list", f"`{name}`", f"the list `{name}`"))
    verbal = bool(cut.part.does) and rng.random() < 0.6
    ordered = reduce(lambda inner, order: order.say(inner), orders, subject)
    wanted = rng.choice(cut.part.does).format(x=ordered, p=f"`{cut.parameter}`") if verbal else cut.say(ordered)
    parameter = _fitting(name, cut.parameter)
    body = [f"return {cut.part.code.format(x=name, p=parameter)}"]
    if not plain:
        simple = cut.part.key not in ("chunks", "pairs")
        written = reduce(lambda inner, order: order.write(inner), orders, name)
        body = [f"return {cut.part.code.format(x=written, p=parameter)}"] if simple else [f"{name} = {written}", *body]
    given = [cut.constant] if cut.part.parameters else []

    def run(values: Sequence, *rest: Any) -> Any:
        return cut.part.run(reduce(lambda kept, order: order.part.run(kept), orders, values), *rest)

    function, telling = _name(rng, cut.part, *(order.part for order in orders))
    samples = [(values, *given) for values in ([4, 1, 3, 1, 9], ["b", "a", "c"], [5, 5, 2, 8, 8, 8], [1, 2])]
    arguments = [name, *([parameter] if given else [])]
    return _exercise(("cuts", *(order.part.key for order in orders), cut.part.key), function, arguments, wanted, body, samples, run, telling, verbal)


def dicts(rng: random.Random) -> Exercise:
    """Some entries of a dict by their values."""
    name = rng.choice(("mapping", "scores", "prices", "counts", "d", "table"))
    test, end = rng.choice(VALUE_TESTS), rng.choice(DICT_ENDS)
    change = rng.choice((_ANY, _ANY, *NUMBER_CHANGES[:5])) if end.key in ("dict", "values", "sum") else _ANY
    tested, changed = _draw(rng, test), _draw(rng, change)
    place = rng.choice(("a dict", f"`{name}`", f"the dict `{name}`"))
    subject = tested.say("values") if end.key in ("dict", "keys", "count") else tested.say("ones")
    phrase = rng.choice(end.words).format(d=place, x=subject)
    phrase = phrase.replace("that are ones that are", "that are").replace("that are ones", "that are")
    if change is not _ANY:
        done = {"square": "squared", "cube": "cubed", "double": "doubled", "half": "halved", "negate": "negated"}[change.key]
        phrase = f"{phrase}, each value {done}"
    loop = f"k, v in {name}.items()" if end.key in ("dict", "keys") else f"v in {name}.values()"
    made = changed.write("v") if change is not _ANY else "v"
    filled = f"{loop} if {tested.write('v')}"
    written = end.code.format(k="k", v=made, f=filled)
    given = [tested.constant] if test.parameters else []

    def run(mapping: dict, *rest: Any) -> Any:
        kept = {k: changed.run(v) if change is not _ANY else v for k, v in mapping.items() if tested.run(v, *rest)}
        return end.run(kept)

    function, telling = _name(rng, end, test, change)
    arguments = [name, *([_fitting(name, tested.parameter)] if given else [])]
    keys = ("dicts", test.key, change.key, end.key)
    return _exercise(keys, function, arguments, phrase, [f"return {written}"], [(mapping, *given) for mapping in _DICTS], run, telling)


KINDS: dict[str, Callable[[random.Random], Exercise]] = {
    "numbers": numbers,
    "words": words,
    "quantified": quantified,
    "tested_number": tested_number,
    "characters": characters,
    "text_steps": text_steps,
    "arithmetic": arithmetic,
    "bounded": bounded,
    "cuts": cuts,
    "dicts": dicts,
}


def verified(exercise: Exercise) -> bool:
    """Whether the code passes the exercise's own asserts, of which there must be two at least."""
    names: dict[str, Any] = {}
    exec(compile(exercise.code, exercise.signature, "exec"), names)
    for statement in exercise.asserts:
        exec(compile(statement, exercise.signature, "exec"), names)
    return len(exercise.asserts) >= 2
