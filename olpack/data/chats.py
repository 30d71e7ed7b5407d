"""Chats from a JSONL file: one JSON object with `messages` on each line."""

from __future__ import annotations

import json
from pathlib import Path

from olpack.data.rows import Chat
from olpack.errors import OlpackError
from olpack.workspace import value_digest

ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 10  # problems listed before "and N more"
_FORM = 'Each line is an object such as {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'


def load_chats(path: Path) -> list[Chat]:
    """Read every chat of a JSONL file.

    Raises:
        OlpackError: the file is missing, is not UTF-8, is empty, or has lines that are no chats: each named by its number.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise OlpackError(f"There is no {path}.", "The recipe's `data` names files relative to the recipe.") from None
    except OSError as error:
        raise OlpackError(f"{path} cannot be read: {error.strerror}.") from None
    chats, problems = [], []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = _messages(line)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}.")
        else:
            chats.append(Chat(messages, f"{path.name}:{number}"))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise OlpackError("\n".join(problems[:_SHOWN] + more), _FORM)
    if not chats:
        raise OlpackError(f"{path} is empty.", _FORM)
    return chats


def _messages(line: bytes) -> list[dict]:
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.lower()} at column {error.colno}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("there is no list of `messages`")
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {index} has no role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} has no text as `content`")
        if not message["content"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
            raise ValueError(f"message {index} has half a character (an unpaired surrogate), as text that was cut has")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"message {index}, the assistant's, is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant's turn, so nothing to learn")
    return messages


def split(chats: list[Chat], share: float) -> tuple[list[Chat], list[Chat]]:
    """Set a share of the chats apart for evaluation, each by the hash of its own content.

    A chat stays on its side when others are added, and equal chats are always on the same side.

    Returns:
        (train, eval), both in the order given.
    """
    sides: tuple[list[Chat], list[Chat]] = ([], [])
    for chat in chats:
        sides[int(value_digest(chat.messages)[:8], 16) / 2**32 < share].append(chat)
    return sides


def request_of(messages: list[dict]) -> list[dict]:
    """A conversation up to its first answer, roles and contents only."""
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages[:first]]
