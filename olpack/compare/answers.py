"""What is wrong with a free answer, seen without reading it."""

from __future__ import annotations

from typing import Literal

AnswerFlag = Literal["empty", "looping", "endless"]

_LONGEST_PERIOD = 200  # characters of the stretch that repeats
_LOOP_CHARACTERS = 40  # shorter repetitions are rulers, indentation, a row of zeros


def flags_of(text: str, finish: str) -> list[AnswerFlag]:
    """Flags of an answer that ended by itself ("stop") or was cut at the limit ("length").

    "looping": cut while it said the same thing over and over. "endless": cut otherwise.
    """
    if not text.strip():
        return ["empty"]
    if finish == "stop":
        return []
    return ["looping"] if _loops(text) else ["endless"]


def _loops(text: str) -> bool:
    # The cut can fall anywhere inside the repeated stretch: in a loop of period p every character of the tail equals the one p before it.
    tail = text[-6 * _LONGEST_PERIOD :]
    for period in range(1, min(_LONGEST_PERIOD, len(tail) // 4) + 1):
        same = 0
        while same < len(tail) - period and tail[-1 - same] == tail[-1 - same - period]:
            same += 1
        if same >= max(3 * period, _LOOP_CHARACTERS):
            return True
    return False
