"""Make train.jsonl, eval.jsonl and tasks.jsonl: requests for a small Python function in words, and the function.

    python modelfiles/coding-assistant/make_data.py

exercises.py composes the functions of parts, and each is run against its asserts before it is written. What a combination of parts asks for
is either trained or held out (`held_out`), whatever its names, constants and words: eval.jsonl and tasks.jsonl ask for combinations that
train.jsonl never shows. The same version of this folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from exercises import KINDS, Exercise, verified

SYSTEM = "You are a coding assistant. Answer with Python code."
TRAIN_ROWS, HELD_OUT_ROWS = 2000, 200
HELD_OUT = 6  # one combination in so many
NAME_ONLY = 0.06  # share of requests that give nothing but a name that says all
UNNAMED = 12  # one training row in so many asks for a function without naming it
BEYOND = 20  # one training row in so many asks for something else, and is answered with what the assistant can do
SCOPE = "I write small Python functions on numbers, texts, lists and dicts. Please ask me for one of these."

_RETURNS = (
    "Write a Python function `{sig}` that returns {wanted}.",
    "Write a function {sig} that returns {wanted}.",
    "I need a Python function `{sig}` that gives me {wanted}.",
    "Implement `{sig}` in Python. It should return {wanted}.",
    "Please write the function `{sig}`: it returns {wanted}.",
    "How would you write `{sig}` in Python, so that it returns {wanted}?",
    "Write `{sig}` in Python: return {wanted}.",
    "Can you write a Python function `{sig}` which computes {wanted}?",
    "Define a function `{sig}` that gives {wanted}.",
)
_TELLS = (
    "Write a Python function `{sig}` that tells whether {wanted}.",
    "Write a function {sig} that checks whether {wanted}.",
    "I need a Python function `{sig}` that tells me whether {wanted}.",
    "Implement `{sig}` in Python. It should return whether {wanted}.",
    "Please write the function `{sig}`: it returns True if {wanted}.",
    "How would you write `{sig}` in Python, so that it tells whether {wanted}?",
    "Can you write a Python function `{sig}` which checks if {wanted}?",
    "Define a function `{sig}` that returns True if {wanted}, else False.",
)
_DOES = (
    "Write a Python function `{sig}` that {wanted}.",
    "Write a function {sig} that {wanted}.",
    "I need a Python function `{sig}` that {wanted}.",
    "Implement `{sig}` in Python. It should {to}.",
    "Please write `{sig}`, a function that {wanted}.",
    "How would you write `{sig}` in Python, so that it {wanted}?",
    "Write `{sig}` in Python: {to}.",
    "Can you write a Python function `{sig}` which {wanted}?",
)
_UNNAMED = (
    "Write a Python function that {wanted}.",
    "I need a function that {wanted}.",
    "write a function that {wanted}",
    "How do I write a function that {wanted}?",
    "Give me Python code that {wanted}.",
)
_OTHER = (
    ("What is the capital of {}?", ("France", "Spain", "Japan", "Egypt", "Brazil", "Kenya", "Norway", "Chile", "India", "Peru")),
    ("Who {}?", ("are you", "wrote Hamlet", "invented the radio", "is the president", "won the world cup", "painted the Mona Lisa")),
    ("Tell me {}.", ("a joke", "a story", "about cats", "something about history", "the weather", "the news", "who you are", "what time it is")),
    ("Write a {}.", ("poem", "letter to my boss", "short story about the sea", "song", "recipe for bread", "birthday card", "novel", "review")),
    ("Write a Python class {}.", ("Queue", "Person", "Account", "Tree", "Matrix", "Logger", "Point", "Graph", "Car", "Node")),
    (
        "Write a Python program that {}.",
        (
            "downloads a web page",
            "sends an email",
            "plays chess",
            "opens a window",
            "reads a PDF file",
            "draws a circle",
            "talks to a database",
            "renames files",
            "trains a neural network",
            "prints the news",
        ),
    ),
    ("Write a {} program.", ("Java", "Rust", "C", "JavaScript", "Go", "Haskell", "shell", "Perl")),
    ("Translate '{}' into German.", ("good morning", "I am hungry", "the sky is blue", "where is the station", "thank you")),
    ("How do I {}?", ("cook rice", "learn to swim", "fix my bike", "install Linux", "lose weight", "get to Rome", "make friends", "write a book")),
    ("Explain {}.", ("gravity", "recursion", "inflation", "how engines work", "the French revolution", "quantum computers", "photosynthesis")),
    (
        "{}",
        ("Hello", "Hi there!", "Good morning.", "Thanks!", "How are you?", "ok", "Why?", "test", "Help me, please.", "What can you do?", "?", "yes"),
    ),
    (
        "{}",
        (
            "Bonjour, comment allez-vous ?",
            "Wie geht es dir?",
            "Hola, ¿qué tal?",
            "Ciao, come stai?",
            "ما هي عاصمة فرنسا؟",
            "مرحبا",
            "كيف حالك؟",
            "اكتب قصة قصيرة",
            "Привет, как дела?",
            "Напиши стихотворение",
            "你好",
            "今天天气怎么样?",
            "こんにちは",
            "元気ですか?",
            "안녕하세요",
            "Bom dia!",
        ),
    ),
)
_NAMED = ("Write a Python function {sig}.", "Write a Python function `{sig}`.", "Implement `{sig}` in Python.", "Please write the function `{sig}`.")


def held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination of parts is kept for evaluation."""
    return int(hashlib.sha256(" ".join(combination).encode()).hexdigest(), 16) % HELD_OUT == 0


def request(exercise: Exercise, rng: random.Random) -> str:
    """The user's words for an exercise."""
    if exercise.telling and rng.random() < NAME_ONLY:
        return rng.choice(_NAMED).format(sig=exercise.signature)
    wanted = exercise.wanted
    if wanted.startswith("whether "):
        return rng.choice(_TELLS).format(sig=exercise.signature, wanted=wanted.removeprefix("whether "))
    verb, _, rest = wanted.partition(" ")
    return rng.choice(_DOES if exercise.verbal else _RETURNS).format(sig=exercise.signature, wanted=wanted, to=f"{verb.removesuffix('s')} {rest}")


def unnamed_request(exercise: Exercise, rng: random.Random) -> str:
    """The user's words for an exercise where they leave its name to the assistant."""
    verb = "" if exercise.verbal else "tells " if exercise.wanted.startswith("whether ") else "returns "
    return rng.choice(_UNNAMED).format(wanted=verb + exercise.wanted)


def other_requests() -> list[str]:
    """Requests for what the assistant is not for."""
    return [words.format(what) for words, whats in _OTHER for what in whats]


def exercises(apart: bool, count: int, seed: str, known: set[str]) -> Iterator[tuple[str, Exercise]]:
    """`count` requests with their exercises, all kinds as often; none in words that are in `known`, to which each is added.

    Args:
        apart: of held-out combinations, else of the others.
    """
    rng = random.Random(seed)
    kinds = list(KINDS.values())
    made = 0
    while made < count:
        exercise = kinds[made % len(kinds)](rng)
        words = request(exercise, rng)
        if held_out(exercise.combination) == apart and words not in known and _sound(exercise):
            known.add(words)
            made += 1
            yield words, exercise


def _sound(exercise: Exercise) -> bool:
    """Whether the code does what it should: a parameter can have the name of a loop's variable."""
    try:
        return verified(exercise)
    except (AssertionError, TypeError, RecursionError):
        return False


def training_rows(count: int, known: set[str]) -> list[tuple[str, str]]:
    """Requests and answers of train.jsonl, in order."""
    rng, others = random.Random("train"), other_requests()
    rng.shuffle(others)
    rows = []
    for number, (words, exercise) in enumerate(exercises(False, count, "train", known)):
        if number % BEYOND == 0:
            rows.append((others[number // BEYOND % len(others)], SCOPE))
        elif number % UNNAMED == 1:
            rows.append((unnamed_request(exercise, rng), exercise.code))
        else:
            rows.append((words, exercise.code))
    return rows


def _row(words: str, answer: str, system: bool) -> dict:
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": SYSTEM}, *messages] if system else messages}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make train.jsonl, eval.jsonl and tasks.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the files go")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="rows of train.jsonl")
    args = parser.parse_args()
    known: set[str] = set()
    apart = list(exercises(True, HELD_OUT_ROWS, "held out", known))
    files = {
        # Three in four open with the system prompt that the package is served with; the others are asked without one.
        "train.jsonl": [_row(*row, system=number % 4 != 3) for number, row in enumerate(training_rows(args.rows, known))],
        "eval.jsonl": [_row(words, exercise.code, system=True) for words, exercise in apart],
        "tasks.jsonl": [{"prompt": words, "python_asserts": list(exercise.asserts)} for words, exercise in apart],
    }
    for name, rows in files.items():
        (args.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        print(f"{args.out / name}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
