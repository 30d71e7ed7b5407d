"""Whether a text repeats itself to its end, as a model does that is caught in a loop."""

from __future__ import annotations

_LONGEST_PERIOD = 200  # characters of the stretch that repeats
_LOOP_CHARACTERS = 40  # shorter repetitions are rulers, indentation, a row of zeros


def repeats_itself(text: str) -> bool:
    """Whether the end of a text is one stretch of at most 200 characters over and over. The last repetition may be cut."""
    # The cut can fall anywhere inside the repeated stretch: in a loop of period p every character of the tail equals the one p before it.
    tail = text[-6 * _LONGEST_PERIOD :]
    for period in range(1, min(_LONGEST_PERIOD, len(tail) // 4) + 1):
        same = 0
        while same < len(tail) - period and tail[-1 - same] == tail[-1 - same - period]:
            same += 1
        if same >= max(3 * period, _LOOP_CHARACTERS):
            return True
    return False
