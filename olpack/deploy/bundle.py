"""One archive with all that a machine without olpack needs: GGUFs, Modelfiles, digests, the report, and what to type.

    bundle("coding-assistant", files, modelfiles, [report], Path("coding-assistant.zip"))
    unzip coding-assistant.zip && cd coding-assistant && ollama create coding-assistant:q4_K_M -f q4_K_M.Modelfile

Nothing is compressed (quantized weights do not shrink), times and modes are fixed, so the same files give the same archive, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from olpack import progress
from olpack.deploy.modelfile import parse, quoted
from olpack.deploy.names import check_name
from olpack.deploy.register import TagFile, check_unsplit
from olpack.errors import OlpackError
from olpack.workspace import free_bytes, remove_leftovers, unfinished

_CHUNK = 1 << 20
_README, _SUMS = _OWN = ("README.txt", "SHA256SUMS")


def bundle(name: str, files: Sequence[TagFile], modelfiles: Sequence[Path], report: Sequence[Path], out: Path) -> Path:
    """Write the archive.

    Args:
        name: of the package; also of the folder that the archive unpacks to.
        files: the GGUFs.
        modelfiles: `TAG.Modelfile` for each of them. In the archive, FROM names the file beside it.
        report: further files to take along.
        out: the archive, which ends in `.zip`. One that is there is replaced when the new one is whole.

    Returns:
        `out`.

    Raises:
        OlpackError: a file is missing, twice there, one part of a split GGUF, or does not match its digest, a Modelfile names a GGUF that is
            not in the archive, or the archive cannot be written or read back.
    """
    check_name(name, tagged=False)
    check_unsplit(files)
    if out.suffix.lower() != ".zip":
        raise OlpackError(f"The bundle {out} would be a zip archive under another name.", f"Call it {out.with_suffix('.zip').name}.")
    folder = name.rpartition("/")[2]
    adapters = {file.adapter for file in files if file.adapter}
    weights = {path.name: path for path in (*(file.path for file in files), *adapters)}
    texts = {path.name: beside(path, set(weights)).encode() for path in modelfiles}
    sources = weights | {path.name: path for path in report}
    if len({*texts, *sources, *_OWN}) < len(files) + len(adapters) + len(modelfiles) + len(report) + len(_OWN):
        raise OlpackError(f"Two files of the bundle {name} have the same name.", "Rename one: the archive has one folder.")
    if missing := [path for path in sources.values() if not path.is_file()]:
        raise OlpackError(f"There is no {missing[0]} for the bundle.", "Make it with 'olpack build'.")
    texts[_README] = _readme(name, files, modelfiles).encode()
    expected = {file.path.name: file.sha256 for file in files if file.sha256}
    with _whole(out, sum(path.stat().st_size for path in sources.values())) as temporary:
        digests = _write(temporary, folder, texts, sources)
        if wrong := [sources[one] for one, digest in expected.items() if digests[one] != digest]:
            raise OlpackError(f"{wrong[0]} is not the file it was when it was made.", "Make it again with 'olpack export'.")
        _read_back(temporary, folder, digests)
    progress.say(f"wrote {out} ({progress.quantity(out.stat().st_size, 'B')})")
    return out


def beside(modelfile: Path, ggufs: set[str]) -> str:
    """A Modelfile's text for a folder in which its GGUF, and its adapter where it has one, lie beside it.

    Raises:
        OlpackError: it cannot be read, or names a GGUF that is none of these.
    """
    try:
        text = modelfile.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OlpackError(f"There is no {modelfile}.", "Make it with 'olpack build'.") from None
    before = parse(text)
    named = {"from": before.source, "adapter": before.adapter}
    places = {command: f"./{Path(path).name}" for command, path in named.items() if path is not None}
    for command, place in places.items():
        line = f"{command.upper()} {quoted(place)}"
        if Path(place).name not in ggufs:
            raise OlpackError(f"{modelfile} names {named[command]}, which is not among the GGUFs that go with it.", "Run 'olpack build' again.")
        text = re.sub(rf"(?im)^[ \t]*{command}[ \t].*$", line.replace("\\", r"\\"), text, count=1)
    if parse(text) != replace(before, source=places["from"], adapter=places.get("adapter")):
        raise OlpackError(f"The FROM of {modelfile} could not be changed.", "Put it before every other line of templates/Modelfile.j2.")
    return text


def _readme(name: str, files: Sequence[TagFile], modelfiles: Sequence[Path]) -> str:
    chosen = modelfiles[0].name if modelfiles else "Modelfile"
    tag = chosen.removesuffix(".Modelfile")
    tags = ", ".join(file.tag for file in files)
    beside = "The Modelfiles name an ADAPTER, which `ollama create` refuses from Ollama 0.34.1 on.\n" if any(file.adapter for file in files) else ""
    return (
        f"{name} for Ollama, made with olpack. Quants: {tags}.\n"
        f"Check the files:  sha256sum -c {_SUMS}\n"
        f"Register one:     ollama create {name}:{tag} -f {chosen}\n"
        f"Talk to it:       ollama run {name}:{tag}\n"
        "Each other quant is registered the same way, with its own Modelfile.\n"
        f"{beside}"
    )


def _write(path: Path, folder: str, texts: dict[str, bytes], sources: dict[str, Path]) -> dict[str, str]:
    """Write all entries and return their digests, SHA256SUMS's own excepted."""
    digests = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(texts.items()):
            archive.writestr(_entry(folder, name, len(content)), content)
            digests[name] = hashlib.sha256(content).hexdigest()
        for name, source in sorted(sources.items()):
            digests[name] = _add(archive, _entry(folder, name, source.stat().st_size), source)
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
        archive.writestr(_entry(folder, _SUMS, len(sums)), sums)
    return digests


def _entry(folder: str, name: str, size: int) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(f"{folder}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    made.create_system = 3  # Unix, wherever it is written
    made.external_attr = 0o100644 << 16
    made.file_size = size  # above 4 GiB the entry is written as ZIP64
    return made


def _add(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, source: Path) -> str:
    hashed, size = hashlib.sha256(), entry.file_size
    with source.open("rb") as read, archive.open(entry, "w") as written, progress.task(f"packing {source.name}", size, "B") as task:
        while chunk := read.read(_CHUNK):
            hashed.update(chunk)
            written.write(chunk)
            task.advance(len(chunk))
    return hashed.hexdigest()


def _read_back(path: Path, folder: str, digests: dict[str, str]) -> None:
    with zipfile.ZipFile(path) as archive, progress.task("reading the bundle back", path.stat().st_size, "B") as task:
        for name, digest in digests.items():
            hashed = hashlib.sha256()
            try:
                with archive.open(f"{folder}/{name}") as entry:
                    while chunk := entry.read(_CHUNK):
                        hashed.update(chunk)
                        task.advance(len(chunk))
            except (zipfile.BadZipFile, KeyError) as error:
                raise OlpackError(f"The bundle does not read back: {error}.", "Check the disk, then run this again.") from None
            if hashed.hexdigest() != digest:
                raise OlpackError(f"{name} does not read back from the bundle as it was written.", "Check the disk, then run this again.")


@contextmanager
def _whole(out: Path, size: int) -> Iterator[Path]:
    """A temporary name for `size` bytes that becomes `out` when the block ends well."""
    temporary = unfinished(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent, out.name)
        if free_bytes(out.parent) < size:
            raise OlpackError(
                f"{progress.quantity(size, 'B')} are needed for {out}, and {progress.quantity(free_bytes(out.parent), 'B')} are free.",
                "Free some space, or write it to another disk.",
            )
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except OSError as error:
        raise OlpackError(f"{out} could not be written: {error.strerror or error}.", "Free some space, or write it to another disk.") from None
    finally:
        temporary.unlink(missing_ok=True)
