"""Registering a package: several tags, one after the other, and of each only what changed.

The state of the server is read first and compared with the package field by field. A tag that has the same fields is left alone. A field that is
new or has another value is set through `from` the tag itself, which touches no weights. A field that must go, or other weights, take
`files`: what is inherited through `from` cannot be removed. Then the state is read back, and an error names each field that differs from the package.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from olpack import progress
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.deploy.model_info import ModelInfo
from olpack.deploy.modelfile import Package
from olpack.deploy.names import canonical, check_name, same
from olpack.deploy.parameters import check_parameters
from olpack.errors import OlpackError
from olpack.model.chat_template import read_chat_template

Done = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True)
class Origin:
    """A model of the server from which a tag is made: the tag has its weights, and what the package does not set.

    Attributes:
        name: "llama3.2:3b".
        info: what the server has of it.
    """

    name: str
    info: ModelInfo


@dataclass(frozen=True)
class TagFile:
    """One GGUF to register.

    Attributes:
        tag: what follows the colon, "q4_K_M".
        path: the file.
        sha256: of the file, 64 hexadecimal digits; None: it is read and hashed.
        adapter: a LoRA GGUF that the server applies to it; None: there is none.
        origin: the model of the server whose file it is; None: the server gets the file.
    """

    tag: str
    path: Path
    sha256: str | None = None
    adapter: Path | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Registered:
    """One tag after registering.

    Attributes:
        model: the whole name as the server lists it, "coding-assistant:q4_K_M".
        digest: of its manifest, 64 hexadecimal digits.
        blob: digest of the weights as the server keeps them, `sha256:<64 hex>`.
        file: digest of the file that they were made from, in the same form. They differ where the server rewrote the file.
        bytes_sent: in blobs and requests.
        seconds: wall time.
        done: what was needed.
    """

    model: str
    digest: str
    blob: str
    file: str
    bytes_sent: int
    seconds: float
    done: Done


def register(
    client: OllamaClient,
    name: str,
    files: Sequence[TagFile],
    package: Package,
    before: Sequence[Registered] = (),
) -> list[Registered]:
    """Bring the server to the state that the package describes.

    Args:
        client: of a server that answers.
        name: of the package, without a tag.
        files: one for each tag.
        package: what all tags carry. Its parameters must have `num_ctx`: without it the server takes 4,096 to 262,144 by the memory of the
            machine.
        before: what an earlier call returned. Only needed to recognize weights that the server rewrote; without it such a tag is sent
            again.

    Returns:
        one record for each file, in order.

    Raises:
        OlpackError: the name or a parameter is wrong (before anything is sent), the server failed, or it did not do what it was asked to.
    """
    check_request(name, files, package)
    earlier = {canonical(record.model): record for record in before}
    return [_register_one(client, model := f"{name}:{file.tag}", file, package, earlier.get(canonical(model))) for file in files]


def check_request(name: str, files: Sequence[TagFile], package: Package, latest: str | None = None) -> None:
    """Refuse names, tags and parameters that the server would refuse, or take and fail with later."""
    check_name(name, tagged=False)
    check_unsplit(files)
    tags = [file.tag.lower() for file in files]
    for file in files:
        check_name(f"{name}:{file.tag}")
        if tags.count(file.tag.lower()) > 1:
            raise OlpackError(f"Two files would become {name}:{file.tag}.", "Tags are matched without regard to case: give each file its own.")
    if latest is not None and latest.lower() not in tags:
        raise OlpackError(
            f"{name}:latest cannot point to {latest!r}, which is none of: {', '.join(file.tag for file in files)}.", "Name one of them."
        )
    problems = check_parameters(package.parameters)
    if "num_ctx" not in package.parameters:
        problems.append("The parameter 'num_ctx' is not set, and the server's own choice depends on the machine.")
    if problems:
        raise OlpackError(" ".join(problems), "Fix modelfile.parameters in the recipe.")


def check_unsplit(files: Sequence[TagFile]) -> None:
    """Refuse a GGUF of which a file is only a part: a tag is made from one file here, and servers before 0.34 know no other way."""
    for file in files:
        if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.path.name):
            raise OlpackError(f"'{file.path}' is one part of a GGUF in several files, and a tag is registered from one.", "Export it unsplit.")


def _register_one(client: OllamaClient, model: str, file: TagFile, package: Package, earlier: Registered | None) -> Registered:
    started, sent = time.monotonic(), client.bytes_sent
    if file.origin is not None:
        return _register_from(client, model, file, file.origin, package, started, sent)
    digest = f"sha256:{file.sha256}" if file.sha256 else blob_digest(file.path)
    adapter = blob_digest(file.adapter) if file.adapter else None
    fields = _wanted(file, package)
    before = client.show(model)
    changed = _differing(fields, before) if before else []
    done: Done
    if before is None or before.adapter != adapter or not _same_weights(before, digest, earlier) or _needs_files(changed, fields, before, package):
        done = "updated" if before else "created"
        client.upload(file.path, digest)
        adapters = {}
        if file.adapter and adapter:
            client.upload(file.adapter, adapter)
            adapters = {"adapters": {file.adapter.name: adapter}}
        client.create({"model": model, "files": {file.path.name: digest}, **adapters, **_fields(package)})
        after = _read_back(client, model, file, package)
    elif changed:
        done = "updated"
        client.create({"model": model, "from": model, **{field: fields[field] for field in changed}})
        after = _read_back(client, model, file, package)
    else:
        done = "unchanged"
        after = before
    if done != "unchanged" and after.blob != digest:
        progress.warn(f"The server rewrote {file.path.name} for {model}; until it is restarted, the file takes its space twice.")
    return _recorded(client, model, after, digest, client.bytes_sent - sent, started, done)


def _register_from(client: OllamaClient, model: str, file: TagFile, origin: Origin, package: Package, started: float, sent: int) -> Registered:
    """A tag with the weights of a model that the server has, and an adapter: no weights are sent or copied.

    What the package does not set comes from that model. A licence is added to the one that is there, so that of a model stays as it is.
    """
    assert file.adapter is not None and origin.info.blob is not None  # else there would be nothing to register
    adapter, before = blob_digest(file.adapter), client.show(model)
    fields = _fields(inherited(origin, package))
    if before is not None and before.blob == origin.info.blob and not drift(before, file, package):
        return _recorded(client, model, before, origin.info.blob, client.bytes_sent - sent, started, "unchanged")
    client.upload(file.adapter, adapter)
    if origin.info.license:
        fields.pop("license", None)
    client.create({"model": model, "from": origin.name, "adapters": {file.adapter.name: adapter}, **fields})
    after = _read_back(client, model, file, package)
    if after.blob != origin.info.blob:
        raise OlpackError(
            f"The Ollama server gave {model} other weights than those of {origin.name}.", f"Run `ollama pull {origin.name}`, and build again."
        )
    return _recorded(client, model, after, origin.info.blob, client.bytes_sent - sent, started, "updated" if before else "created")


def inherited(origin: Origin, package: Package) -> Package:
    """A package as a tag has it that is made from a model: with what it leaves to the model. Its template is the model's own."""
    info = origin.info
    return Package(
        system=package.system or info.system,
        template=package.template,
        parameters={**info.parameters, **package.parameters},
        license=info.license or package.license,
        messages=package.messages or info.messages,
    )


def _recorded(client: OllamaClient, model: str, after: ModelInfo, digest: str, bytes_sent: int, started: float, done: Done) -> Registered:
    # The server lists a tag in the case in which it first met it.
    listed = next((tag for tag in client.tags() if same(tag.model, model)), None)
    if listed is None:
        raise OlpackError(f"The Ollama server at {client.url} has {model} and does not list it.", "Restart it, then run `olpack deploy` again.")
    record = Registered(listed.model, listed.digest, after.blob or digest, digest, bytes_sent, round(time.monotonic() - started, 3), done)
    figures = f" ({progress.quantity(record.bytes_sent, 'B')} sent, {progress.duration(record.seconds)})" if done != "unchanged" else ""
    progress.say(f"{done} {record.model}{figures}")
    return record


def drift(info: ModelInfo, file: TagFile, package: Package) -> list[str]:
    """In what a registered tag differs from its package beside the weights, one clause each: "parameters is {…} and not {…}"."""
    fields = _wanted(file, package)
    clauses = [f"{field} is {_short(getattr(info, field))} and not {_short(fields.get(field))}" for field in _differing(fields, info)]
    adapter = blob_digest(file.adapter) if file.adapter else None
    return clauses if info.adapter == adapter else [*clauses, f"adapter is {info.adapter} and not {adapter}"]


def _wanted(file: TagFile, package: Package) -> dict[str, object]:
    if file.origin is not None:
        return {**_fields(inherited(file.origin, package)), "template": package.template or file.origin.info.template}
    # Without a Go template of the package's own, the server must run the GGUF's own template and no substitute.
    return {**_fields(package), "template": package.template or read_chat_template(file.path)}


def _fields(package: Package) -> dict[str, object]:
    """The package as fields of `/api/create`; what it lacks is left out."""
    fields: dict[str, object] = {
        "system": package.system,
        "template": package.template,
        "parameters": {name: list(value) if isinstance(value, tuple) else value for name, value in package.parameters.items()},
        "license": package.license,
        "messages": [{"role": turn["role"], "content": turn["content"]} for turn in package.messages],
    }
    return {field: value for field, value in fields.items() if value}


def _differing(fields: dict[str, object], info: ModelInfo) -> list[str]:
    """Names of the fields in which the server's state is not what `fields` ask for."""
    registered: dict[str, object] = {
        "system": info.system,
        "template": info.template,
        "parameters": info.parameters,
        "license": info.license,
        "messages": list(info.messages),
    }
    if fields.get("template") is None:  # neither the package nor the GGUF has one: whatever the server shows stands for "none"
        del registered["template"]
    return [field for field, value in registered.items() if _comparable(value) != _comparable(fields.get(field))]


def _comparable(value: object) -> object:
    """A field without what the server does not report: the order of stop texts, and the difference of empty and absent."""
    if isinstance(value, dict):
        return {name: sorted(item) if isinstance(item, (list, tuple)) else item for name, item in value.items()}
    return value or None


def _same_weights(info: ModelInfo, digest: str, earlier: Registered | None) -> bool:
    return info.blob == digest or (earlier is not None and (earlier.file, earlier.blob) == (digest, info.blob))


def _needs_files(changed: Sequence[str], fields: dict[str, object], info: ModelInfo, package: Package) -> bool:
    """Whether a change cannot go through `from`, which inherits what is not named and adds a licence to the one that is there."""
    return (
        any(field not in fields for field in changed)
        or ("parameters" in changed and not info.parameters.keys() <= package.parameters.keys())
        or ("license" in changed and info.license is not None)
        or ("template" in changed and package.template is None)
    )


def _read_back(client: OllamaClient, model: str, file: TagFile, package: Package) -> ModelInfo:
    """What the server has of a tag that it just registered.

    Raises:
        OlpackError: it does not have the tag, or the tag differs from the package.
    """
    info = client.show(model)
    if info is None:
        raise OlpackError(f"The Ollama server reported that it registered {model}, and does not have it.", "Look into its log, then run this again.")
    differing = _differing(_wanted(file, package), info)
    if "template" in differing and package.template is None:
        raise OlpackError(
            f"The Ollama server replaced the chat template of {model} by a similar one of its own: prompts would not be as trained.",
            "Export again: olpack protects the template that it writes into a GGUF.",
        )
    if "template" in differing:
        raise OlpackError(
            f"The Ollama server runs the chat template inside the GGUF of {model}, which knows tools or thinking, not the recipe's.",
            "Leave modelfile.template out of the recipe.",
        )
    if clauses := drift(info, file, package):
        raise OlpackError(
            f"The Ollama server registered {model} otherwise than asked: {'; '.join(clauses)}.", "Remove the tag with 'ollama rm' and deploy again."
        )
    return info


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def point_latest(client: OllamaClient, name: str, tag: str) -> None:
    """Make `NAME:latest` a copy of one of the package's tags.

    Raises:
        OlpackError: the server does not have that tag.
    """
    digests = {canonical(listed.model): listed.digest for listed in client.tags()}
    source, latest = f"{name}:{tag}", f"{name}:latest"
    if canonical(source) not in digests:
        raise OlpackError(f"The Ollama server at {client.url} has no {source} any more.", f"Run `olpack deploy {name}`.")
    if digests.get(canonical(latest)) != digests[canonical(source)]:
        client.copy(source, latest)
        progress.say(f"{latest} is {source}")
