"""A model's answer: where its reasoning ends, and what is wrong with it, seen without reading it."""

from __future__ import annotations

from typing import Literal

from olpack.compare.results import Answer
from olpack.data.marks import REASONING_MARKS

AnswerFlag = Literal["empty", "looping", "endless"]

_LONGEST_PERIOD = 200  # characters of the stretch that repeats
_LOOP_CHARACTERS = 40  # shorter repetitions are rulers, indentation, a row of zeros


def answer_of(
    text: str, finish: Literal["stop", "length"], tokens: int, *, prompt: str = "", reasoning: str = "", broken_off: bool = False
) -> Answer:
    """An answer with its reasoning set apart, and its flags.

    Args:
        text: all that the model wrote, or what a server calls the content.
        finish: "stop" where the model ended its turn, "length" where it was cut.
        tokens: generated.
        prompt: the rendered prompt. Some templates open the reasoning at its end, and then the answer holds only the mark that closes it.
        reasoning: what a server has set apart already.
        broken_off: the server ended the answer because it repeats one token.
    """
    for begin, end in REASONING_MARKS if not reasoning else ():
        opened = text.lstrip().startswith(begin) or prompt.rstrip().endswith(begin)
        if end in text:
            reasoning, _, text = text.rpartition(end)
        elif opened:
            reasoning, text = text, ""
        if reasoning:
            reasoning = reasoning.lstrip().removeprefix(begin)
            break
    text = text.lstrip() if reasoning else text
    if broken_off:
        flags = ["looping"]
    elif reasoning and not text.strip() and finish == "length":
        flags = ["looping", "reasoning"] if _loops(reasoning) else ["reasoning"]
    else:
        flags = flags_of(text, finish)
    return Answer(text=text, finish=finish, tokens=tokens, flags=flags, reasoning=reasoning)


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
