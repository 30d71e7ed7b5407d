"""From chats to token rows, through the model's own chat template.

Which tokens are learned is found by rendering prefixes of the conversation: what `messages[:i + 1]` adds to `messages[:i]` with the
generation prompt is the assistant's turn. No generation markers in the template are needed (most published ones have none).

Some templates write an earlier turn otherwise than it was answered: Qwen3's drop the thinking of all but the last. Such a chat becomes several
rows. Each ends with one answer, after exactly what the server sends when it asks for that answer, and every answer is learned once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from olpack.data.rows import Chat, Learn, TokenRow
from olpack.dates import written_by
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PreTrainedTokenizerFast

_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field of a message
_AT_ONCE = 256  # chats that are tokenized together


@dataclass(frozen=True)
class _Written:
    """The text of one row, which characters of it are learned, as (start, end) of each part, the last one first, and where no token reaches over."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    cuts: tuple[int, ...] = ()


class Renderer:
    """Turns chats into token rows with one tokenizer.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        end_ids: ids that can end an assistant's turn, in addition to the tokenizer's special tokens.
        learn: every assistant's turn, or the last one of each chat.
        moment: the time that a chat template which writes it is given; None: the time of each rendering.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: list[int] | None = None, learn: Learn = "all", moment: datetime | None = None):
        if not tokenizer.is_fast:
            raise OlpackError("The base has only a slow tokenizer, which cannot say where its tokens stand in the text.",
                              "Save it as a fast one: a tokenizer.json beside the weights.")
        if not tokenizer.chat_template:
            raise OlpackError("The base's tokenizer has no chat template, so it is not known how a conversation is written for it.",
                              "Take the instruct version of the base, or add a chat_template.jinja to its folder.")
        self.tokenizer = tokenizer
        self.learn = learn
        self.moment = moment
        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.end_ids = {tokenizer.eos_token_id, *(end_ids or []), *special} - {None}

    def text(self, messages: list[dict], *, ask: bool = False, tools: list[dict] | None = None) -> str:
        """The conversation as the template writes it; with `ask`, up to where the assistant's answer begins."""
        with written_by(self.moment and self.moment.strftime):
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer."""
        return self.tokenizer(self.text(messages, ask=True), add_special_tokens=False)["input_ids"]

    def rows(self, chat: Chat) -> list[TokenRow]:
        """One chat as token rows: one, or several where the template rewrites earlier turns, in the order of the turns.

        Every assistant's turn is learned (or the last), up to and including the token that ends it; its tool calls too, but not what the
        tools answer. A plain text is learned from end to end, and an end token is added.

        Raises:
            OlpackError: the template refuses the conversation, leaves out what is to be learned, or leaves nothing to learn.
        """
        made = next(self.batches([chat]))
        if isinstance(made, OlpackError):
            raise made
        return made

    def batches(self, chats: Iterable[Chat]) -> Iterator[list[TokenRow] | OlpackError]:
        """As `rows`, for many chats: the rows of each in turn, or the error that it has."""
        remaining = iter(chats)
        while some := list(islice(remaining, _AT_ONCE)):
            written = [self._written(chat) for chat in some]
            texts = [part.text for parts in written if not isinstance(parts, OlpackError) for part in parts]
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                                     verbose=False) if texts else {"input_ids": [], "offset_mapping": []}  # fmt: skip
            tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for chat, parts in zip(some, written, strict=True):
                if isinstance(parts, OlpackError):
                    yield parts
                    continue
                names = [f"{chat.source} ({at} of {len(parts)})" for at in range(1, len(parts) + 1)] if len(parts) > 1 else [chat.source]
                rows = [self._marked(part, *next(tokens), name) for part, name in zip(parts, names, strict=True)]
                lost = next((row for row in rows if not row.learned_count), None)
                yield OlpackError(f"{lost.source}: the rendered row has no token to learn.",
                                  "Give the assistant an answer, or remove the row.") if lost else rows

    def end_of_turn(self) -> str | None:
        """The special token with which the template ends an assistant's turn; None where it ends it in another way."""
        row = self.rows(Chat([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}], "a greeting"))[-1]
        last = max(index for index, learned in enumerate(row.learned) if learned)
        return self.tokenizer.convert_ids_to_tokens(row.ids[last]) if row.ids[last] in self.end_ids else None

    def _written(self, chat: Chat) -> list[_Written] | OlpackError:
        try:
            return self._plain(chat.text) if chat.text is not None else self._turns(chat)
        except OlpackError as error:
            return OlpackError(f"{chat.source}: {error.problem}", error.remedy)
        except Exception as error:  # a template raises whatever its author wrote
            return OlpackError(f"{chat.source}: the base's chat template refuses this conversation: {error}",
                               "Change the row's roles or their order to what the template accepts.")

    def _plain(self, text: str) -> list[_Written]:
        """A text between the tokens that the tokenizer begins a text with, and the one that ends it."""
        begin, cuts = self._opening
        whole = begin + text + (self.tokenizer.eos_token or "")
        return [_Written(whole, [(0, len(whole))], cuts)]

    @cached_property
    def _opening(self) -> tuple[str, tuple[int, ...]]:
        """What the tokenizer begins a text with; cut off from it, where the tokenizer begins each text with a space that it would lose."""
        tokens = [token for token in self.tokenizer("")["input_ids"] if token != self.tokenizer.eos_token_id]
        begin = "".join(self.tokenizer.convert_ids_to_tokens(tokens))
        alike = self.tokens(f"{begin}a")[0] == self.tokens(f"{begin}a", (len(begin),))[0]
        return begin, () if alike else (len(begin),)

    def _turns(self, chat: Chat) -> list[_Written]:
        """From the last turn to the first: each goes into the row behind it, if that begins just as the turn was served."""
        messages, tools = self._with_opened_reasoning(chat), chat.tools
        turns = [index for index in range(max(chat.context, 1), len(messages)) if _is_learned(messages[index])]
        rows: list[_Written] = []
        for index in reversed(turns[-1:] if self.learn == "last" else turns):
            begin, until = self._served(messages[:index], tools, self.text(messages[: index + 1], tools=tools))
            span = begin, len(until)
            self._refuse_dropped(messages[index], tools, until, span[0])
            if not rows or not rows[-1].text.startswith(until):
                rows.append(_Written(until))
            rows[-1].spans.append(span)
        if not rows:
            raise OlpackError("it has no answer to learn: the assistant's turns are first in the conversation, or have the weight 0.",
                              "Give the assistant something to answer, or remove the row.")
        return rows[::-1]

    def _with_opened_reasoning(self, chat: Chat) -> list[dict]:
        """The messages, those that hold only the mark that closes the reasoning with the one that opens it.

        Where the generation prompt opens it, what a model writes has no such mark. Templates look for both.
        """
        if not any(message["role"] == "assistant" and "</" in message["content"] for message in chat.messages):
            return chat.messages
        first = next(index for index, message in enumerate(chat.messages) if message["role"] == "assistant")
        asked = self.text(chat.messages[:first], ask=True, tools=chat.tools) if first else ""
        opened = re.search(r"<(\w+)>\s*\Z", asked)
        if not opened:
            return chat.messages
        begin, end = f"<{opened[1]}>", f"</{opened[1]}>"
        return [
            {**message, "content": opened[0] + message["content"]}
            if message["role"] == "assistant" and end in message["content"] and begin not in message["content"] and not any(message.get(name) for name in _REASONING)
            else message
            for message in chat.messages
        ]

    def _served(self, messages: list[dict], tools: list[dict] | None, answered: str) -> tuple[int, str]:
        """Where the last turn of a conversation, the assistant's, begins, and the conversation as it stands once that turn was served."""
        asked = self.text(messages, ask=True, tools=tools)
        if answered.startswith(asked):
            return len(asked), answered
        # A generation prompt can say more than the turn itself does (an empty thinking block). Where no turn says it, the answer is trained
        # behind it, as it is served. Where this turn says a part of it, target tokens begin where they part, or where any answer begins, if
        # this one happens to begin with the same letters as that block.
        plain = [self.text([*messages, {"role": "assistant", "content": letter}], tools=tools) for letter in "ab"]
        header = _shared(*plain)
        if asked.startswith(answered[:header]) and plain[0][header:].startswith("a") and len(asked) > header and asked[header:] not in answered:
            return len(asked), asked + answered[header:]
        before, begin = self.text(messages, tools=tools), min(_shared(asked, answered), header)
        if begin < max(_shared(before, asked), _shared(before, answered)):
            raise OlpackError("the base's chat template writes the turns before an answer otherwise once it is given, so training would not see "
                              "what is served.", "Take a base with another chat template, or fix its chat_template.jinja.")
        return begin, answered

    def _refuse_dropped(self, message: dict, tools: list[dict] | None, text: str, begin: int) -> None:
        """Templates that know no tools, or no reasoning, leave them out without a word."""
        reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
        if isinstance(reasoning, str) and reasoning.strip() not in text[begin:]:
            raise OlpackError("the base's chat template does not write the reasoning of an answer, so the model would not see it.",
                              "Take a base whose template knows reasoning, write it into the answer, or remove the field.")
        for what, names, place in (
            ("`tools` of a row", [tool["function"]["name"] for tool in tools or []], 0),
            ("tool calls of an answer", [call["function"]["name"] for call in message.get("tool_calls", [])], begin),
        ):
            if any(text.find(name, place) < 0 for name in names):
                raise OlpackError(f"the base's chat template does not write the {what}, so the model would not see them.",
                                  "Take a base whose template knows tools, or write them as text.")

    def tokens(self, text: str, cuts: tuple[int, ...] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text, and the characters (start, end) that each stands for; no token reaches over a cut."""
        ids, offsets = [], []
        for start, end in pairwise([0, *cuts, len(text)]):
            encoded = self.tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            offsets += [(first + start, last + start) for first, last in encoded["offset_mapping"]]
        return ids, offsets

    def _marked(self, written: _Written, ids: list[int], offsets: list[tuple[int, int]], source: str) -> TokenRow:
        text, cuts = written.text, written.cuts
        if cuts:
            ids, offsets = self.tokens(text, cuts)
        ends = [end for _, end in offsets]
        if within := sorted(start for start, _ in written.spans if _begins_within(start, offsets, ends)):
            # A line break at the beginning of an answer can be one token with the prompt's last one. The server sends the prompt alone.
            apart, places = self.tokens(text, tuple(within))
            if self.tokenizer.decode(apart) == self.tokenizer.decode(ids):  # else the tokenizer begins each text with a space of its own
                ids, offsets, ends, cuts = apart, places, [end for _, end in places], tuple(within)
        learned = [False] * len(ids)
        for start, end in written.spans:
            # Of a token that stands for white space alone, some tokenizers give the place behind it as its beginning and its end.
            first, last = bisect_right(ends, start), bisect_right(ends, end)
            first += _begins_within(start, offsets, ends)
            # What follows the end-of-turn token (a line break, in ChatML) is written by the server, never by the model.
            at = last
            while at > first and not text[ends[at - 1] : end].strip():
                at -= 1
                if ids[at] in self.end_ids:
                    last = at + 1
                    break
            learned[first:last] = [True] * (last - first)
        return TokenRow(ids, learned, text, source, cuts)


def _begins_within(start: int, offsets: list[tuple[int, int]], ends: list[int]) -> bool:
    """Whether a character stands inside of a token, and not at its beginning."""
    at = bisect_right(ends, start)
    return at < len(offsets) and offsets[at][0] < start


def _is_learned(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if other.startswith(one[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
