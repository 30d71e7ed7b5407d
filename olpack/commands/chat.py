"""`olpack run`: talk to a package, through the Ollama server if it has it, else with the embedded llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError
from olpack.printable import echo

if TYPE_CHECKING:
    from olpack.deploy.answers import Chatted

Answer = Callable[[list[dict]], Iterator[str]]


def talk(model: str, prompt: str | None, out: Path | None) -> None:
    """Answer one prompt, or hold a conversation until end of input.

    Args:
        model: NAME or NAME:TAG.
        prompt: one question; None: questions are read line by line, and earlier turns are remembered.
        out: folder that holds the build.

    Raises:
        OlpackError: neither the server nor the build folder has the model.
    """
    name, _, tag = model.partition(":")
    answer = _served(name, tag) or _embedded(name, tag, out)
    if prompt is not None:
        _print(answer([{"role": "user", "content": prompt}]))
        return
    history: list[dict] = []
    while (line := _ask()) is not None:
        if line.strip():
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": _print(answer(history))})


def _ask() -> str | None:
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input(">>> ")
    except EOFError:
        print()
        return None


def _print(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        echo(piece, end="")
    print()
    return text


def _served(name: str, tag: str) -> Answer | None:
    """Answers of the server, or None where no server has the model."""
    from olpack.deploy import same
    from olpack.deploy.client import OllamaClient

    client = OllamaClient()
    if client.version() is None:
        return None
    model = f"{name}:{tag or 'latest'}"
    if not any(same(listed.model, model) for listed in client.tags()):
        return None
    return lambda messages: _spoken(client.stream_chat(model, messages))


def _spoken(pieces: Iterator[Chatted]) -> Iterator[str]:
    """The text of an answer. Reasoning that the server sets apart goes to stderr, and so does why it broke an answer off."""
    last, thinking = None, False
    for last in pieces:
        if thought := last.message.thinking:
            echo(thought, end="", err=True)
        elif thinking:
            print(file=sys.stderr)
        thinking = bool(thought)
        yield last.message.content or ""
    if thinking:
        print(file=sys.stderr)
    if last is not None and not last.done:
        progress.warn("The server broke off the answer, as it does where a model repeats one token.")


def _embedded(name: str, tag: str, out: Path | None) -> Answer:
    """Answers of a GGUF in the build folder, with the system prompt and the parameters of its recipe."""
    from olpack import recipe
    from olpack.quants import quant_type
    from olpack.stages.build import Build
    from olpack.stages.compare import recommended
    from olpack.stages.export import ADAPTER
    from olpack.workspace import recipe_path

    build = Build(recipe.load(recipe_path(name)), out, weights=False)
    wanted = (tag or recommended(build)).lower()
    quant = next((one for one in build.quants if one.tag.lower() == wanted), None) or quant_type(wanted)
    path = build.paths.gguf(quant.name)
    if not path.is_file():
        built = ", ".join(f"{name}:{known.tag}" for known in build.quants if build.paths.gguf(known.name).is_file())
        raise OlpackError(f"{name}:{quant.tag} is not built.", f"Built are: {built}." if built else f"Run `olpack build {name}`.")

    from olpack.llamacpp.probe import check_library

    check_library()
    from olpack.llamacpp.engine import Engine, Sampling

    parameters = build.package.parameters
    with progress.task(f"loading {path.name}"):
        adapter = build.paths.gguf(ADAPTER) if build.paths.base else None
        template = build.base.tokenizer().chat_template if build.paths.served and build.base.template else None
        engine = Engine(path, build.package.num_ctx, adapter=adapter, template=template)
    start = [{"role": "system", "content": build.package.system}] if build.package.system else []
    start += build.package.messages
    limit = parameters.get("num_predict")
    most = limit if isinstance(limit, int) else None
    return lambda messages: iter(engine.generate([*start, *messages], most, Sampling.of(parameters)))
