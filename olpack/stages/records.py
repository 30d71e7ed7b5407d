"""What a step was made from and what it wrote, as `stages/STEP.json` in the build folder, and whether its outputs are still there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.workspace import BuildPaths, file_digest, value_digest, write_atomically

_ALWAYS_READ = 512 << 20  # bytes: some tenths of a second
_OBJECT, _OUTPUTS = TypeAdapter(dict[str, Any]), TypeAdapter(dict[str, tuple[int, int, str]])
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
    """

    inputs: dict[str, Any]
    outputs: dict[str, tuple[int, int, str]]
    result: dict[str, Any]


def read(paths: BuildPaths, unit: str) -> Record | None:
    """The record of a step, None before its first run or where the file is none that olpack writes."""
    try:
        saved = bounded_json.read_object(paths.home(unit).stage(unit), "Build again.")
        outputs = _OUTPUTS.validate_python(saved["outputs"])
        record = Record(_OBJECT.validate_python(saved["inputs"]), outputs, _OBJECT.validate_python(saved["result"]))
    except (OlpackError, ValueError, KeyError):
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

    Every file is read, so that a bit that a disk has flipped shows, except large ones with the time and size of their record: quants and adapters of
    gigabytes would take seconds at every command.
    """
    for name, (size, modified, digest) in record.outputs.items():
        path = paths.home(unit).root / name
        if not path.is_file():
            return f"{path} is gone"
        status = path.stat()
        if status.st_size != size or ((status.st_mtime_ns != modified or size <= _ALWAYS_READ) and file_digest(path) != digest):
            return f"{path} was changed"
    return ""


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
    _write(paths, step.unit, Record(step.inputs, described, result))


def remember(paths: BuildPaths, step: Step, result: dict[str, Any]) -> None:
    """Record what an unfinished step has done so far. It stays stale."""
    _write(paths, step.unit, Record({}, {}, result))


def _write(paths: BuildPaths, unit: str, record: Record) -> None:
    text = json.dumps({"inputs": record.inputs, "outputs": record.outputs, "result": record.result}, indent=1, ensure_ascii=False)
    write_atomically(paths.home(unit).stage(unit), text + "\n")
