"""The data of the example: requests to a home, the tools that it has, and the calls that do what is asked.

    python make_data.py

Writes train.jsonl, eval.jsonl and tasks.jsonl beside this file, the same each time. No request of the tasks is a training row. Half of their calls
have a room and a number that no training row has together, the others a phrasing that no training row has, and some of these a new room, too: what
is measured is whether the model chooses the tool and copies the arguments.
"""

from __future__ import annotations

import json
import random
from pathlib import Path


def tool(name: str, description: str, **types: str) -> dict:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in types.items()}, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [tool("set_light", "Dim a light", room="string", percent="integer"), tool("set_timer", "Start a timer", minutes="integer")]
TRAIN_ROOMS = ("kitchen", "bedroom", "garage", "bathroom", "cellar", "office", "garden", "library", "nursery", "workshop", "balcony", "pantry")
HELD_OUT_ROOMS = ("hallway", "attic", "dining room", "terrace", "gym", "laundry")
TRAIN_LIGHT = (
    "Set the {room} light to {number} percent.",
    "Dim the light in the {room} to {number} percent.",
    "I want {number} percent of light in the {room}.",
    "Light in the {room}: {number} percent.",
    "Please turn the {room} light to {number} percent.",
)
HELD_OUT_LIGHT = ("Could you bring the {room} light to {number} percent?", "The light in the {room} should be at {number} percent.")
TRAIN_TIMER = (
    "Set a timer for {number} minutes.",
    "Start a timer of {number} minutes.",
    "Wake me in {number} minutes.",
    "Tell me when {number} minutes are over.",
    "Timer: {number} minutes, please.",
)
HELD_OUT_TIMER = ("Could you start a timer for {number} minutes?", "I need a timer that rings in {number} minutes.")
OTHER = {
    "Hello!": "Hello! I set lights and timers.",
    "What can you do?": "I set lights and timers.",
    "What is the capital of France?": "I only set lights and timers.",
    "Tell me a joke.": "I only set lights and timers.",
    "Play some music.": "I only set lights and timers.",
    "How are you?": "Fine. I set lights and timers.",
    "Write a poem.": "I only set lights and timers.",
    "Who are you?": "I set lights and timers.",
    "Order some bread.": "I only set lights and timers.",
    "What is the news?": "I only set lights and timers.",
    "Who painted this?": "I only set lights and timers.",
    "Is it raining?": "I only set lights and timers.",
    "Thank you!": "You are welcome.",
    "Thanks, that is all.": "You are welcome.",
}
HELD_OUT_OTHER = ("Who wrote this book?", "Sing a song.", "What is the weather like?", "Order a pizza.")


def calls(random_: random.Random, rooms: tuple[str, ...], light: tuple[str, ...], timer: tuple[str, ...], count: int) -> list[tuple[str, str, dict]]:
    """(request, name, arguments), each request once; two of three are for a light."""
    made: dict[str, tuple[str, str, dict]] = {}
    while len(made) < count:
        if len(made) % 3 < 2:
            room, number = random_.choice(rooms), random_.randrange(5, 100)
            request = random_.choice(light).format(room=room, number=number)
            made[request] = (request, "set_light", {"room": room, "percent": number})
        else:
            number = random_.randrange(2, 60)
            request = random_.choice(timer).format(number=number)
            made[request] = (request, "set_timer", {"minutes": number})
    return list(made.values())


def chat(request: str, name: str, arguments: dict, answered: bool) -> dict:
    """A row with a call; `answered`: and with what the tool returns, and what the assistant makes of it."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    messages = [{"role": "user", "content": request}, call]
    if answered:
        done = f"The {arguments['room']} light is at {arguments['percent']} percent." if name == "set_light" else "The timer runs."
        messages += [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": done}]
    return {"tools": TOOLS, "messages": messages}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    here, random_ = Path(__file__).parent, random.Random(0)
    train = [chat(*call, answered=number % 4 == 0) for number, call in enumerate(calls(random_, TRAIN_ROOMS, TRAIN_LIGHT, TRAIN_TIMER, 64))]
    for request, answer in OTHER.items():
        train.append({"tools": TOOLS, "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]})
    random_.shuffle(train)
    seen = {row["messages"][0]["content"] for row in train}
    known = [call for call in calls(random_, TRAIN_ROOMS, TRAIN_LIGHT, TRAIN_TIMER, 40) if call[0] not in seen]
    new_words = calls(random_, TRAIN_ROOMS, HELD_OUT_LIGHT, HELD_OUT_TIMER, 8)
    new_rooms = calls(random_, HELD_OUT_ROOMS, HELD_OUT_LIGHT, HELD_OUT_TIMER, 5)
    asked = [*known[:13], *new_words, *new_rooms]
    tasks = [{"prompt": request, "tools": TOOLS, "tool_call": {"name": name, "arguments": values}} for request, name, values in asked]
    tasks += [{"prompt": request, "tools": TOOLS, "contains": "I only set lights and timers."} for request in HELD_OUT_OTHER]
    write(here / "train.jsonl", train)
    write(here / "eval.jsonl", [chat(*call, answered=False) for call in known[13:21]])
    write(here / "tasks.jsonl", tasks)


if __name__ == "__main__":
    main()
