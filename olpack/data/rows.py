"""A row of data, before and after the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from olpack.workspace import value_digest

Form = Literal["chat", "sharegpt", "alpaca", "completion", "text"]
Learn = Literal["all", "last"]

_MEANING = ("role", "content", "reasoning_content", "thinking", "name")  # of a message; ids and the like make it no other one


@dataclass(frozen=True)
class Chat:
    """One conversation, or one plain text, as its file contains it.

    Attributes:
        messages: turns in order, each with `role` and `content`, and what else the template may read. Empty for a plain text.
        source: where it stands, "train.jsonl:17".
        tools: what the assistant may call, as JSON schemas; None where there is nothing.
        context: so many messages at the beginning are read and have no target tokens.
        text: a plain text, all of whose tokens are target tokens.
        form: that of its file.
        weight: how often it is seen in an epoch.
        unread: keys of its row that have a value and that the form does not read, by their path; of a message also those for the template.
    """

    messages: list[dict]
    source: str
    tools: list[dict] | None = None
    context: int = 0
    text: str | None = None
    form: Form = "chat"
    weight: float = 1.0
    unread: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Identity of the content, whatever form, file or order of keys it comes in."""
        if self.text is not None:
            return value_digest({"text": self.text})
        messages = _meaning(self.messages)
        return value_digest({"messages": messages, "tools": self.tools}) if self.tools else value_digest(messages)

    @cached_property
    def first_answer(self) -> tuple[str, str] | None:
        """Identities of the request that the chat opens with, and of its answer; None where it opens with none."""
        first = _first_answer(self.messages)
        if not first:
            return None
        request, answer = _meaning(self.messages[:first]), _meaning(self.messages[first : first + 1])
        return value_digest([request, self.tools]), value_digest(answer)


def request_of(messages: list[dict]) -> list[dict]:
    """A conversation up to its first answer, roles and contents only; empty where it has no answer, or nothing before it."""
    return [{"role": message["role"], "content": message["content"]} for message in messages[: _first_answer(messages)]]


def _first_answer(messages: list[dict]) -> int:
    return next((index for index, message in enumerate(messages) if message["role"] == "assistant"), 0)


def _meaning(messages: list[dict]) -> list[dict]:
    kept = []
    for message in messages:
        kept.append({key: message[key] for key in _MEANING if key in message})
        if calls := message.get("tool_calls"):
            kept[-1]["tool_calls"] = [call["function"] for call in calls]
    return kept


@dataclass(frozen=True)
class Problem:
    """A row that is no example, and the reason.

    Attributes:
        source: where it stands, "train.jsonl:17".
        place: its file and line, "data/train.jsonl, line 17".
        text: what is wrong, without a full stop.
        kind: the sort of problem, in a word or two.
    """

    source: str
    place: str
    text: str
    kind: str

    @property
    def sentence(self) -> str:
        """Place and text, ended by a full stop where the text is no question."""
        return f"{self.place}: {self.text}{'' if self.text.endswith('?') else '.'}"


@dataclass(frozen=True)
class TokenRow:
    """One conversation as the model sees it.

    Attributes:
        ids: token ids, the special tokens of the chat template included.
        loss_mask: one flag per id: True for a target token, one that is part of an assistant's turn (its end-of-turn token included).
            The loss, and the perplexity, are taken over target tokens only, each predicted from all tokens before it.
        text: the rendered conversation, of which `ids` are the tokens.
        source: where the row stands, "eval.jsonl:3".
        cuts: characters of `text` that no token reaches over, because an answer begins there that would else share a token with its prompt.
    """

    ids: list[int]
    loss_mask: list[bool]
    text: str
    source: str
    cuts: tuple[int, ...] = ()

    @property
    def target_count(self) -> int:
        """The number of target tokens. The first token is predicted from nothing and never counts."""
        return sum(self.loss_mask[1:])
