"""The data of the example: requests for an appointment, and the JSON that a program reads.

    python make_data.py

Writes train.jsonl, eval.jsonl and tasks.jsonl beside this file, the same each time. No request of the tasks is a training row. A third of them has
names and phrasings of the training rows in a new combination, a third new names, and a third new names and new phrasings: what is measured is
whether the model copies from the request and keeps to the form.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SYSTEM = 'Write the appointment as JSON with the keys "name", "service", "day" and "time". A value that is missing is null.'
TRAIN_NAMES = (
    "Anna Weber", "Omar Haddad", "Lucia Rossi", "Peter Novak", "Grace Kim", "Ali Rahman", "Eva Larsen", "John Carter", "Maria Silva", "Tom Baker",
    "Nadia Fares", "Paul Meyer", "Sara Cohen", "David Price", "Mina Park", "Karl Braun", "Rosa Marin", "Ben Foster", "Leila Nasser", "Ivan Petrov",
    "Julia Stone", "Sami Khalil", "Clara Vogel", "Noah Reed", "Hana Sato", "Mark Olsen", "Dina Salem", "Luke Hall", "Irene Costa", "Adam Wolf",
    "Ruth Green", "Karim Aziz", "Emma Lind", "Victor Gomez", "Amal Said", "Felix Kramer", "Nora Blake", "Hugo Martin", "Layla Amin", "Simon Clark",
)  # fmt: skip
HELD_OUT_NAMES = (
    "Greta Holm", "Yusuf Karam", "Teresa Lopez", "Martin Hill", "Salma Idris", "Oscar Lang", "Helen Ford", "Rami Saleh", "Vera Koch", "Daniel West",
    "Aisha Malik", "George Bell", "Petra Simon", "Henry Wood", "Mona Darwish", "Erik Berg",
)  # fmt: skip
SERVICES = ("haircut", "massage", "eye test", "dental check", "tyre change", "piano lesson", "photo session", "tax advice")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
TRAIN_WORDS = (
    "{name} needs a {service} on {day} at {time}.",
    "Please book a {service} for {name}, {day}, {time}.",
    "A {service} on {day} for {name}, please, at {time}.",
    "My name is {name}. I want a {service} at {time} on {day}.",
    "{day}, {time}: {service} for {name}.",
    "Can {name} come for a {service} on {day} at {time}?",
    "This is {name}: is a {service} possible at {time} on {day}?",
    "At {time} on {day}, {name} would like a {service}.",
    "Good morning, {name} speaking. I would like a {service}, {day}, {time}.",
    "Hi, {name} again: a {service} on {day} at {time}, please.",
    "Note a {service}, {day} at {time}. The customer is {name}.",
)
HELD_OUT_WORDS = (
    "Hello, {name} here. I would like a {service} on {day} at {time}, please.",
    "Please note: {day} at {time}, a {service}, the name is {name}.",
)
TRAIN_WITHOUT = {
    "time": (
        "{name} needs a {service} on {day}.",
        "Please book a {service} for {name}, {day}.",
        "Good morning, {name} speaking. I want a {service} on {day}.",
    ),
    "day": ("{name} needs a {service} at {time}.", "Please book a {service} for {name}, {time}.", "Hi, {name} again: a {service} at {time}, please."),
    "name": ("I need a {service} on {day} at {time}.", "Please book a {service}, {day}, {time}.", "A {service} on {day}, please, at {time}."),
}
HELD_OUT_WITHOUT = {
    "time": ("Hello, {name} here. I would like a {service} on {day}, please.",),
    "day": ("Hello, {name} here. I would like a {service} at {time}, please.",),
    "name": ("Hello, I would like a {service} on {day} at {time}, please.",),
}


def appointments(seed: int, count: int, names: tuple[str, ...], words: tuple[str, ...], without: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(request, its JSON), each once. In one of four, something is missing."""
    random_ = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        value: dict[str, str | None] = {
            "name": random_.choice(names),
            "service": random_.choice(SERVICES),
            "day": random_.choice(DAYS),
            "time": f"{random_.randrange(8, 19)}:{random_.choice(('00', '15', '30', '45'))}",
        }
        missing = random_.choice((*without, *[None] * 9))
        request = random_.choice(without[missing] if missing else words).format(**value)
        if missing:
            value[missing] = None
        made[request] = json.dumps(value)
    return list(made.items())


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(request: str, answer: str) -> dict:
    texts = (("system", SYSTEM), ("user", request), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in texts]}


def main() -> None:
    here = Path(__file__).parent
    train = appointments(0, 112, TRAIN_NAMES, TRAIN_WORDS, TRAIN_WITHOUT)
    combined = [pair for pair in appointments(2, 20, TRAIN_NAMES, TRAIN_WORDS, TRAIN_WITHOUT) if pair not in train][:12]
    new_names = appointments(3, 10, HELD_OUT_NAMES, TRAIN_WORDS, TRAIN_WITHOUT)
    new_words = appointments(1, 22, HELD_OUT_NAMES, HELD_OUT_WORDS, HELD_OUT_WITHOUT)
    write(here / "train.jsonl", [chat(*pair) for pair in train])
    write(here / "eval.jsonl", [chat(*pair) for pair in new_words[:12]])
    tasks = (*combined, *new_names, *new_words[12:])
    write(here / "tasks.jsonl", [{"prompt": request, "exact": answer} for request, answer in tasks])


if __name__ == "__main__":
    main()
