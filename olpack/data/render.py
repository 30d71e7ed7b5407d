"""From chats to token rows, through the model's own chat template.

Which tokens are learned is found by rendering prefixes of the conversation: what `messages[:i + 1]` adds to `messages[:i]` with the
generation prompt is the assistant's turn. No generation markers in the template are needed (most published ones have none).
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from olpack.data.rows import Chat, TokenRow
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Renderer:
    """Turns chats into token rows with one tokenizer.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        end_ids: ids that can end an assistant's turn, in addition to the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: list[int] | None = None):
        if not tokenizer.is_fast:
            raise OlpackError("The base has only a slow tokenizer, which cannot say where its tokens stand in the text.",
                              "Save it as a fast one: a tokenizer.json beside the weights.")
        if not tokenizer.chat_template:
            raise OlpackError("The base's tokenizer has no chat template, so it is not known how a conversation is written for it.",
                              "Take the instruct version of the base, or add a chat_template.jinja to its folder.")
        self.tokenizer = tokenizer
        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.end_ids = {tokenizer.eos_token_id, *(end_ids or []), *special} - {None}

    def text(self, messages: list[dict], *, ask: bool = False) -> str:
        """The conversation as the template writes it; with `ask`, up to where the assistant's answer begins."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        return self.tokenizer(self.text(messages, ask=True), add_special_tokens=False)["input_ids"]

    def row(self, chat: Chat) -> TokenRow:
        """One chat as token ids and learned flags.

        Every assistant's turn is learned, up to and including the token that ends it.

        Raises:
            OlpackError: the template refuses the conversation, rewrites earlier turns, or leaves nothing to learn.
        """
        try:
            text = self.text(chat.messages)
            spans = [self._turn(chat.messages, index, text) for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        except OlpackError as error:
            raise OlpackError(f"{chat.source}: {error.problem}", error.remedy) from None
        except Exception as error:  # a template raises whatever its author wrote
            raise OlpackError(f"{chat.source}: the base's chat template refuses this conversation: {error}",
                              "Change the row's roles or their order to what the template accepts.") from None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learned = [False] * len(ids)
        for start, end in spans:
            inside = [i for i, (first, last) in enumerate(offsets) if start <= first < last <= end]
            # What follows the end-of-turn token (a line break, in ChatML) is written by the server, never by the model.
            ends = [i for i in inside if ids[i] in self.end_ids and not text[offsets[i][1] : end].strip()]
            for i in range(inside[0], ends[-1] + 1) if ends else inside:
                learned[i] = True
        row = TokenRow(ids, learned, text, chat.source)
        if not row.learned_count:
            raise OlpackError(f"{chat.source}: the rendered row has no token to learn.", "Give the assistant an answer, or remove the row.")
        return row

    def end_of_turn(self, row: TokenRow) -> str | None:
        """The special token with which the last assistant's turn of a row ends; None where the template ends it in another way."""
        last = max(index for index, learned in enumerate(row.learned) if learned)
        return self.tokenizer.convert_ids_to_tokens(row.ids[last]) if row.ids[last] in self.end_ids else None

    def _turn(self, messages: list[dict], index: int, full: str) -> tuple[int, int]:
        """Characters (start, end) of one assistant's turn in the full text."""
        before = self.text(messages[:index], ask=True)
        after = self.text(messages[: index + 1])
        # A generation prompt can say more than the turn itself does (an empty thinking block): learn from where they part.
        start = _shared(before, after)
        if not full.startswith(after) or start < _shared(self.text(messages[:index]), after):
            raise OlpackError("the base's chat template rewrites earlier turns of this conversation, so training would not see what is served.",
                              "Split the row into one for each assistant's turn.")
        return start, len(after)


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
