"""The parameters that an Ollama model can carry: names, types, ranges that make sense.

The server stores any name and any type, ignores the first kind of mistake and fails on the second only when the model first runs.
So they are checked here, before anything is sent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind = Literal["int", "float", "bool", "texts"]
ParameterValue: TypeAlias = int | float | bool | str | list[str] | tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the table. `low` and `high` are inclusive; None where there is no bound."""

    kind: Kind
    low: float | None = None
    high: float | None = None


PARAMETERS: dict[str, Parameter] = {
    # how the model is loaded
    "num_ctx": Parameter("int", 16, 1 << 24),
    "num_batch": Parameter("int", 1, 1 << 16),
    "num_gpu": Parameter("int", -1, 10_000),
    "num_thread": Parameter("int", 0, 4096),
    "main_gpu": Parameter("int", 0, 255),
    "use_mmap": Parameter("bool"),
    "draft_num_predict": Parameter("int", 0, 1024),
    # how it answers
    "num_keep": Parameter("int", -1, 1 << 24),
    "seed": Parameter("int", -(1 << 31), (1 << 32) - 1),
    "num_predict": Parameter("int", -2, 1 << 24),
    "repeat_last_n": Parameter("int", -1, 1 << 24),
    "top_k": Parameter("int", 0, 1_000_000),
    "temperature": Parameter("float", 0, 5),
    "top_p": Parameter("float", 0, 1),
    "min_p": Parameter("float", 0, 1),
    "typical_p": Parameter("float", 0, 1),
    "repeat_penalty": Parameter("float", 0, 4),
    "presence_penalty": Parameter("float", -2, 2),
    "frequency_penalty": Parameter("float", -2, 2),
    "stop": Parameter("texts"),
}

_NOUN = {"int": "a whole number", "float": "a number", "bool": "true or false", "texts": "a list of texts"}


def check_parameters(parameters: Mapping[str, object]) -> list[str]:
    """What is wrong with a set of parameters, one sentence each; an empty list where nothing is."""
    return [problem for name, value in parameters.items() if (problem := _problem(name, value))]


def _problem(name: str, value: object) -> str | None:
    known = PARAMETERS.get(name)
    if known is None:
        near = difflib.get_close_matches(str(name).lower(), PARAMETERS, n=1)
        return f"Ollama has no parameter {name!r}." + (f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(PARAMETERS)}.")
    if not _is(known.kind, value):
        example = f", as in [{value!r}]" if name == "stop" and isinstance(value, str) else ""
        return f"The parameter {name!r} must be {_NOUN[known.kind]}{example}, and is {value!r}."
    if isinstance(value, (list, tuple)):
        return "The parameter 'stop' has an empty text in it, which would stop every answer at once." if "" in value else None
    if isinstance(value, (int, float)) and ((known.low is not None and value < known.low) or (known.high is not None and value > known.high)):
        return f"The parameter {name!r} must lie between {known.low:g} and {known.high:g}, and is {value!r}."
    return None


def _is(kind: Kind, value: object) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "texts":
        return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    if isinstance(value, bool):  # a bool is an int to Python, and a mistake here
        return False
    if kind == "int":
        return isinstance(value, int)
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(parameters: Mapping[str, ParameterValue], name: str, default: int = 0) -> int | float:
    """The value of a numeric parameter; the default where it is not set."""
    value = parameters.get(name, default)
    return value if isinstance(value, (int, float)) else default


def context_warnings(num_ctx: int, trained: int | None = None, longest: int | None = None) -> list[str]:
    """Warnings about a context length, one sentence each.

    Args:
        num_ctx: tokens that the server will keep.
        trained: tokens of the longest row that training saw.
        longest: tokens that the base model was made for.
    """
    warnings = []
    if longest is not None and num_ctx > longest:
        warnings.append(f"num_ctx {num_ctx} is more than the {longest} tokens that the base model was made for: answers beyond them degrade.")
    if trained is not None and num_ctx > trained:
        warnings.append(f"num_ctx {num_ctx} is more than the {trained} tokens of the longest trained row: the fine-tune saw no longer context.")
    return warnings


_WITHOUT_END = 10
"""How many times `num_ctx` an answer gets long on a server, where `num_predict` sets no end."""


def answer_warnings(parameters: Mapping[str, ParameterValue]) -> list[str]:
    """Warnings about the length of answers, one sentence each.

    Args:
        parameters: of the package, with `num_ctx` among them.
    """
    if number(parameters, "num_predict", -1) >= 0:
        return []
    tokens = _WITHOUT_END * number(parameters, "num_ctx")
    penalty = "" if number(parameters, "repeat_penalty", 1) > 1 else " and repeat_penalty, such as 1.1,"
    return [
        f"modelfile.parameters sets no num_predict: an answer that comes to repeat itself goes on for {tokens:,} tokens on a server. "
        f"Set num_predict, such as 1024,{penalty} in the recipe."
    ]


def prompt_warnings(prompts: Mapping[str, int], num_ctx: int) -> list[str]:
    """Warnings about held-out rows whose prompts a server would cut, one sentence each.

    Args:
        prompts: tokens before the last answer of each row, by the row's place, "eval.jsonl:3".
        num_ctx: tokens that the server keeps.
    """
    longest = sorted(prompts.items(), key=lambda item: -item[1])
    above = [(place, count) for place, count in longest if count >= num_ctx]
    half = [(place, count) for place, count in longest if num_ctx // 2 < count < num_ctx]
    return [
        *([f"{_rows(above)} as long as num_ctx {num_ctx} or longer: the server cuts such prompts."] if above else []),
        *(
            [f"{_rows(half)} longer than half of num_ctx {num_ctx}, where some servers cut prompts without a message; deploy checks the longest."]
            if half
            else []
        ),
    ]


def _rows(prompts: list[tuple[str, int]]) -> str:
    named = ", ".join(f"{place} of {count} tokens" for place, count in prompts[:3]) + (", …" if len(prompts) > 3 else "")
    return f"The prompts of {len(prompts)} held-out rows ({named}) are" if len(prompts) > 1 else f"The prompt of a held-out row ({named}) is"
