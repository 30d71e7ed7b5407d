"""What a row of data is, before and after the chat template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chat:
    """One conversation as its file holds it.

    Attributes:
        messages: turns in order, each with at least `role` and `content`.
        source: where it stands, "train.jsonl:17".
    """

    messages: list[dict]
    source: str


@dataclass(frozen=True)
class TokenRow:
    """One conversation as the model sees it.

    Attributes:
        ids: token ids, the special tokens of the chat template included.
        learned: one flag per id: True where the token is part of an assistant's turn (its end-of-turn token included).
            The loss, and the perplexity, are taken over these tokens only, each predicted from all tokens before it.
        text: the rendered conversation, of which `ids` are the tokens.
        source: where the row stands, "eval.jsonl:3".
    """

    ids: list[int]
    learned: list[bool]
    text: str
    source: str

    @property
    def learned_count(self) -> int:
        """How many tokens are learned. The first token is predicted from nothing and never counts."""
        return sum(self.learned[1:])
