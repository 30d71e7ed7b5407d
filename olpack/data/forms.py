"""The forms that rows come in, and the one that they are brought to: messages.

chat         {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
sharegpt     {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], "system": "…"}
completion   {"prompt": "…", "completion": "…"}, each a text or a list of messages
alpaca       {"instruction": "…", "input": "…", "output": "…", "system": "…"}
text         {"text": "…"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from olpack.data.rows import Form

ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"developer": "system"}  # as newer interfaces call it
KEYS: dict[Form, tuple[str, ...]] = {  # what a row of each form has at least; a row with the keys of two is of the first
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}


class RowError(ValueError):
    """Why a row is no example. `kind` is the sort of problem, in a word or two."""

    def __init__(self, text: str, kind: str = "form"):
        super().__init__(text)
        self.kind = kind


def form_of(row: Any) -> Form | None:
    """The form whose keys a row has; None where it has those of none."""
    if not isinstance(row, dict):
        return None
    form = next((form for form, keys in KEYS.items() if all(row.get(key) is not None for key in keys)), None)
    if form == "chat" and isinstance(row["messages"], list) and row["messages"] and _is_sharegpt(row["messages"][0]):
        return "sharegpt"
    return form


_READ_OF_A_MESSAGE = ("role", "content", "tool_calls", "weight", "reasoning_content", "reasoning", "thinking")
_READ: dict[Form, tuple[str, ...]] = {  # all that is read of a row
    "chat": ("messages", "tools"),
    "sharegpt": ("conversations", "messages", "system", "tools"),
    "completion": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "text": ("text",),
}


def _unread(form: Form, row: dict, messages: list[dict]) -> tuple[str, ...]:
    """Keys of a row that have a value and that its form does not read, by their path: "category", "messages.content.cache_control".

    Those of a message that olpack has no use for are among them: the chat template gets them, and may read them.
    """
    read = [key for key in _READ[form] if key != "messages" or form != "sharegpt" or row.get("conversations") is None]
    unread = _other_keys(row, read)
    for message in messages:
        unread += _other_keys(message, _READ_OF_A_MESSAGE, "messages.")
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                unread += _other_keys(part, ("type", "text"), "messages.content.")
        calls = message.get("tool_calls")
        for call in (json.loads(calls) if isinstance(calls, str) else calls) or []:
            unread += _other_keys(call, ("type", "function") if "function" in call else ("type", "name", "arguments"), "messages.tool_calls.")
            unread += _other_keys(call.get("function"), ("name", "arguments"), "messages.tool_calls.function.")
    return tuple(dict.fromkeys(unread))


def _other_keys(value: Any, read: Iterable[str], path: str = "") -> list[str]:
    """The keys of an object that have a value and are not among those read; a column may have no name."""
    rest = value.items() if isinstance(value, dict) else ()
    return [f"{path}{key}" or "(no name)" for key, inner in rest if key not in read and inner not in (None, "", [], {}) and inner == inner]


def to_chat(form: Form, row: Any) -> dict[str, Any]:
    """The content of a row, as arguments of `Chat`: `messages`, `tools`, `context`, `text`, `unread`.

    Raises:
        RowError: it does not fit the form, or is no example.
    """
    if not isinstance(row, dict):
        raise RowError("it is no object")
    if form == "text":
        text = _text(row, "text")
        if not text.strip():
            raise RowError("`text` is empty", "empty answer")
        return {"messages": [], "text": _whole(text, "`text`"), "unread": _unread(form, row, [])}
    messages, context = {"chat": _chat, "sharegpt": _sharegpt, "completion": _completion, "alpaca": _alpaca}[form](row)
    checked = [_message(message, number) for number, message in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message in checked[context:]):
        raise RowError("there is no assistant's turn, so there are no target tokens", "nothing to learn")
    return {"messages": checked, "tools": tools_of(row), "context": context, "unread": _unread(form, row, messages)}


def _chat(row: dict) -> tuple[list, int]:
    return _list(row, "messages"), 0


def _sharegpt(row: dict) -> tuple[list, int]:
    turns = _list(row, "conversations" if row.get("conversations") is not None else "messages")
    return _system(row) + [_turn(turn, number) for number, turn in enumerate(turns, 1)], 0


def _system(row: dict) -> list[dict]:
    """The system prompt that stands on the row: one message, or none."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") not in (None, "") else []


def _turn(turn: Any, number: int) -> Any:
    if not _is_sharegpt(turn):
        return turn
    who, text = turn["from"], turn.get("value")
    role = _SHAREGPT_ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise RowError(f"turn {number} is from {who!r}, and not from one of {', '.join(_SHAREGPT_ROLES)}")
    if role == "function_call":
        calls = _parsed(text, f"turn {number}, the function call, is no JSON")
        return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": text, **rest}


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, dict) and "from" in turn and "role" not in turn


def _completion(row: dict) -> tuple[list, int]:
    sides: list[list] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        if isinstance(value, str) and role == "assistant" and not value.strip():
            raise RowError(f"`{key}` is empty", "empty answer")
        sides.append([{"role": role, "content": value}] if isinstance(value, str) else _list(row, key, "neither a text nor a list of messages"))
    prompt, completion = sides
    return prompt + completion, len(prompt)


def _alpaca(row: dict) -> tuple[list, int]:
    asked, answer = _text(row, "instruction"), _text(row, "output")
    if not answer.strip():
        raise RowError("`output` is empty", "empty answer")
    if row.get("input") not in (None, ""):
        asked = f"{asked}\n\n{_text(row, 'input')}"
    return [*_system(row), *_history(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}], 0


def _history(row: dict) -> list[dict]:
    """Earlier turns of an Alpaca row: pairs of a question and its answer. A table's cell contains them as JSON."""
    pairs = row.get("history")
    if isinstance(pairs, str):
        pairs = _parsed(pairs, "`history` is no JSON") if pairs.strip() else None
    if pairs in (None, []):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RowError("`history` is no list of [question, answer] pairs")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _message(message: Any, number: int) -> dict:
    """One message, checked: text (or tool calls) from a role that is known. Keys without a value are dropped."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or _SAME_ROLE.get(role, role) not in ROLES:
        raise RowError(f"message {number} has no role of {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if value is not None} | {"role": _SAME_ROLE.get(role, role)}
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], number)
    calls = message.pop("tool_calls", None)
    if calls:
        if message["role"] != "assistant":
            raise RowError(f"message {number} has tool calls and is not the assistant's")
        message = {"content": "", **message, "tool_calls": list(_tool_calls(calls, number))}
    if not isinstance(message.get("content"), str):
        raise RowError(f"message {number} has no text as `content`")
    _whole(message, f"message {number}")
    if message["role"] == "assistant" and not calls and not message["content"].strip():
        raise RowError(f"message {number}, the assistant's, is empty", "empty answer")
    return message


def _joined(parts: list, number: int) -> str:
    """The text of a message that comes in parts, as interfaces for pictures write it."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text":
            raise RowError(f"message {number} has a part of the type {kind!r}: only text is trained", "not text")
        if not isinstance(text, str):
            raise RowError(f"message {number} has a part without text as `text`")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, number: int) -> Iterator[dict]:
    """Calls as templates want them: the function in `function`, its arguments an object."""
    calls = _parsed(calls, f"message {number}: `tool_calls` is no JSON") if isinstance(calls, str) else calls
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {number} has a tool call without the name of a function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"message {number}: the arguments of {function['name']} are no JSON")
        if not isinstance(arguments, dict):
            raise RowError(f"message {number}: the arguments of {function['name']} are no object")
        beside = {key: call[key] for key in ("id",) if key in call}
        yield {**beside, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def tools_of(row: dict) -> list[dict] | None:
    """The tools of a row or a task as JSON schemas, each with its function in `function`; None where it has none.

    Raises:
        RowError: they are no tools.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "`tools` is no JSON") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("`tools` is no list")
    wrapped = [{"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool for tool in tools]
    for number, tool in enumerate(wrapped, 1):
        if not isinstance(tool, dict) or not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError(f"tool {number} is no function with a name")
    return _whole(wrapped, "`tools`")


def _list(row: dict, key: str, problem: str | None = None) -> list:
    """A list of messages. A table's cell contains it as JSON."""
    value = row.get(key)
    if isinstance(value, str):
        value = _parsed(value, f"`{key}` is no JSON")
    if not isinstance(value, list) or not value:
        raise RowError(f"`{key}` is {problem}" if problem else f"there is no list of `{key}`")
    return value


def _text(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise RowError(f"there is no text as `{key}`")
    return row[key]


def _parsed(text: Any, problem: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise RowError(problem) from None


def _whole(value: Any, name: str) -> Any:
    """The value itself, where all its text consists of whole characters."""
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"{name} has half a character (an unpaired surrogate), as text that was cut has", "half a character") from None
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
