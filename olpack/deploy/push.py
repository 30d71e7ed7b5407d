"""Tags of an Ollama server to ollama.com or a private registry. The server sends them, with its own key; nothing passes through here.

push_to_ollama(client, ["coding-assistant:q4_K_M", "coding-assistant"], namespace="me")      # ollama.com/me/coding-assistant
push_to_ollama(client, ["coding-assistant:q4_K_M"], namespace="registry.example.com:5000/team", insecure=True)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from olpack import progress
from olpack.deploy.client import OllamaClient, show_transfer
from olpack.deploy.names import DEFAULT_HOST, DEFAULT_NAMESPACE, canonical, check_name, parse_name
from olpack.errors import OlpackError

_SIGN_IN = (
    "Sign the server's machine in with 'ollama signin' (or add its ~/.ollama/id_ed25519.pub, on Linux often "
    "/usr/share/ollama/.ollama/id_ed25519.pub, at https://ollama.com/settings/keys), and push below a name that is yours."
)
_REMEDIES = {
    r"HTTP response to HTTPS client": "The registry speaks plain HTTP: allow that with --insecure.",
    r"x509|certificate": "The Ollama server calls the registry: the machine it runs on must trust the registry's certificate.",
    r"unauthorized|denied|authoriz|\b40[13]\b": _SIGN_IN,
    r"file does not exist|\b404\b": "The registry does not know that namespace: make an account or a project of that name there.",
}


def push_to_ollama(client: OllamaClient, models: Sequence[str], namespace: str | None = None, insecure: bool = False) -> list[str]:
    """Send tags to the registry that their names give. What is there already is not sent again.

    Args:
        client: of a server that has the models.
        models: names with tags; without a tag, `:latest` is meant.
        namespace: `[host/]namespace` below which models without one are pushed. They are copied to that name first, at no cost on disk.
        insecure: speak plain HTTP to the registry.

    Returns:
        the names as pushed.

    Raises:
        OlpackError: a model is not there or has no namespace (before anything is sent), or the registry refused.
    """
    there = {canonical(tag.model): tag for tag in client.tags()}
    targets = [_target(model, namespace) for model in models]
    for model in models:
        if canonical(model) not in there:
            raise OlpackError(f"The Ollama server at {client.url} has no {model}.", "Register it with 'olpack deploy'.")
    for model, target in zip(models, targets, strict=True):
        asked, pushed = there[canonical(model)], there.get(canonical(target))
        if pushed is None or pushed.digest != asked.digest:
            client.copy(model, target)
        _push(client, target, asked.size, insecure)
    return targets


def _target(model: str, namespace: str | None) -> str:
    """The name that a model is pushed under."""
    check_name(model)
    parsed = parse_name(model)
    if (parsed.host, parsed.namespace) != (DEFAULT_HOST, DEFAULT_NAMESPACE):
        return model
    if not namespace:
        raise OlpackError(
            f"{model} cannot be pushed: its name has no namespace.",
            f"Name your account on ollama.com with --ollama: it becomes YOU/{parsed.model}:{parsed.tag}.",
        )
    target = f"{namespace.rstrip('/')}/{parsed.model}:{parsed.tag}"
    check_name(target)
    return target


def _push(client: OllamaClient, model: str, size: int, insecure: bool) -> None:
    try:
        show_transfer(client.push(model, insecure), f"pushing {model}", size)
    except OlpackError as error:
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if re.search(sign, error.problem, re.IGNORECASE)), error.remedy)
        raise OlpackError(error.problem, remedy) from error
    parsed = parse_name(model)
    where = f"https://ollama.com/{parsed.namespace}/{parsed.model}" if parsed.host == DEFAULT_HOST else parsed.host
    progress.say(f"pushed {model} to {where}")
