"""The chat template with which a base is trained so that its prompts are those of a model that the server has already.

    template = served_template(find_tag("llama3.2:3b"), tokenizer)

A model of Ollama's library is mostly served with a Go template, and a GGUF's own Jinja with variables that only a server sets. An adapter is trained
for the prompts that are served, so a Jinja template is looked for that writes them: the GGUF's own, the same with the server's variables
set, or one put together from what the server writes around each turn. None is taken because it looks right: the server renders the hard
conversations, and every one of them must be the same, in its tokens too. What was verified is kept in the user's cache.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from olpack import bounded_json, progress
from olpack.data.render import apply_template
from olpack.deploy.client import OllamaClient
from olpack.deploy.prompt_identity import HARD, check_identity
from olpack.deploy.tag_bases import ServedTag
from olpack.errors import OlpackError
from olpack.model.chat_template import SERVER_VARIABLES, pins_for
from olpack.workspace import make_user_cache, user_cache, value_digest, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1  # raised when the same tag would get another template
_TEMPLATE_LAYER = "application/vnd.ollama.image.template"
_SYSTEM, _QUESTION, _ANSWER, _SECOND = (f"olpack{word}" for word in ("system", "question", "answer", "second"))
_VALUES = ("true", "false", 'strftime_now("%d %b %Y")', 'strftime_now("%Y-%m-%d")')  # that a server may set a variable to


def served_template(tag: ServedTag, tokenizer: PreTrainedTokenizerFast) -> str:
    """Jinja that writes the prompts with which the server serves a model.

    Args:
        tag: the model.
        tokenizer: of its GGUF, with the GGUF's own template if it has one.

    Raises:
        OlpackError: no server answers to compare with, or no template writes what the server writes.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    key = value_digest([_VERSION, tag.blob, _identity(tag), own])
    place = user_cache() / "served" / f"{key[:32]}.json"
    try:
        known = bounded_json.read_object(place, "").get("template")
        if isinstance(known, str) and known:
            return known
    except OlpackError:
        pass
    if tag.info is None:
        return _unanswered(tag, own)
    client = OllamaClient()
    progress.say(f"comparing the prompts of {tag.name} with chat templates, once")
    found = _verified(client, tag, tokenizer, own)
    make_user_cache()
    write_atomically(place, json.dumps({"model": tag.name, "template": found}))
    return found


def _identity(tag: ServedTag) -> object:
    """What decides a tag's prompts beside its weights: the digests of its manifest's parts, or what the server shows of it."""
    if tag.manifest:
        return [[layer.get("mediaType"), layer.get("digest")] for layer in [tag.manifest.get("config") or {}, *tag.manifest["layers"]]]
    return [tag.info.template, tag.info.system, list(tag.info.messages)] if tag.info else None


def _unanswered(tag: ServedTag, own: str) -> str:
    """Without a server: the GGUF's own template, where the store shows that it is served and it reads nothing that only a server sets."""
    layers = {layer.get("mediaType") for layer in tag.manifest.get("layers", [])}
    if own and layers and _TEMPLATE_LAYER not in layers and not set(pins_for(own)) & set(SERVER_VARIABLES):
        return own
    raise OlpackError(
        f"No Ollama server answers, so it is not known how the prompts of {tag.name} are written.",
        "Start it with `ollama serve`: olpack compares its prompts once."
        + (" Or set `package: merged`, which serves the GGUF's own chat template." if own else ""),
    )


def _verified(client: OllamaClient, tag: ServedTag, tokenizer: PreTrainedTokenizerFast, own: str) -> str:
    rendered = {label: client.render_chat(tag.name, turns) for label, turns in HARD.items()}
    nearest, read_otherwise = ("", "", ""), ""
    for template in [*_of_gguf(own), *_put_together(client, tag, tokenizer)]:
        candidate = copy.copy(tokenizer)
        candidate.chat_template = template
        if difference := _first_difference(candidate, tag, rendered):
            nearest = difference
            continue
        identity = check_identity(client, tag.name, candidate)
        if identity.identical:
            return template
        read_otherwise = identity.differences[0].text()
    if read_otherwise:
        raise OlpackError(
            f"The server reads prompts of {tag.name} as other tokens than training does:\n{read_otherwise}\n",
            "Take the folder of the model as base, and report this with the model's name.",
        )
    label, expected, served = nearest
    raise OlpackError(
        f"The server writes the prompts of {tag.name} as no chat template does that olpack can train with: of the conversation '{label}' it makes "
        f"{_short(served)}, and the nearest template {_short(expected)}.",
        "Set `package: merged`, which serves the GGUF's own chat template."
        if own
        else "Take the model's GGUF from another publisher, which has a chat template.",
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:120]}…")


def _of_gguf(own: str) -> Iterator[str]:
    """The GGUF's own template, also with one value for each variable that a server sets."""
    if not own:
        return
    yield own
    named = sorted(set(pins_for(own)) & set(SERVER_VARIABLES))
    for value in _VALUES if named else ():
        yield "".join(f"{{%- set {name} = {value} -%}}" for name in named) + own


def _first_difference(tokenizer: PreTrainedTokenizerFast, tag: ServedTag, rendered: dict[str, str]) -> tuple[str, str, str] | None:
    """(label, expected, served) of the first conversation that a template writes otherwise; None where it accepts most and writes all as served."""
    accepted = 0
    bos = tokenizer.bos_token or ""
    for label, served in rendered.items():
        turns = HARD[label]
        system = [{"role": "system", "content": tag.info.system}] if tag.info and tag.info.system and turns[0]["role"] != "system" else []
        try:
            expected = apply_template(tokenizer, [*system, *(tag.info.messages if tag.info else ()), *turns], ask=True, tools=None)
        except Exception as error:  # a template refuses a conversation with an exception of its author's own
            refused = label, f"a refusal ({' '.join(str(error).split())})", served
            continue
        if served not in (expected, expected.removeprefix(bos)):
            return label, expected, served
        accepted += 1
    return None if accepted >= len(rendered) - 2 else refused


def _put_together(client: OllamaClient, tag: ServedTag, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Templates from what the server writes before, between and behind the turns of short conversations."""

    def turns(*contents: str) -> list[dict]:
        roles = {_SYSTEM: "system", _ANSWER: "assistant"}
        return [{"role": roles.get(content, "user"), "content": content} for content in contents]

    shapes = [(_QUESTION,), (_SYSTEM, _QUESTION), (_QUESTION, _ANSWER, _SECOND)]
    parts = [_between(client.render_chat(tag.name, turns(*shape)), shape) for shape in shapes]
    if not all(parts):
        return
    (begin, ask), (before_system, after_system, _), (_, answer, again, _) = parts
    special = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    ends = [(again.find(token), token) for token in special if token and token in again]
    if not ends:
        return
    at, token = min(ends, key=lambda end: (end[0], -len(end[1])))
    adds = list(tokenizer("")["input_ids"])
    bos = tokenizer.bos_token if tokenizer.bos_token and adds[:1] == [tokenizer.bos_token_id] else ""
    opening = "" if not bos or begin.startswith(bos) else bos
    for content in ("message.content", "message.content | trim"):
        for given in ("true", "messages[0].content"):
            yield _template(opening, begin, before_system, after_system, answer, again, again[: at + len(token)], ask, content, given)


def _between(text: str, contents: tuple[str, ...]) -> list[str]:
    """What stands before, between and behind some texts, each of which must be there once and in order; empty where that is not so."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return []
        pieces.append(before)
    return [*pieces, text]


def _template(
    opening: str, begin: str, before_system: str, after_system: str, answer: str, again: str, end: str, ask: str, content: str, given: str
) -> str:
    """The Jinja of one way to write turns.

    Args:
        opening: the begin-of-sequence token, where the server leaves it to the tokenizer.
        begin: before the first question, without a system prompt.
        before_system, after_system: around a system prompt; what follows it is the first question.
        answer: between a question and its answer.
        again: between an answer and the next question.
        end: the part of `again` that ends the answer.
        ask: behind the last question, where an answer is asked for.
        content: the expression of a turn's text.
        given: the condition, beside its role, under which the first turn is written as a system prompt.
    """
    texts = {
        "opening": opening,
        "begin": begin,
        "before": before_system,
        "after": after_system,
        "answer": answer,
        "again": again,
        "end": end,
        "ask": ask,
    }
    one = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    system = content.replace("message.", "messages[0].")
    return (
        "{%- if tools %}{{ raise_exception('no tools are known here') }}{%- endif -%}"
        f"{{{{- {one['opening']} -}}}}"
        "{%- set ns = namespace(rest=messages) -%}"
        "{%- if messages[0].role == 'system' -%}{%- set ns.rest = messages[1:] -%}{%- endif -%}"
        f"{{%- if messages[0].role == 'system' and {given} -%}}"
        f"{{{{- {one['before']} + ({system}) + {one['after']} -}}}}"
        f"{{%- else -%}}{{{{- {one['begin']} -}}}}{{%- endif -%}}"
        "{%- for message in ns.rest -%}"
        "{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        "{{- raise_exception('user and assistant must take turns') -}}{%- endif -%}"
        f"{{{{- {content} -}}}}"
        f"{{%- if message.role == 'assistant' -%}}{{{{- {one['end']} if loop.last else {one['again']} -}}}}"
        f"{{%- elif not loop.last -%}}{{{{- {one['answer']} -}}}}"
        f"{{%- elif add_generation_prompt -%}}{{{{- {one['ask']} -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )
