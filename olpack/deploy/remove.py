"""Removing what olpack registered, and nothing else.

remove(client, "coding-assistant", records)      # records: what `register` returned
"""

from __future__ import annotations

from collections.abc import Sequence

from olpack import progress
from olpack.deploy.client import OllamaClient
from olpack.deploy.names import canonical
from olpack.deploy.register import Registered


def owned(client: OllamaClient, name: str, records: Sequence[Registered], *, adapted: bool = False) -> list[str]:
    """The tags of a package that the server has and that olpack made.

    A tag is olpack's where a record names it, or it is `:latest`, and it still has the weights of a record. A tag that someone has made
    anew from other weights, or a copy under a name of their own, is theirs. A model that an adapter was trained on has the weights of a record, too:
    it has no adapter.

    Args:
        client: of a server that answers.
        name: of the package, without a tag.
        records: what registering it returned.
        adapted: the package consists of an adapter.

    Returns:
        names as the server lists them, `:latest` first.
    """
    weights = {record.blob for record in records}
    latest = canonical(f"{name}:latest")
    ours = {canonical(record.model) for record in records if canonical(record.model).rpartition(":")[0] == latest.rpartition(":")[0]}
    models = []
    for tag in client.tags():
        if canonical(tag.model) in ours | {latest}:
            info = client.show(tag.model)
            if info is not None and info.blob in weights and (info.adapter is not None or not adapted):
                models.append(tag.model)
    return sorted(models, key=lambda model: (canonical(model) != latest, model))


def remove(client: OllamaClient, name: str, records: Sequence[Registered], *, adapted: bool = False) -> list[str]:
    """Remove a package from the server: all of its tags that are olpack's. Files on this machine stay.

    Args:
        client: of a server that answers.
        name: of the package, without a tag.
        records: what registering it returned.
        adapted: the package consists of an adapter.

    Returns:
        what was removed, as the server listed it.

    Raises:
        OlpackError: the server failed.
    """
    models = owned(client, name, records, adapted=adapted)
    for model in models:
        client.delete(model)
        progress.say(f"removed {model}")
    return models
