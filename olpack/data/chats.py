"""Chats from the recipe's data: read, refused where they are none, split, and repeated by the weight of their source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from olpack.data.rows import Chat, Problem
from olpack.data.sources import Source
from olpack.errors import OlpackError

_LISTED = 10  # problems listed before "and N more"
FORM = (
    'A row is an object such as {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or of another form '
    "(docs/data.md)."
)


def load_chats(*sources: Source | Path) -> list[Chat]:
    """Read every chat of some sources; a path is a source whose rows decide its form.

    Raises:
        OlpackError: a source is missing or empty, or has rows that are no chats: each named by its line.
    """
    chats: list[Chat] = []
    problems: list[Problem] = []
    for source in sources:
        source = Source(source) if isinstance(source, Path) else source
        before = len(chats) + len(problems)
        for row in source.read():
            if isinstance(row, Chat):
                chats.append(row)
            else:
                problems.append(row)
        if len(chats) + len(problems) == before:
            raise OlpackError(f"{source.place if isinstance(source.place, Path) else source.label} is empty.", FORM)
    if problems:
        refuse([problem.sentence for problem in problems], FORM)
    return chats


def refuse(problems: list[str], remedy: str) -> NoReturn:
    """Raise the first of some problems, and how many more there are."""
    more = [f"and {len(problems) - _LISTED} more (`olpack data check` lists all)"] if len(problems) > _LISTED else []
    raise OlpackError("\n".join(problems[:_LISTED] + more), remedy)


def split(chats: list[Chat], share: float) -> tuple[list[Chat], list[Chat]]:
    """Set a share of the chats apart for evaluation, each by the hash of its own content.

    A chat stays on its side when others are added, and equal chats are always on the same side, whatever file or form they come in. Of rows
    so few that chance leaves one side empty, the one with the lowest hash is held out.

    Returns:
        (train, eval), both in the order given.
    """
    sides: tuple[list[Chat], list[Chat]] = ([], [])
    for chat in chats:
        sides[int(chat.digest[:8], 16) / 2**32 < share].append(chat)
    if share and not all(sides) and len({chat.digest for chat in chats}) > 1:
        lowest = min(chat.digest for chat in chats)
        sides = [chat for chat in chats if chat.digest != lowest], [chat for chat in chats if chat.digest == lowest]
    return sides


def unread_keys(chats: Iterable[Chat], template: str = "") -> list[str]:
    """One sentence for each file with keys or columns that are not read: which, and in how many rows.

    Args:
        chats: of any files.
        template: the chat template; keys of messages and tool calls whose names stand in it are read by it.
    """
    files: dict[str, Counter[str]] = {}
    words = set(re.findall(r"\w+", template))
    for chat in chats:
        if unread := [key for key in chat.unread if not (key.startswith("messages.") and key.rpartition(".")[2] in words)]:
            files.setdefault(chat.source.rpartition(":")[0], Counter()).update(unread)
    return [
        f"{name}: not read: " + ", ".join(f"{key} ({count:,} row{'s' * (count != 1)})" for key, count in keys.items()) for name, keys in files.items()
    ]


def times(chat: Chat) -> int:
    """How often a chat is seen in an epoch: its weight, of which the part after the point is decided by the hash of its content.

    Of many chats of weight 2.5, half are seen twice and half three times, the same ones in each run.
    """
    whole = int(chat.weight)
    return whole + (int(chat.digest[8:16], 16) / 2**32 < chat.weight - whole)


def leaks(train: Iterable[Chat], held_out: Iterable[Chat]) -> list[tuple[Chat, Chat]]:
    """Held-out chats that are also in the training data, each with its twin there."""
    seen = {chat.digest: chat for chat in train}
    return [(chat, seen[chat.digest]) for chat in held_out if chat.digest in seen]
