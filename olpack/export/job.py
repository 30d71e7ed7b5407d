"""What goes into an export and what comes out: plain data, the same on both sides of the worker's pipe."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

LATER = "later"  # in place of an importance matrix: it will be collected on the model that is checked


@dataclass(frozen=True)
class Target:
    """One file to write.

    Attributes:
        quant: a quant type, "Q4_K_M" (any case).
        path: where the GGUF goes. An existing file is replaced once the new one is complete.
    """

    quant: str
    path: Path


@dataclass(frozen=True)
class ExportedPart:
    """One file of a GGUF that was split: where it is, its bytes, its SHA-256 in hex."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class ExportedFile:
    """One GGUF that was written.

    Attributes:
        quant: the quant type's name, "Q4_K_M".
        path: the file; the first of its parts, where it was split.
        size: bytes, of all parts together.
        sha256: of the file, in hex; of the first part, where it was split.
        parameters: weights in the model, norms and biases included.
        bits_per_weight: bits of tensor data per parameter (header and vocabulary not counted), as llama.cpp counts them.
        seconds: wall time of the pass that wrote it (one pass writes all files).
        parts: its files in order, where it was split; empty for a single file.
        types: how many matrices of each kind have which type: {"attn_v": {"q6_K": 8, "q8_0": 2}}. Kinds in the order of the file.
        needs_importance: whether it can be made with an importance matrix only.
        warnings: of the export that wrote it, as in `ExportPlan`.
    """

    quant: str
    path: Path
    size: int
    sha256: str
    parameters: int
    bits_per_weight: float
    seconds: float
    parts: list[ExportedPart] = field(default_factory=list)
    types: dict[str, dict[str, int]] = field(default_factory=dict)
    needs_importance: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenText:
    """A text with the token ids that training sees for it.

    Attributes:
        source: where it stands, "train.jsonl:17".
        pieces: the text, cut where no token reaches over.
        ids: of all pieces, special tokens included.
    """

    source: str
    pieces: list[str]
    ids: list[int]


@dataclass(frozen=True)
class TokenDifference:
    """Where llama.cpp reads a text as other tokens than training does.

    Attributes:
        source: of the text.
        before: the ids just before the difference, which are the same.
        trained, read: the next few ids of training, and of llama.cpp.
    """

    source: str
    before: list[int]
    trained: list[int]
    read: list[int]


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write, found from configuration, tokenizer and tensor headers alone.

    Attributes:
        architecture: llama.cpp's name, "qwen3".
        pre_tokenizer: llama.cpp's name of the BPE pre-tokenizer, "qwen2"; empty for vocabularies that have none.
        context_length: tokens, from the configuration; None where it does not say.
        parameters: weights in the model.
        sizes: exact bytes of each file, by the quant type's name.
        warnings: what the user should know and need not mend, one sentence each: tensors for which llama.cpp falls back
            to another type, a base that is trained in a lower precision.
        differences: texts that llama.cpp reads as other tokens than training, of those that were given.
    """

    architecture: str
    pre_tokenizer: str
    context_length: int | None
    parameters: int
    sizes: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    differences: list[TokenDifference] = field(default_factory=list)


def partial_path(path: Path, pid: int) -> Path:
    """Where a file is written until it is complete: beside its place, with the writing process in its name. Parts are written into a
    folder of this name."""
    return path.with_name(f".{path.name}.{pid}.partial")


def remove_partial(place: Path) -> None:
    """Remove what is at a `partial_path`, if anything."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
