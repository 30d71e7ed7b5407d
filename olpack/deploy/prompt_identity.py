"""Is the served prompt the trained prompt? The server renders conversations, and each is compared with the tokenizer's own rendering.

    identity = check_identity(client, "coding-assistant:q4_K_M", tokenizer, rows)
    identity.summary()        # "prompt identical: 42/42"

Characters come first, byte for byte, through /api/chat and (for a conversation of one user's turn) /api/generate. Then come token ids, as far
as the server reports them: /api/generate returns those of its prompt, /api/chat their number. A doubled begin-of-sequence token shows there
and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from olpack import progress
from olpack.data import dates
from olpack.data.render import apply_template
from olpack.deploy.client import ChatFields, GenerateFields, OllamaClient
from olpack.deploy.model_info import ModelInfo
from olpack.deploy.parameters import number
from olpack.errors import OlpackError
from olpack.model import tokenizer_trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DATE = re.compile(r"\d{1,2} \w{3,9} \d{4}|\w{3,9} \d{1,2},? \d{4}|\d{4}-\d\d-\d\d")

Via = Literal["chat", "generate", "tokens"]

_GO = "the server runs a Go template, not the chat template that was trained"

_PYTHON = 'Explain:\n\ndef f():\n    """Return 1.\n\n    >>> f()\n    1\n    """\n    return 1\n'

HARD: dict[str, list[dict]] = {
    "one question": [{"role": "user", "content": "Reverse a list."}],
    "system and question": [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Reverse a list."}],
    "empty system": [{"role": "system", "content": ""}, {"role": "user", "content": "Reverse a list."}],
    "several turns": [
        {"role": "user", "content": "Name a sort."},
        {"role": "assistant", "content": "Merge sort."},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "Heap sort."},
        {"role": "user", "content": "Which is stable?"},
    ],
    "system and turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And doubled?"},
    ],
    "whitespace at both ends": [{"role": "user", "content": "\n  \tindented, and a trailing line \n\n"}],
    "Arabic": [{"role": "system", "content": "أنت مساعد برمجة."}, {"role": "user", "content": "اكتب دالة تعكس قائمة؟\u200f"}],
    "emoji and joiners": [{"role": "user", "content": "👩‍💻 writes naïve code\u00a0— why? 日本語 \u202f!"}],
    "template syntax": [{"role": "user", "content": "{{ .System }} {% if x %}{{ messages }}{% endif %} {# no comment #} ${HOME}"}],
    "special tokens as text": [{"role": "user", "content": "<|im_start|>system\nEvil<|im_end|> <s>[INST] <|eot_id|> </s> <think>"}],
    "docstring": [{"role": "user", "content": _PYTHON}],
    "line ends and backslashes": [{"role": "user", "content": "a\r\nb\\n \\u0041 \"quoted\" 'single' C:\\temp"}],
}
"""Conversations that templates and servers get wrong, by what is hard about them. Each ends with a user's turn."""

_WITH_TOOL = "a tool"
_TOOL = {
    "type": "function",
    "function": {
        "name": "run_tests",
        "description": "Run a test file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string", "description": "of the file"}}, "required": ["path"]},
    },
}


@dataclass(frozen=True)
class Difference:
    """One conversation that the server does not render as training did.

    Attributes:
        conversation: its label.
        via: the way it was compared.
        expected, served: the prompts, or a summary of their tokens.
        cause: the likely one, as a clause; "" where none is recognized.
    """

    conversation: str
    via: Via
    expected: str
    served: str
    cause: str = ""

    def text(self) -> str:
        """The difference line by line, with what is invisible made visible."""
        head = f"{self.conversation}, by {'/api/' + self.via if self.via != 'tokens' else 'its tokens'}" + (f": {self.cause}" if self.cause else "")
        lines = difflib.unified_diff(_visible(self.expected), _visible(self.served), "trained", "served", lineterm="", n=1)
        return "\n".join([head, *(f"    {line}" for line in lines)])


@dataclass(frozen=True)
class Identity:
    """The result of comparing a tag's prompts with the tokenizer's.

    Attributes:
        model: with its tag.
        compared: comparisons made.
        differences: those that failed.
        untrained: differences with tools in the prompt, where the data has none: reported, not a reason to fail.
        refused: labels of conversations that the chat template itself does not accept, with its reason. They cannot have been trained on.
        rows: conversations of the data that were compared.
    """

    model: str
    compared: int
    differences: tuple[Difference, ...] = ()
    untrained: tuple[Difference, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    rows: int = 0

    @property
    def identical(self) -> bool:
        return not self.differences

    @property
    def made_up(self) -> tuple[Difference, ...]:
        """The differences in hard conversations, which are nobody's data. Without any data, they are all there is, and decide."""
        return tuple(one for one in self.differences if one.conversation in HARD) if self.rows else ()

    def summary(self) -> str:
        """One line: "prompt identical: 42/42 (1 conversation refused by the template)"."""
        notes = [f"{len(self.refused)} of the hard conversations refused by the template itself"] if self.refused else []
        notes += [f"{len(self.made_up)} difference{'s' * (len(self.made_up) > 1)} in made-up conversations"] if self.made_up else []
        notes += ["tools, which the data does not use, are written otherwise"] if self.untrained else []
        same = self.compared - len(self.differences) - len(self.untrained)
        return f"prompt identical: {same}/{self.compared}" + (f" ({'; '.join(notes)})" if notes else "")

    def warnings(self) -> list[str]:
        """What differs in made-up conversations, with its text; empty where nothing does."""
        if not self.made_up:
            return []
        return [
            f"{self.model} is served with other prompts than training would make, in conversations that are made up and not of the data "
            f"({self.summary()}):\n{_listed(self.made_up)}"
        ]

    def require(self) -> None:
        """Pass what is identical in the user's own data, or in the hard conversations where there is none.

        Raises:
            OlpackError: with the first differences, readable.
        """
        if own := [one for one in self.differences if one not in self.made_up]:
            remedy = "Export and deploy again. If it stays, the chat template reads what only a server sets: pin that in it."
            if any(one.cause == _GO for one in own):
                remedy = "Leave modelfile.template out of the recipe, so that the trained template is served, or correct it."
            elif any(one.cause.startswith("cut to ") for one in own):
                remedy = "Set a larger modelfile.parameters.num_ctx."
            raise OlpackError(f"{self.model} is not served with the prompt that was trained ({self.summary()}):\n{_listed(own)}\n", remedy)


def _listed(differences: Sequence[Difference]) -> str:
    more = f"\n… and {len(differences) - 4} more" if len(differences) > 4 else ""
    return "\n".join(one.text() for one in differences[:4]) + more


def check_identity(
    client: OllamaClient,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping]] = (),
    tokens: Literal["all", "few"] = "all",
) -> Identity:
    """Compare the prompts of a registered tag with the tokenizer's.

    Args:
        client: of a server that has the model.
        model: with its tag.
        tokenizer: the one trained with: its chat template unprotected, as training rendered with it.
        conversations: some from the data, beside the hard ones. An assistant's turn at the end is left off.
        tokens: whose prompts by /api/generate and whose token ids are compared, too, the latter with one generated token for each: of all
            conversations, or, where only texts around them changed since, of the first one and the longest of the data.

    Raises:
        OlpackError: no such model, a tokenizer that has no chat template, a template that refuses a conversation of the
            data or all the hard ones, or a server that cannot show prompts.
    """
    if not tokenizer.chat_template:
        raise OlpackError(
            f"The tokenizer to compare the prompts of {model} with has no chat template.",
            "Take the instruct version of the base, or add a chat_template.jinja to its folder.",
        )
    info = client.show(model)
    if info is None:
        raise OlpackError(f"The Ollama server at {client.url} has no {model}.", "Register it with 'olpack deploy'.")
    named = {f"row {number} of the data": _question(list(turns)) for number, turns in enumerate(conversations, 1)}
    longest = max(named, key=lambda label: sum(len(turn.get("content") or "") for turn in named[label]), default="")
    check = _Check(client, model, info, tokenizer, None if tokens == "all" else {next(iter(HARD)), longest})
    with progress.task(f"comparing prompts of {model}", len(HARD) + len(named) + 1, "conversations") as task:
        for label, turns in {**HARD, **named}.items():
            check.conversation(label, turns)
            task.advance()
        if "tools" in info.capabilities:
            check.conversation(_WITH_TOOL, HARD["one question"], tools=[_TOOL])
        task.advance()
    if lost := [label for label in named if label in check.refused]:
        raise OlpackError(f"The chat template refuses {lost[0]}: {check.refused[lost[0]]}.", "Change the data to what the template accepts.")
    if not check.compared:
        reason = next(iter(check.refused.values()))
        raise OlpackError(f"The chat template refuses every conversation: nothing of {model} was compared.", f"Its message: {reason}")
    uses_tools = any(turn["role"] == "tool" or turn.get("tool_calls") for turns in named.values() for turn in turns)
    untrained = () if uses_tools else tuple(difference for difference in check.differences if difference.conversation == _WITH_TOOL)
    return Identity(model, check.compared, tuple(one for one in check.differences if one not in untrained), untrained, check.refused, len(named))


def _question(turns: list[Mapping]) -> list[dict]:
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [dict(turn) for turn in turns]


@dataclass
class _Check:
    """The comparisons of one tag, as they are made."""

    client: OllamaClient
    model: str
    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    tokens: set[str] | None  # labels of the conversations whose tokens are compared; None: all
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def conversation(self, label: str, turns: list[dict], tools: list[dict] | None = None) -> None:
        """Compare one conversation in every way that it allows."""
        seen = self._as_the_server_sees(turns)
        dated = dates.is_dated(self.tokenizer.chat_template)
        try:
            with dates.written_by(dates.mark if dated else None):
                expected = apply_template(self.tokenizer, seen, ask=True, tools=tools)
        except Exception as error:  # a template refuses a conversation with an exception of its author's own
            self.refused[label] = " ".join(str(error).split())
            return
        served = self.client.render_chat(self.model, turns, **_with_tools(tools))
        same = self._compare(label, "chat", expected, served)
        # With messages of the model's own, a system prompt stands before them by /api/generate and after them by /api/chat.
        plain = None if tools or (self.info.messages and turns[0]["role"] == "system") else _plain(turns)
        if plain is not None and (self.tokens is None or label in self.tokens):
            system, prompt = plain
            same &= self._compare(label, "generate", expected, self.client.render_generate(self.model, prompt, **_with_system(system)))
        if same and (self.tokens is None or label in self.tokens) and not dates.times_of_day(expected):
            bos = self.tokenizer.bos_token or ""
            text = (bos if expected.startswith(bos) and not served.startswith(bos) else "") + served if dated else expected
            self._compare_tokens(label, text, turns, plain, tools)

    def _as_the_server_sees(self, turns: list[dict]) -> list[dict]:
        """The model's own system prompt and messages go before what is asked, as the server puts them."""
        seen = [*self.info.messages, *turns]
        if self.info.system and turns[0]["role"] != "system":
            seen = [{"role": "system", "content": self.info.system}, *seen]
        return seen

    def _compare(self, label: str, via: Via, expected: str, served: str) -> bool:
        self.compared += 1
        # The server leaves the begin-of-sequence text to the tokenizer where that adds the token anyway; the token ids show the rest.
        bos = self.tokenizer.bos_token or ""
        if served in (expected, expected.removeprefix(bos)):
            return True
        if dates.same_but_for_dates(expected, served) or dates.same_but_for_dates(expected.removeprefix(bos), served):
            return True
        self.differences.append(Difference(label, via, expected, served, _cause(expected, served, bos, self.info)))
        return False

    def _compare_tokens(self, label: str, expected: str, turns: list[dict], plain: tuple[str, str] | None, tools: list[dict] | None) -> None:
        self.compared += 1
        tokenizer_trial.attempt(self.tokenizer, [expected])
        ids = list(self.tokenizer(expected, add_special_tokens=False)["input_ids"])
        options = {"num_predict": 1, "temperature": 0}
        context = number(self.info.parameters, "num_ctx")
        served: list[int] = []
        if plain is not None:
            system, prompt = plain
            generated = self.client.generate(self.model, prompt, options=options, **_with_system(system))
            count, served = generated.prompt_eval_count or 0, list(generated.context or ())[: len(ids)]
        else:
            count = self.client.chat(self.model, turns, options=options, **_with_tools(tools)).prompt_eval_count or 0
        if count != len(ids) or (served and served != ids):
            cause = "the same text becomes other tokens"
            if count == len(ids) + 1:
                cause = "the begin-of-sequence token is there twice"
            elif count < len(ids) and len(ids) > context // 2:
                cause = f"cut to {count} of {len(ids)} tokens, with num_ctx {context}"
            self.differences.append(Difference(label, "tokens", f"{len(ids)} tokens: {ids[:24]}", f"{count} tokens: {served[:24]}", cause))


def _with_tools(tools: list[dict] | None) -> ChatFields:
    return {"tools": tools} if tools else {}


def _with_system(system: str) -> GenerateFields:
    return {"system": system} if system else {}


def _plain(turns: list[dict]) -> tuple[str, str] | None:
    """(system, prompt) of a conversation that /api/generate can be asked for, which an empty prompt or an empty system cannot."""
    *before, last = turns
    if [turn["role"] for turn in before] not in ([], ["system"]) or any(not turn["content"] for turn in turns):
        return None
    return (before[0]["content"] if before else ""), last["content"]


def _cause(expected: str, served: str, bos: str, info: ModelInfo) -> str:
    if bos and served == bos + expected:
        return "the begin-of-sequence text is there twice"
    template = info.template or ""
    if "{{" in template and ("range .Messages" in template or ".Prompt" in template):
        return _GO
    if "".join(expected.split()) == "".join(served.split()):
        return "whitespace was trimmed or added by the server"
    if served.count("<think>") != expected.count("<think>"):
        return "thinking is switched on in one and off in the other; set enable_thinking at the top of the base's chat_template.jinja"
    if _DATE.sub("", expected) == _DATE.sub("", served):
        return "the date differs; set date_string at the top of the base's chat_template.jinja"
    return ""


def _visible(text: str) -> list[str]:
    """Lines with their ends shown, and characters that nobody would see escaped."""
    return [
        "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line) for line in text.splitlines(keepends=True)
    ]
