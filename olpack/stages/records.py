"""What a step was made from and what it wrote, as `stages/STEP.json` in the build folder, and whether its outputs are still there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.workspace import BuildPaths, file_digest, value_digest, write_atomically

_ALWAYS_READ = 512 << 20  # bytes: some tenths of a second
_OBJECT, _OUTPUTS = TypeAdapter(dict[str, Any]), TypeAdapter(dict[str, tuple[int, int, str]])
_COMPARED = TypeAdapter(dict[str, tuple[int, int, int]])
_FACTS: dict[str, type | tuple[type, ...]] = {  # of a result: the types of what later steps read
    "adapter_digest": str,
    "rendered_at": str,
    "size": int,
    "sha256": str,
    "needs_importance": bool,
    "registered": list,
    "proved": dict,
    "recommended": (str, type(None)),
    "served": bool,
}
_FINISHED = {"train": ("adapter_digest",), "export": ("size", "sha256"), "deploy": ("registered",)}  # what a finished step has
_REGISTERED = {"model": str, "digest": str, "blob": str, "file": str, "bytes_sent": int, "seconds": int | float, "done": str}


@dataclass(frozen=True)
class Step:
    """One unit of work that is done or stale: a whole stage, or one quant of the export.

    Attributes:
        stage: name of its stage.
        unit: its name among all steps, "train" or "export-Q4_K_M".
        inputs: everything that decides its outcome, by name.
        reason: why it is stale, "" where it is done.
        result: facts that the run that made it recorded.
    """

    stage: str
    unit: str
    inputs: dict[str, Any]
    reason: str
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of the inputs."""
        return value_digest(self.inputs)

    @property
    def stale(self) -> bool:
        """Whether it must run."""
        return bool(self.reason)


@dataclass(frozen=True)
class Record:
    """What the last run of a step wrote down.

    Attributes:
        inputs: of that run; empty where it did not finish.
        outputs: size in bytes, modification time in ns and SHA-256 of each file, by its path in the build folder.
        result: facts that later steps and people read.
        compared: of large files, device, inode, and time of the last change in ns, as they were when the file had this SHA-256.
    """

    inputs: dict[str, Any]
    outputs: dict[str, tuple[int, int, str]]
    result: dict[str, Any]
    compared: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def read(paths: BuildPaths, unit: str) -> Record | None:
    """The record of a step, None before its first run or where the file is none that olpack writes, or is damaged.

    Records of earlier versions have no digest, and are read as they are.
    """
    try:
        saved = bounded_json.read_object(paths.home(unit).stage(unit), "Build again.")
        outputs = _OUTPUTS.validate_python(saved["outputs"])
        compared = _COMPARED.validate_python(saved.get("compared", {}))
        record = Record(_OBJECT.validate_python(saved["inputs"]), outputs, _OBJECT.validate_python(saved["result"]), compared)
    except (OlpackError, ValueError, KeyError):
        return None
    if saved.keys() - {"inputs", "outputs", "result", "compared", "digest"}:  # the name of the digest may be what is damaged
        return None
    if "digest" in saved and value_digest({name: value for name, value in saved.items() if name != "digest"}) != saved["digest"]:
        return None
    return record if _has_facts(unit, record) else None


def _has_facts(unit: str, record: Record) -> bool:
    """Whether a record has what later steps read of it, each of its type."""
    result, stage = record.result, unit.partition("-")[0]
    if any(name in result and not isinstance(result[name], kind) for name, kind in _FACTS.items()):
        return False
    if record.inputs and not all(name in result for name in _FINISHED.get(stage, ())):
        return False
    if "rendered_at" in result and not _is_moment(result["rendered_at"]):
        return False
    for name, proved in result.get("proved", {}).items():
        texts = proved if isinstance(proved, list) else [proved]
        if not all(isinstance(text, str) for text in texts) or isinstance(proved, list) == (name in ("prompts", "summary")):
            return False
    fields = _REGISTERED.keys()
    return all(
        isinstance(one, dict) and one.keys() == fields and all(isinstance(one[name], kind) for name, kind in _REGISTERED.items())
        for one in result.get("registered", [])
    )


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is None
    except ValueError:
        return False


def result(paths: BuildPaths, unit: str) -> dict[str, Any]:
    """The facts that the last run of a step recorded, whether it is stale by now or not; empty before the first."""
    record = read(paths, unit)
    return record.result if record else {}


def changed(inputs: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Why inputs make a step stale, "" where they are those of its record."""
    names = [name for name in {**inputs, **before} if inputs.get(name) != before.get(name)]
    return f"{', '.join(names)} changed" if names else ""


def damage(paths: BuildPaths, unit: str, record: Record) -> str:
    """Which output of a step is missing or was changed, "" where all are as they were written.

    Every file is read, so that a bit that a disk has flipped shows. Only large ones, which would take seconds at every command, are read once as
    long as nothing writes to them: any write gives a file another time of change, whatever modification time it has.
    """
    for name, (size, _, digest) in record.outputs.items():
        path = paths.home(unit).root / name
        if not path.is_file():
            return f"{path} is gone"
        status = path.stat()
        known = size > _ALWAYS_READ and record.compared.get(name) == _state(status)
        if status.st_size != size or (not known and file_digest(path) != digest):
            return f"{path} was changed"
    return ""


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _compared(paths: BuildPaths, unit: str, outputs: Mapping[str, tuple[int, int, str]]) -> dict[str, tuple[int, int, int]]:
    """The states of those outputs that are not read again at each command."""
    return {name: _state((paths.home(unit).root / name).stat()) for name, (size, _, _) in outputs.items() if size > _ALWAYS_READ}


def remember_compared(paths: BuildPaths, unit: str) -> None:
    """Record that the large outputs of a step that is not stale were read: a copied folder, or one of an earlier version."""
    record = read(paths, unit)
    if record and (compared := _compared(paths, unit, record.outputs)) != record.compared:
        _write(paths, unit, replace(record, compared=compared))


def finish(paths: BuildPaths, step: Step, outputs: Sequence[Path], result: dict[str, Any], digests: Mapping[Path, str] | None = None) -> None:
    """Record that a step is done.

    Args:
        outputs: files that it wrote below the build folder.
        result: facts for later steps and for people, as JSON values.
        digests: SHA-256 of those outputs whose digest is known already.
    """
    described, root = {}, paths.home(step.unit).root
    for path in outputs:
        status = path.stat()
        digest = (digests or {}).get(path) or file_digest(path)
        described[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns, digest)
    _write(paths, step.unit, Record(step.inputs, described, result, _compared(paths, step.unit, described)))


def remember(paths: BuildPaths, step: Step, result: dict[str, Any]) -> None:
    """Record what an unfinished step has done so far. It stays stale."""
    _write(paths, step.unit, Record({}, {}, result))


def _write(paths: BuildPaths, unit: str, record: Record) -> None:
    content = {name: value for name, value in asdict(record).items() if value or name != "compared"}
    content = json.loads(json.dumps(content, ensure_ascii=False))  # as it will be read: tuples are lists then
    text = json.dumps({**content, "digest": value_digest(content)}, indent=1, ensure_ascii=False)
    write_atomically(paths.home(unit).stage(unit), text + "\n")
