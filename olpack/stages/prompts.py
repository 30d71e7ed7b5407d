"""What quants are asked: the recipe's prompts, or the requests of held-out chats."""

from __future__ import annotations

from olpack.errors import OlpackError
from olpack.stages.build import Build

_ANSWERED = 3  # held-out requests that every quant answers where the recipe has no prompts


def questions(build: Build) -> list[list[dict]]:
    """Conversations that every quant answers: the recipe's prompts under its system prompt, or the first held-out requests as they are."""
    if not build.recipe.compare.prompts:
        return held_out_requests(build)[:_ANSWERED]
    system = [{"role": "system", "content": build.recipe.modelfile.system}] if build.recipe.modelfile.system else []
    return [[*system, {"role": "user", "content": prompt}] for prompt in build.recipe.compare.prompts]


def check_questions(build: Build) -> None:
    """Refuse a package whose quants could be asked nothing."""
    if not questions(build):
        raise OlpackError("No held-out row opens with a request, so there is nothing to ask the quants.", "Give them prompts as `compare.prompts`.")


def held_out_requests(build: Build) -> list[list[dict]]:
    """The turns of each held-out chat up to its first answer. Chats that open with an answer are left out."""
    from olpack.data import request_of

    return [request for chat in build.held_out_chats if (request := request_of(chat.messages))]


def examples(build: Build) -> list[tuple[str, str]]:
    """(request, answer) of the first turn of each held-out chat that opens with a request and is answered in words, not by a tool call."""
    from olpack.data import request_of

    chats = [(chat.messages, request) for chat in build.held_out_chats if (request := request_of(chat.messages))]
    pairs = [(request[-1]["content"], messages[len(request)]["content"]) for messages, request in chats]
    return [(request, answer) for request, answer in pairs if answer]
