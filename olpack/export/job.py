"""What goes into an export and what comes out: plain data, the same on both sides of the worker's pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from olpack.quants import Rounding

LATER: Literal["later"] = "later"  # in place of what will be made of the model that is checked: an importance matrix, block scales


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
        encoder: what quantized it, with the same bits either way: the GPU's name ("NVIDIA H200"), "CPU", or why
            the CPU went on after the GPU.
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
    encoder: str = "CPU"


class ExportOptions(TypedDict, total=False):
    """How files are made of a model: the keyword arguments of `check_export` and `export`, and their form in the worker's job.

    Attributes:
        adapter: folder of a LoRA or VeRA adapter in peft's format; W + scale * B @ A is computed in float32 for each tensor.
        merge_base: what the adapter is added to: the weights as they are stored ("original", the default), or as olpack's training dequantized
            them ("dequantized").
        name: `general.name` of the files; by default what llama.cpp reads from the model card or the folder's name.
        chat_template: Jinja, goes into the files unchanged in place of the tokenizer's own.
        end_of_turn: the token that ends a turn ("<|im_end|>"), recorded as `tokenizer.ggml.eot_token_id` where it is not the
            eos token. Without it, or where eos is that token already, the tokenizer's own settings stand.
        requantize: take a GGUF that is quantized already, whose dequantized weights are quantized again. An adapter implies it.
        metadata: further string keys for the header ("olpack.version", "general.license"), replacing those of the same name.
        pre_tokenizer: llama.cpp's name of the one that the files name, as a check with texts found it; by default the one that splits a sample
            right.
        importance: an importance matrix of this model in llama.cpp's GGUF form, as `collect_importance` and llama-imatrix write it. It is
            used for every tensor and type that gains by it; a file that gains nothing (Q8_0, F16, BF16, F32) is the same without. "later", in a
            check only: it will be collected on this very model.
        tensor_types: regular expression to tensor type ("attn_v": "q6_K"). The first that is found in a tensor's name decides its type, in
            quantized files; where rows do not fit its blocks, llama.cpp takes another.
        sensitivity: what `measure_sensitivity` wrote of this model. Files whose quant is a budget ("4.6bpw", "5GB") need it.
        rounding: how the blocks of quantized types are made: as ggml makes them ("ggml", the default); with scales that a search finds to give
            the smallest squared error ("search"), weighted by the importance matrix where there is one; or so that each matrix's outputs on rows
            of data change least ("learned"), and by the search where that is not possible.
        scales: for "learned", by quant the files of trained block scales, which take the place of those of its rounded matrices. "later",
            in a check only: they will be trained.
        rounded: for "learned", the folder that `round_matrices` filled for this model and these quants; in a check, the folder that is to contain
            such folders, and may contain those of an interrupted run.
        round_to_bf16: round every tensor that llama.cpp would store in 16 bits to bfloat16 before it is quantized, as the usual
            way over a BF16 file does. The default quantizes the exact float32 values.
        split: most bytes of one file. A larger GGUF becomes several, "model-00001-of-00003.gguf" and so on in place of "model.gguf", which
            llama.cpp loads by the first.
        threads: quantizing threads; by default one for each core that this process may use.
    """

    adapter: Path | None
    merge_base: Literal["original", "dequantized"]
    name: str | None
    chat_template: str | None
    end_of_turn: str | None
    requantize: bool
    metadata: Mapping[str, str]
    pre_tokenizer: str | None
    importance: Path | Literal["later"] | None
    tensor_types: Mapping[str, str]
    sensitivity: Path | None
    rounding: Rounding
    rounded: Path | None
    scales: Mapping[str, Path] | Literal["later"]
    round_to_bf16: bool
    split: int | None
    threads: int | None


@dataclass(frozen=True)
class TokenText:
    """A text with the token ids that training sees for it.

    Attributes:
        source: where it stands, "train.jsonl:17".
        pieces: the text, cut where no token reaches over.
        ids: of all pieces, special tokens included.
        made_up: whether it is none of the user's. No pre-tokenizer is looked for because of it.
    """

    source: str
    pieces: list[str]
    ids: list[int]
    made_up: bool = False


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
        context_length: tokens, from the configuration; None where it names none.
        parameters: weights in the model.
        sizes: exact bytes of each file, by the quant type's name.
        warnings: what the user should know, one sentence each: tensors for which llama.cpp falls back
            to another type, a base that is trained in a lower precision.
        texts: how many texts were given.
        differences: those of them that llama.cpp reads as other tokens than training.
        few_bits: the quants that `RoundedMatrices.few_bits` would have.
    """

    architecture: str
    pre_tokenizer: str
    context_length: int | None
    parameters: int
    sizes: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    texts: int = 0
    differences: list[TokenDifference] = field(default_factory=list)
    few_bits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImportanceCounts:
    """Experts' matrices in a model whose importance matrix was collected.

    Attributes:
        experts: how many there are; 0 where the model has no experts.
        unused: how many of them got no token.
    """

    experts: int
    unused: int


@dataclass(frozen=True)
class RoundedMatrices:
    """Matrices that were rounded by what they are multiplied with.

    Attributes:
        matrices: how many.
        unread: those that no row was multiplied with, or only zeros, and whose scales are searched for.
        damped: those whose second moments needed more damping than others to be positive definite.
        singular: those with more columns than tokens were read, so that their second moments are singular before damping.
        few_bits: for each quant most of whose weights are in Q2_K, Q3_K or Q4_0, the types of its rounded matrices by name. Their block scales can be
            trained (`olpack.train.block_scales`).
    """

    matrices: int
    unread: list[str]
    damped: list[str]
    singular: list[str]
    few_bits: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class SensitivityResult:
    """Whether a measurement of sensitivity ended with figures.

    Attributes:
        finite: all predictions were numbers. In F16 some models overflow.
    """

    finite: bool


def partial_path(path: Path, pid: int) -> Path:
    """Where a file is written until it is complete: beside its final path, with the writing process in its name. Parts are written into
    a folder of this name."""
    return path.with_name(f".{path.name}.{pid}.partial")


def blocks_file(folder: Path, name: str, type_name: str) -> Path:
    """Where `round_matrices` writes the blocks of a matrix in a type."""
    return folder / f"{name}.{type_name}"
