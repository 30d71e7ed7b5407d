"""Tags written straight into a folder of models, for a server that does not run or a machine that cannot be reached.

    write_store(Path("/media/stick/models"), "coding-assistant", files, package, latest="q4_K_M")
    OLLAMA_MODELS=/media/stick/models ollama serve

The files are those that the server would write for the same package, byte for byte, so their digests are the same, too. A GGUF is linked
into the store where the file system allows, and takes no space twice. A running server sees the tags at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from olpack import bounded_json, progress
from olpack.deploy.client import OllamaClient, Tag, blob_digest
from olpack.deploy.modelfile import Package
from olpack.deploy.names import DEFAULT_HOST, DEFAULT_NAMESPACE, Name, canonical, parse_name
from olpack.deploy.register import Done, Origin, Registered, TagFile, check_request, drift
from olpack.errors import OlpackError
from olpack.model.gguf_header import Header, read_header
from olpack.quants import QUANT_TYPES

_IMAGE = "application/vnd.ollama.image."
_CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
# Where a file does not give its type, the server reads the number 0, which is F32.
_FILE_TYPES = {kind.ftype: name for name, kind in QUANT_TYPES.items() if kind.ftype}
_CHUNK = 1 << 20
_MOST_BYTES = 1 << 20  # of a manifest or a config; the server's have some hundred
_TEXTS = ("template", "system", "license", "messages")
_INHERITED = ("renderer", "parser", "requires")  # of a config: how the server writes prompts and reads answers

How = Literal["linked", "cloned", "copied", "there"]


@dataclass(frozen=True)
class Stored:
    """One tag in the store.

    Attributes:
        model: the whole name as the server will list it, "coding-assistant:q4_K_M".
        digest: of its manifest, 64 hexadecimal digits.
        blob: digest of its weights, `sha256:<64 hex>`.
        how: the weights got there: a hard link, a clone that shares blocks, a copy, or they were there.
        done: whether the manifest was written, or was the same before.
    """

    model: str
    digest: str
    blob: str
    how: How
    done: Literal["written", "unchanged"]


def models_folder() -> Path:
    """Where a server on this machine keeps its models: OLLAMA_MODELS, or `.ollama/models` of the home folder."""
    named = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    return Path(named) if named else Path.home() / ".ollama" / "models"


def model_stores() -> list[Path]:
    """Folders on this machine in which a server may keep its models: the user's, and those of the system's services."""
    return list(dict.fromkeys([models_folder(), *_OF_SERVICES]))


def read_manifest(store: Path, name: Name) -> dict[str, Any]:
    """The manifest of a model in a store; empty where it is not there. Names are matched without regard to case, as the server does."""
    wanted = tuple(part.lower() for part in (name.host, name.namespace, name.model, name.tag))
    try:
        for path in store.glob("manifests/*/*/*/*"):
            if tuple(part.lower() for part in path.relative_to(store / "manifests").parts) == wanted:
                if path.stat().st_size > _MOST_BYTES:
                    return {}
                read = bounded_json.loads(path.read_bytes())
                return read if isinstance(read, dict) and isinstance(read.get("layers"), list) else {}
    except (OSError, ValueError, OlpackError):
        pass
    return {}


def write_store(store: Path, name: str, files: Sequence[TagFile], package: Package, latest: str | None = None) -> list[Stored]:
    """Put a package into a model store.

    Blobs first, each under its name only when it is whole, and the manifest last. A tag that is there is replaced; what it alone used stays
    until the server tidies up at its next start. Nothing else in the store is touched.

    Args:
        store: the folder that is, or will be, the server's OLLAMA_MODELS.
        name: of the package, without a tag.
        files: one for each tag. Hard links are safe: an export puts a new file in place of an old one and never writes into it.
        package: what all tags carry, with `num_ctx` among its parameters.
        latest: the tag that `name` alone means; None: `:latest` is left as it is.

    Returns:
        one record for each file, in order, and one for `:latest` where it was asked for.

    Raises:
        OlpackError: the name or a parameter is wrong, a file does not match its digest, or the store cannot be written.
    """
    check_request(name, files, package, latest)
    with _failures(store):
        blobs = store / "blobs"
        for folder in (blobs, store / "manifests"):
            _make_folder(folder, store)
        stored = [_write_tag(store, f"{name}:{file.tag}", file, package) for file in files]
        if latest is not None:
            pointed = next(file for file in files if file.tag.lower() == latest.lower())
            stored.append(_write_tag(store, f"{name}:latest", pointed, package))
    return stored


@dataclass(frozen=True)
class _Model:
    """What a store has of the model that a tag is made from.

    Attributes:
        layers: its layers beside weights and parameters, by kind: "template", "license", of which there may be several; a vision model has a
            "projector".
        config: those fields of its config that decide how prompts are written and answers are read.
        parameters: its parameters.
    """

    layers: dict[str, list[dict[str, object]]]
    config: dict[str, object]
    parameters: dict[str, Any]


def _model_of(store: Path, name: str) -> _Model:
    """The model that a tag is made from.

    Raises:
        OlpackError: the store does not have it.
    """
    manifest = read_manifest(store, parse_name(name))
    if not manifest:
        raise OlpackError(f"The model store {store} has no {name} any more.", f"Run `ollama pull {name}`, and deploy again.")
    layers: dict[str, list[dict[str, object]]] = {}
    for layer in manifest["layers"]:
        if isinstance(layer, dict):
            layers.setdefault(str(layer.get("mediaType")).removeprefix(_IMAGE), []).append(layer)
    config = _object_of(store, manifest.get("config"))
    return _Model(
        {kind: layers[kind] for kind in (*_TEXTS, "projector") if kind in layers},
        {key: config[key] for key in _INHERITED if config.get(key)},
        _object_of(store, next(iter(layers.get("params", [])), None)),
    )


def _object_of(store: Path, layer: Any) -> dict[str, Any]:
    """The JSON object in the blob of a layer; empty where there is none."""
    path = _blob(store, str(layer.get("digest"))) if isinstance(layer, dict) else None
    if path is None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return {}
    try:
        read = bounded_json.loads(path.read_bytes())
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


@dataclass(frozen=True)
class ComposedTag:
    """One tag as the server keeps it.

    Attributes:
        manifest: its bytes.
        weights: digest of the weights, `sha256:<64 hex>`.
        texts: the small blobs that the manifest names, by their digest.
        files: where the others are, by their digest: the adapter first, then the weights.
    """

    manifest: bytes
    weights: str
    texts: dict[str, bytes]
    files: dict[str, Path]

    @property
    def digest(self) -> str:
        """Of the manifest, 64 hexadecimal digits: as the server lists it."""
        return hashlib.sha256(self.manifest).hexdigest()


def compose_tag(store: Path | None, file: TagFile, package: Package) -> ComposedTag:
    """What a tag consists of. Nothing is written.

    Args:
        store: where the model is that the tag is made from; None: it is made from none.
        file, package: as for `write_store`.

    Raises:
        OlpackError: the store does not have that model.
    """
    header = read_header(file.path)
    weights = f"sha256:{file.sha256}" if file.sha256 else blob_digest(file.path)
    adapters = {blob_digest(file.adapter): file.adapter} if file.adapter else {}
    layer = next(((digest, path.stat().st_size) for digest, path in adapters.items()), None)
    made_from = _model_of(store, file.origin.name) if file.origin and store else None
    manifest, texts = compose(weights, file.path.stat().st_size, header, package, layer, made_from)
    return ComposedTag(manifest, weights, texts, {**adapters, weights: file.path})


def compose(
    weights: str, size: int, header: Header, package: Package, adapter: tuple[str, int] | None = None, model: _Model | None = None
) -> tuple[bytes, dict[str, bytes]]:
    """The manifest of one tag, and the blobs that it names beside the weights, as the server writes them.

    Args:
        weights: `sha256:<64 hex>` of the GGUF.
        size: of it, in bytes.
        header: of it.
        package: what the tag carries.
        adapter: (digest, size) of a LoRA GGUF that is applied to the weights. The server puts its layer after theirs.
        model: that from which the tag is made: what the package does not set is its, and its licence stays.

    Returns:
        (manifest, blobs by their digest `sha256:<64 hex>`).
    """
    blobs: dict[str, bytes] = {}

    def layer(kind: str, content: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        blobs[digest] = content
        return {"mediaType": kind, "digest": digest, "size": len(content)}

    there = {} if model is None else model.layers
    kept = {kind: layers for kind, layers in there.items() if kind in _TEXTS and (kind == "license" or not getattr(package, kind))}
    merged = {**(model.parameters if model else {}), **package.parameters}
    parameters = {key: _as_go(value) for key, value in sorted(merged.items())}
    messages = [{"role": turn["role"].lower(), "content": turn["content"]} for turn in package.messages]
    contents = {
        "template": (package.template or "").encode(),
        "system": (package.system or "").encode(),
        "license": (package.license or "").encode(),
        "params": _go_json(parameters) if parameters else b"",
        "messages": _go_json(messages) if messages else b"",
    }
    layers: list[dict[str, object]] = [{"mediaType": f"{_IMAGE}model", "digest": weights, "size": size}]
    layers += [{"mediaType": f"{_IMAGE}adapter", "digest": adapter[0], "size": adapter[1]}] if adapter else []
    layers += there.get("projector", [])
    for kind, content in contents.items():
        layers += kept[kind] if kind in kept else [layer(_IMAGE + kind, content)] if content else []
    family, file_type = header.metadata.get("general.architecture", "unknown"), header.metadata.get("general.file_type")
    config = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": _human(header.parameters),
        "file_type": _FILE_TYPES.get(file_type, "unknown") if isinstance(file_type, int) else "unknown",
        **(model.config if model else {}),
        "architecture": "amd64",  # whatever the machine: the field is required by the image format, and the server writes this
        "os": "linux",
    }
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": layer(_CONFIG, _go_json(config)), "layers": layers}
    return _go_json(manifest), blobs


def _human(count: int) -> str:
    """A number of parameters as the server shows it: 494.03M, 1.5B, 40M."""
    for unit, name, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{name}"
    return str(count)


def _as_go(value: object) -> object:
    """A parameter as the server has it: tuples are lists, and every number is a float64."""
    if isinstance(value, (list, tuple)):
        return [_as_go(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _go_json(value: object) -> bytes:
    """JSON as Go's encoder writes it: no spaces, what HTML minds escaped, a line end after it."""
    text = _go_text(value)
    return "".join(f"\\u{ord(char):04x}" if char in "<>&\u2028\u2029" else char for char in text).encode() + b"\n"


def _go_text(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_go_text(key)}:{_go_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_go_text, value)) + "]"
    return _go_float(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _go_float(value: float) -> str:
    """A float64 as Go's encoding/json writes it: the fewest digits that read back as it, no point where there is no fraction, and an exponent,
    without a zero before it, only below 1e-6 and from 1e21 on."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)  # a parameter is finite
    if value == 0:
        return "-0" if sign else "0"
    if 1e-6 <= abs(value) < 1e21:
        return f"{Decimal(repr(value)).normalize():f}"
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    return f"{'-' * sign}{first}{'.' * bool(rest)}{rest}e{exponent + len(rest):+d}"


# -- beside a server that runs -------------------------------------------------------------------------------------------------------------


def store_of(client: OllamaClient) -> Path:
    """The folder in which a server that runs on this machine keeps its models, where it may be written.

    It is the server's if it contains exactly the manifests that the server lists.

    Raises:
        OlpackError: the server is elsewhere, its folder is not found, or cannot be written. The error's problem is the reason alone.
    """
    if not client.here:
        raise OlpackError(f"the server at {client.url} runs on another machine", "Run olpack there.")
    remedy = "Set OLLAMA_MODELS to the folder that the server has it set to."
    listed = {canonical(tag.model): tag.digest for tag in client.tags()}
    stores = [place for place in model_stores() if _has_blobs(place) and _manifests(place) == listed]
    if not stores:
        looked = ", ".join(map(str, model_stores()))
        raise OlpackError(f"no folder with the models of the server at {client.url} is found ({looked})", remedy)
    store = stores[0]
    if not all(os.access(folder, os.W_OK) for folder in (store, store / "blobs", *(one for one in [store / "manifests"] if one.exists()))):
        raise OlpackError(f"its model store {store} cannot be written by this user", "Run olpack as the user whose store it is, or as root.")
    return store


def store_with(client: OllamaClient, origin: Origin) -> Path:
    """The folder in which a model of the server is on this machine, whether or not it can be written.

    Raises:
        OlpackError: it is not found, or cannot be read.
    """
    listed = next((tag.digest for tag in client.tags() if canonical(tag.model) == canonical(origin.name)), None)
    if listed is None:
        raise OlpackError(f"The Ollama server at {client.url} has no {origin.name} any more.", f"Run `ollama pull {origin.name}`.")
    named = [Path(origin.info.path).parent.parent] if origin.info.path else []
    for store in (*named, *model_stores()):
        if _manifests(store).get(canonical(origin.name)) == listed:
            return store
    raise OlpackError(
        f"The manifest of {origin.name} is not found in the model stores of this machine that can be read ({', '.join(map(str, model_stores()))}).",
        "Set OLLAMA_MODELS to the folder that the server has it set to, and join its group if it is another user's (sudo usermod -aG ollama $USER).",
    )


_OF_SERVICES = (Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/.ollama/models"), Path("/var/lib/ollama/models"))


def _has_blobs(store: Path) -> bool:
    try:
        return (store / "blobs").is_dir()
    except OSError:  # a folder above it is another user's
        return False


def _manifests(store: Path) -> dict[str, str]:
    """Digests of the manifests of a store, by name; empty where it cannot be read."""
    digests: dict[str, str] = {}
    with suppress(OSError):
        for path in store.glob("manifests/*/*/*/*"):
            host, namespace, model, tag = path.relative_to(store / "manifests").parts
            with suppress(OSError):
                digests[canonical(f"{host}/{namespace}/{model}:{tag}")] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def place(client: OllamaClient, store: Path, name: str, file: TagFile, package: Package) -> Registered:
    """One tag written into the store of a server that runs, and read back from that server.

    Args:
        client: of the server.
        store: as `store_of` gives it.
        name: of the package, without a tag.
        file, package: as for `write_store`.

    Raises:
        OlpackError: it cannot be written, or the server does not have it afterwards as it was written.
    """
    started = time.monotonic()
    there = {canonical(tag.model) for tag in client.tags()}
    [made] = write_store(store, name, [file], package)
    done: Done = "unchanged" if made.done == "unchanged" else "updated" if canonical(made.model) in there else "created"
    listed = read_back(client, made.model, made.digest, file, package, f"It was written into {store}.")
    return Registered(listed.model, listed.digest, made.blob, made.blob, 0, round(time.monotonic() - started, 3), done)


def read_back(client: OllamaClient, model: str, digest: str, file: TagFile, package: Package, how: str) -> Tag:
    """What a server that runs lists of a tag that it did not create.

    Args:
        model: the whole name.
        digest: of the manifest, 64 hexadecimal digits.
        file, package: what the tag was made from.
        how: it got there, as a sentence.

    Raises:
        OlpackError: the server does not have it, or reads it otherwise.
    """
    listed = next((tag for tag in client.tags() if canonical(tag.model) == canonical(model)), None)
    info = client.show(model)
    if listed is None or listed.digest != digest or info is None:
        raise OlpackError(
            f"The server at {client.url} does not have {model}. {how}", "Set OLLAMA_MODELS to the folder that the server has it set to."
        )
    if clauses := drift(info, file, package):
        raise OlpackError(f"The server reads {model} otherwise than it was made: {'; '.join(clauses)}.", "Use `package: merged` in the recipe.")
    return listed


# -- writing -------------------------------------------------------------------------------------------------------------------------------


def _write_tag(store: Path, model: str, file: TagFile, package: Package) -> Stored:
    made = compose_tag(store, file, package)
    manifest, name = made.manifest, _as_spelled(store, parse_name(model))
    path = store / "manifests" / name.host / name.namespace / name.model / name.tag

    def place() -> How:
        for digest, content in made.texts.items():
            if not _blob(store, digest).is_file():
                _write(_blob(store, digest), content, store)
        ways = {digest: _place_weights(source, digest, store) for digest, source in made.files.items()}
        return ways[made.weights]

    how = place()
    unchanged = path.is_file() and path.read_bytes() == manifest
    if not unchanged:
        _make_folder(path.parent, store)
        _write(path, manifest, store)
    # A server that started meanwhile may have thrown out blobs that no manifest named yet.
    if not all(_blob(store, digest).is_file() for digest in (*made.files, *made.texts)):
        how = place()
    listed = f"{name.model}:{name.tag}"
    if name.host != DEFAULT_HOST:
        listed = f"{name.host}/{name.namespace}/{listed}"
    elif name.namespace != DEFAULT_NAMESPACE:
        listed = f"{name.namespace}/{listed}"
    progress.say(f"{'unchanged' if unchanged else 'written'} {listed} (weights {how})")
    return Stored(listed, made.digest, made.weights, how, "unchanged" if unchanged else "written")


def _blob(store: Path, digest: str) -> Path:
    return store / "blobs" / digest.replace(":", "-")


def _as_spelled(store: Path, wanted: Name) -> Name:
    """The name in the case in which the store has its parts: the server looks for a part as any model at all spells it."""
    there = [Name(*path.relative_to(store / "manifests").parts) for path in sorted(store.glob("manifests/*/*/*/*"))]
    parts = {}
    for part in ("host", "namespace", "model", "tag"):
        value = getattr(wanted, part)
        spelled = [getattr(name, part) for name in there if getattr(name, part).lower() == value.lower()]
        parts[part] = value if value in spelled or not spelled else spelled[0]
    return Name(**parts)


def _place_weights(source: Path, digest: str, store: Path) -> How:
    blob, source = _blob(store, digest), source.resolve()
    if blob.is_file() and blob.stat().st_size == source.stat().st_size:
        return "there"
    with _beside(blob) as temporary:
        how = _link(source, temporary, store) or _clone(source, temporary)
        copied = blob_digest(source) if how else _copy(source, temporary)
        if copied != digest:
            raise OlpackError(f"{source} is not the file it was when it was made.", "Make it again with 'olpack export'.")
        if how != "linked":
            _give(temporary, store)
        os.replace(temporary, blob)
    return how or "copied"


def _link(source: Path, target: Path, store: Path) -> How | None:
    """A hard link, unless the file is another user's than the store: the server must be able to touch what it serves."""
    if hasattr(os, "getuid") and source.stat().st_uid != store.stat().st_uid:
        return None
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return None
    return "linked"


def _clone(source: Path, target: Path) -> How | None:
    """A copy that shares its blocks with the source, where the file system can (btrfs, XFS)."""
    if sys.platform != "linux":
        return None
    import fcntl

    clone = 0x40049409  # FICLONE of linux/fs.h
    with source.open("rb") as read, target.open("wb") as written:
        try:
            fcntl.ioctl(written.fileno(), clone, read.fileno())
        except OSError:
            return None
    return "cloned"


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return its digest, `sha256:<64 hex>`."""
    hashed = hashlib.sha256()
    size = source.stat().st_size
    with source.open("rb") as read, target.open("wb") as written, progress.task(f"copying {source.name}", size, "B") as task:
        while chunk := read.read(_CHUNK):
            hashed.update(chunk)
            written.write(chunk)
            task.advance(len(chunk))
        written.flush()
        os.fsync(written.fileno())
    return f"sha256:{hashed.hexdigest()}"


def _write(path: Path, content: bytes, store: Path) -> None:
    # An unfinished manifest, too, stands among the blobs: beside its place, the server would take it for a tag.
    with _beside(store / "blobs" / path.name) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _give(temporary, store)
        os.replace(temporary, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name that the server does not know as a blob, and throws out at its start should it stay behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(path: Path, store: Path) -> None:
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        if store in folder.parents:
            _give(folder, store)


def _give(path: Path, store: Path) -> None:
    """Readable by all, as the server makes its files, and the store's owner's where we may decide that."""
    path.chmod(0o755 if path.is_dir() else 0o644)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = store.stat()
        with suppress(OSError):  # file systems without owners
            shutil.chown(path, owner.st_uid, owner.st_gid)


@contextmanager
def _failures(store: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise OlpackError(
            f"The model store {store} cannot be written: {error.filename or store} is another user's.",
            "Run this as the user whose store it is, or as root (the files are then given to that user).",
        ) from None
    except OSError as error:
        raise OlpackError(
            f"The model store {store} could not be written: {error.strerror or error}.",
            "Free some space, or choose another folder with --store. What was registered before is as it was.",
        ) from None
