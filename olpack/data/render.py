"""From chats to token rows, through the model's own chat template.

The loss mask is found by rendering prefixes of the conversation: what `messages[:i + 1]` adds to `messages[:i]` with the
generation prompt is the assistant's turn. No generation markers in the template are needed (most published ones have none).

Some templates write an earlier turn otherwise than it was answered: Qwen3's drop the thinking of all but the last. Such a chat becomes several
rows. Each ends with one answer, after exactly what the server sends when it asks for that answer, and every answer's tokens are targets once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING

from olpack.data.dates import written_by
from olpack.data.rows import Chat, Learn, TokenRow
from olpack.errors import OlpackError
from olpack.model import tokenizer_trial
from olpack.templating import Exceeded, bounded

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message, in the order of transformers
_PROBE = "olpack"  # stands for reasoning, to see where a template writes it
_PAIRS = (  # marks that open a block at the end of a generation prompt, and what closes it
    (r"<(\w[\w:.-]*)>", r"</\1>"),
    (r"\[([A-Z_]+)\]", r"[/\1]"),
    (r"<\|(START|BEGIN)_(\w+)\|>", r"<|END_\2|>"),
    (r"<\|(\w+)_(start|begin)\|>", r"<|\1_end|>"),
    (r"<\|(\w+)>[a-z]*", r"<\1|>"),
)
_BLOCK = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL)
_AT_ONCE = 256  # chats that are tokenized together
_MOST_CHARACTERS = 1 << 23  # of a row, and of rows that are tokenized together: a tokenizer takes 15 bytes for each
_SECONDS = 5.0  # that the template may take for one conversation


@dataclass(frozen=True)
class _Written:
    """The text of one row, which characters of it are targets, as (start, end) of each part, the last one first, and where no token reaches over."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    cuts: tuple[int, ...] = ()


class TemplateExceeded(OlpackError):
    """A chat template takes too long or too much memory, whatever the row."""


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], *, ask: bool, tools: list[dict] | None) -> str:
    """One conversation as the tokenizer's chat template writes it; with `ask`, up to where the assistant's answer begins.

    Raises:
        TemplateExceeded: the template exceeds a bound.
        OlpackError: the text is too long to be tokenized.
        Exception: whatever the template raises.
    """
    try:
        with bounded(_SECONDS):
            text = tokenizer.apply_chat_template(
                [_under_all_names(message) for message in messages],
                tools=None if tools is None else [*tools],
                tokenize=False,
                add_generation_prompt=ask,
            )
    except (Exceeded, MemoryError) as error:
        why = str(error) if isinstance(error, Exceeded) else "it takes too much memory"
        raise TemplateExceeded(f"The base's chat template fails: {why}.", "Take a base with another chat template, or fix it.") from None
    assert isinstance(text, str)  # of one conversation, without tokenizing
    if len(text) > _MOST_CHARACTERS:
        raise OlpackError(
            f"the base's chat template makes {len(text):,} characters of it, and at most {_MOST_CHARACTERS:,} are read.", "Shorten or remove the row."
        )
    return text


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
            raise OlpackError(
                "The base has only a slow tokenizer, which does not report where its tokens stand in the text.",
                "Save it as a fast one: a tokenizer.json beside the weights.",
            )
        if not tokenizer.chat_template:
            raise OlpackError(
                "The base's tokenizer has no chat template, so it is not known how a conversation is written for it.",
                "Take the instruct version of the base, or add a chat_template.jinja to its folder.",
            )
        self.tokenizer = tokenizer
        self.learn = learn
        self.moment = moment
        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.end_ids = {tokenizer.eos_token_id, *(end_ids or []), *special} - {None}

    def text(self, messages: list[dict], *, ask: bool = False, tools: list[dict] | None = None) -> str:
        """The conversation as the template writes it; with `ask`, up to where the assistant's answer begins."""
        with written_by(self.moment.strftime if self.moment else None):
            return apply_template(self.tokenizer, messages, ask=ask, tools=tools)

    def written_otherwise(self, chat: Chat, template: str) -> bool:
        """Whether another chat template of the same tokenizer writes a chat as another text, or refuses it."""
        if chat.text is not None:
            return False
        tokenizer = copy(self.tokenizer)
        tokenizer.chat_template = template
        try:
            with written_by(self.moment.strftime if self.moment else None):
                text = apply_template(tokenizer, list(chat.messages), ask=False, tools=chat.tools)
        except Exception:  # a template raises whatever its author wrote
            return True
        return text != self.text(list(chat.messages), tools=chat.tools)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins."""
        text = self.text(messages, ask=True)
        tokenizer_trial.attempt(self.tokenizer, [text])
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def rows(self, chat: Chat) -> list[TokenRow]:
        """One chat as token rows: one, or several where the template rewrites earlier turns, in the order of the turns.

        Target tokens are those of every assistant's turn (or of the last), up to and including the token that ends it; those of its tool calls
        too, but not those of what the tools answer. Of a plain text all tokens are target tokens, and an end token is added.

        Raises:
            OlpackError: the template refuses the conversation, leaves out a part of an answer, or leaves no target token.
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
            tokens = self._encoded(texts)
            for chat, parts in zip(some, written, strict=True):
                if isinstance(parts, OlpackError):
                    yield parts
                    continue
                names = [f"{chat.source} ({at} of {len(parts)})" for at in range(1, len(parts) + 1)] if len(parts) > 1 else [chat.source]
                rows = [self._marked(part, *next(tokens), name) for part, name in zip(parts, names, strict=True)]
                lost = next((row for row in rows if not row.target_count), None)
                yield (
                    OlpackError(f"{lost.source}: the rendered row has no target tokens.", "Give the assistant an answer, or remove the row.")
                    if lost
                    else rows
                )

    def _encoded(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, offsets) of each text; many texts are tokenized together, as many as memory takes."""
        first = 0
        while first < len(texts):
            last, length = first, 0
            while last < len(texts) and (last == first or length + len(texts[last]) <= _MOST_CHARACTERS):
                length += len(texts[last])
                last += 1
            tokenizer_trial.attempt(self.tokenizer, texts[first:last])
            encoded = self.tokenizer(
                texts[first:last], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
            yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            first = last

    def end_of_turn(self) -> str | None:
        """The special token with which the template ends an assistant's turn; None where it ends it in another way."""
        row = self.rows(Chat([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}], "a greeting"))[-1]
        last = max(index for index, is_target in enumerate(row.loss_mask) if is_target)
        token = self.tokenizer.convert_ids_to_tokens(row.ids[last])
        return token if row.ids[last] in self.end_ids and isinstance(token, str) else None

    def _written(self, chat: Chat) -> list[_Written] | OlpackError:
        try:
            return self._plain(chat.text) if chat.text is not None else self._turns(chat)
        except TemplateExceeded:
            raise
        except OlpackError as error:
            return OlpackError(f"{chat.source}: {error.problem}", error.remedy)
        except Exception as error:  # a template raises whatever its author wrote
            return OlpackError(
                f"{chat.source}: the base's chat template refuses this conversation: {error}",
                "Change the row's roles or their order to what the template accepts.",
            )

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
        messages, tools = self._with_marks(chat), chat.tools
        turns = [index for index in range(max(chat.context, 1), len(messages)) if _is_target(messages[index])]
        rows: list[_Written] = []
        for index in reversed(turns[-1:] if self.learn == "last" else turns):
            begin, until = self._served(messages[:index], messages[index], tools)
            span = begin, len(until)
            self._refuse_dropped(messages[index], tools, until, span[0])
            if not rows or not rows[-1].text.startswith(until):
                rows.append(_Written(until))
            rows[-1].spans.append(span)
        if not rows:
            raise OlpackError(
                "it has no target tokens: the assistant's turns are first in the conversation, or have the weight 0.",
                "Give the assistant something to answer, or remove the row.",
            )
        return rows[::-1]

    def _with_marks(self, chat: Chat) -> list[dict]:
        """The messages, those with reasoning in their text in the way that the template takes it.

        Where the generation prompt opens the reasoning, what a model writes has no mark that opens it. Some templates look for both marks, and
        some for a field of the message.
        """
        messages = list(chat.messages)
        for index, message in enumerate(messages):
            if index and message["role"] == "assistant" and re.search(r"</|\[/|\|>", message["content"]) and not _reasoning(message):
                messages[index] = self._with_mark(messages[:index], message, chat.tools)
        return messages

    def _with_mark(self, messages: list[dict], message: dict, tools: list[dict] | None) -> dict:
        """One answer so written that the template puts it behind the generation prompt, with no mark twice; itself where that is not found."""
        asked, content = self.text(messages, ask=True, tools=tools), message["content"]
        opened = _opened(asked)
        if not opened or opened.end not in content:
            return message
        reasoning, _, answer = content.partition(opened.end)
        restored = [] if opened.begin in reasoning else [{**message, "content": opened.text + content}]
        parted = {**message, "content": answer.lstrip("\n"), "reasoning_content": reasoning.rpartition(opened.begin)[2].strip("\n")}
        for other in (message, *restored, parted):
            whole = self.text([*messages, other], tools=tools)
            behind = whole[len(asked) :]
            if whole.startswith(asked) and behind.count(opened.end) == content.count(opened.end) and opened.begin not in behind:
                return other
        return message

    def _served(self, messages: list[dict], message: dict, tools: list[dict] | None) -> tuple[int, str]:
        """Where an answer begins, and the conversation as it stands once the answer was served: what the server sends, and the answer behind it.

        Args:
            messages: those before the answer.
            message: the answer.
        """
        asked, whole = self.text(messages, ask=True, tools=tools), self.text([*messages, message], tools=tools)
        if whole.startswith(asked):
            return len(asked), whole
        # The generation prompt writes more than the turn itself does, such as an empty thinking block. The turn is put together from both.
        plain = [self.text([*messages, {"role": "assistant", "content": letter}], tools=tools) for letter in "ab"]
        header = _shared(*plain)
        before, part = self.text(messages, tools=tools), min(_shared(asked, whole), header)
        if part < max(_shared(before, asked), _shared(before, whole)):
            raise OlpackError(
                "the base's chat template writes the turns before an answer otherwise once it is given, so training would not see what is served.",
                "Take a base with another chat template, or fix its chat_template.jinja.",
            )
        ending = plain[0][header + 1 :] if plain[0][header:].startswith("a") else None
        as_plain = whole.startswith(plain[0][:header])
        opened, reasoning, content = _opened(asked), _reasoning(message), message["content"]
        inside = opened if opened is not None and opened.end in content else None
        if not reasoning and not inside and (empty := self._without_reasoning(messages, message, tools, asked)):
            return len(asked), empty
        if inside and ending is not None and not message.get("tool_calls"):
            head, _, rest = content.partition(inside.begin)
            answer = content if inside.end in head or not rest else rest.removeprefix(inside.text.removeprefix(inside.begin))
            return len(asked), asked + answer + ending
        if opened and ending is not None and as_plain:
            return len(asked), f"{asked}{reasoning}\n{opened.end}\n\n{whole[header:]}"
        return len(asked), asked + _beyond(asked, whole, part, header if as_plain else None)

    def _without_reasoning(self, messages: list[dict], message: dict, tools: list[dict] | None, asked: str) -> str | None:
        """The conversation with an answer whose reasoning is empty, from what the template writes around reasoning; None where it writes none."""
        whole = self.text([*messages, {**message, "reasoning_content": _PROBE}], tools=tools)
        behind = whole[len(asked) :]
        return asked + behind.replace(_PROBE, "", 1) if whole.startswith(asked) and behind.lstrip().startswith(_PROBE) else None

    def _refuse_dropped(self, message: dict, tools: list[dict] | None, text: str, begin: int) -> None:
        """Templates that know no tools, or no reasoning, leave them out without an error."""
        written = [_reasoning(message), *(block[2] for block in _BLOCK.finditer(message["content"]))]
        if any(reasoning.strip() not in text[begin:] for reasoning in written):
            raise OlpackError(
                "the base's chat template does not write the reasoning of an answer, so the model would not see it.",
                "Take a base whose template knows reasoning, write it as plain text, or remove it.",
            )
        for what, names, place in (
            ("`tools` of a row", [tool["function"]["name"] for tool in tools or []], 0),
            ("tool calls of an answer", [call["function"]["name"] for call in message.get("tool_calls", [])], begin),
        ):
            if any(text.find(name, place) < 0 for name in names):
                raise OlpackError(
                    f"the base's chat template does not write the {what}, so the model would not see them.",
                    "Take a base whose template knows tools, or write them as text.",
                )

    def tokens(self, text: str, cuts: tuple[int, ...] = ()) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text, and the characters (start, end) that each stands for; no token reaches over a cut."""
        ids, offsets = [], []
        places = list(pairwise([0, *cuts, len(text)]))
        tokenizer_trial.attempt(self.tokenizer, [text[start:end] for start, end in places])
        for start, end in places:
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
        loss_mask = [False] * len(ids)
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
            loss_mask[first:last] = [True] * (last - first)
        return TokenRow(ids, loss_mask, text, source, cuts)


def pieces(row: TokenRow, renderer: Renderer, by_kind: bool = True) -> Iterator[tuple[str, bool, bool]]:
    """(text, is_target, special) of each run of tokens of one kind; joined, their texts are the row's text."""
    _, offsets = renderer.tokens(row.text, row.cuts)
    kinds = [(is_target, by_kind and number in renderer.end_ids) for number, is_target in zip(row.ids, row.loss_mask, strict=True)]
    at = 0
    for kind, run in groupby(zip(kinds, offsets, strict=True), key=lambda pair: pair[0]):
        *_, (_, (_, end)) = run
        yield row.text[at:end], *kind
        at = end
    if at < len(row.text):
        yield row.text[at:], False, False


def _begins_within(start: int, offsets: list[tuple[int, int]], ends: list[int]) -> bool:
    """Whether a character stands inside of a token, and not at its beginning."""
    at = bisect_right(ends, start)
    return at < len(offsets) and offsets[at][0] < start


@dataclass(frozen=True)
class _Opened:
    """A block that a generation prompt leaves open: its mark, the same with the white space behind it, and the mark that closes it."""

    begin: str
    text: str
    end: str


def _opened(asked: str) -> _Opened | None:
    """The block that is open at the end of a generation prompt, None where it ends with no mark."""
    for begin, end in _PAIRS:
        if match := re.search(rf"({begin})\s*\Z", asked):
            return _Opened(match[1], match[0], re.sub(begin, end, match[1]))
    return None


def _beyond(asked: str, whole: str, part: int, header: int | None) -> str:
    """What an answered conversation has beyond a generation prompt that parts from it.

    Args:
        part: where they part.
        header: where the answer's own text begins; None where the template writes its reasoning before it.
    """
    if cut := re.search(r"[<\[][^<>\[\]\s]*\Z", asked[:part]):
        part = cut.start()  # no mark is cut in two
    if header is None:
        mark = _opened(asked[:part])
        return whole[part - len(mark.text) if mark and mark.end in asked[part:] else part :]
    lead = whole[part:header]
    twice = max(size for size in range(len(lead) + 1) if asked.endswith(lead[:size]))
    return lead[twice:] + whole[header:]


def _reasoning(message: dict) -> str:
    """The reasoning that stands in a field of its own, "" where there is none."""
    reasoning = next((message[name] for name in _REASONING if message.get(name)), "")
    return reasoning if isinstance(reasoning, str) else ""


def _under_all_names(message: dict) -> dict:
    """The message with its reasoning under both names that templates read, as transformers gives it to them from 5.21 on."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _is_target(message: dict) -> bool:
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
