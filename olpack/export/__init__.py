"""From a base model and an adapter to GGUF files, in one pass over the base's tensors and without an intermediate file.

    plan = check_export(base, ["Q4_K_M", "Q8_0"], adapter=adapter)        # seconds; reads headers only
    files = export(base, [Target("Q4_K_M", Path("out.gguf"))], adapter=adapter)
    size, sha256 = export_adapter(base, adapter, Path("adapter.gguf"))    # the adapter by itself (olpack.export.lora)

llama.cpp's own converter names and reshapes the tensors, llama.cpp's own quantizer chooses their types and makes their bytes.
Both run in a worker process: the converter needs its own `gguf` package, which must not replace the one in this process, and
neither a crash of the native code nor the memory of the export reaches the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from olpack.export.job import ExportedFile, ExportedPart, ExportOptions, ExportPlan, RoundedMatrices, Target, TokenDifference, TokenText, blocks_file
from olpack.quants import Rounding

__all__ = [
    "ExportOptions",
    "ExportPlan",
    "ExportedFile",
    "ExportedPart",
    "RoundedMatrices",
    "Target",
    "TokenDifference",
    "TokenText",
    "blocks_file",
    "check_export",
    "collect_importance",
    "export",
    "measure_sensitivity",
    "round_matrices",
]


def check_export(
    source: Path,
    quants: Sequence[str],
    *,
    temporary: Sequence[str] = (),
    out: Path | None = None,
    texts: Sequence[TokenText] = (),
    **options: Unpack[ExportOptions],
) -> ExportPlan:
    """Find whatever would fail in an export, before anything is trained. Takes seconds and writes nothing.

    Args:
        source: folder of a Hugging Face model (config.json, tokenizer, safetensors), or a GGUF in F16, BF16 or F32.
        quants: quant types, in any case.
        temporary: further ones, whose files are removed once they were read. Nothing is warned of for them.
        out: folder that the files will go to; its free space is checked when given.
        texts: what training tokenizes; llama.cpp's tokens of each are compared with training's.
        options: as for `export`.

    Raises:
        OlpackError: no model folder, no tokenizer, pickle weights only, a truncated or missing safetensors file, an architecture
            or a pre-tokenizer that llama.cpp does not know, weights quantized in a form that cannot be read, weights of another shape than
            config.json has or not all of them, a tokenizer larger than the embedding, an end of turn that is no token, a name under which
            llama.cpp would not load the model, text that a header cannot contain, an unknown quant type, one that needs an importance matrix
            and gets none, a matrix for another model, types for tensors that the model does not have, an adapter for another base, too
            little space.
    """
    from olpack.export.client import worker

    with worker() as converter:
        return converter.check(source, quants, temporary=temporary, out=out, texts=texts, **options)


def export(source: Path, targets: Sequence[Target], **options: Unpack[ExportOptions]) -> list[ExportedFile]:
    """Write every target in one pass. All of them appear under their names when all are complete, or none does.

    Without adapter, name, template and metadata, a file equals byte for byte what llama.cpp's `convert_hf_to_gguf.py --outtype bf16`
    and then `llama-quantize` make, provided that the base is stored in bfloat16 or `round_to_bf16` is set.

    Args:
        source: folder of a Hugging Face model (config.json, tokenizer, safetensors), or a GGUF in F16, BF16 or F32. Weights stored by GPTQ,
            AWQ, HQQ, AQLM, bitsandbytes, compressed-tensors or in fp8 are dequantized first (olpack.export.quantized).
        targets: the files to write, each with another path.
        options: see `ExportOptions`. An adapter needs a folder as source.

    Returns:
        One entry per target, in the order of the targets.

    Raises:
        OlpackError: all that `check_export` raises, an infinite or undefined weight, a disk that fills up. Nothing is written then.
    """
    from olpack.export.client import worker

    with worker() as converter:
        return converter.export(source, targets, **options)


def collect_importance(gguf: Path, rows: Sequence[Sequence[int]], out: Path, *, dataset: str, threads: int | None = None) -> None:
    """Run a model over text, and write the importance of each column of its weights for it: an importance matrix in llama.cpp's GGUF form.

    Args:
        gguf: the model, best in 16 or 8 bits.
        rows: token ids, each row read from an empty context. Every token counts, so give whole rounds of chat as training renders them.
        out: where the matrix goes. An existing file is replaced once the new one is complete.
        dataset: what the rows are called in it.
        threads: CPU threads; by default the physical cores that this process may use.

    Raises:
        OlpackError: no rows, a GGUF that llama.cpp cannot run, or one that computes no numbers.
    """
    from olpack.export.client import worker

    with worker() as converter:
        converter.collect(gguf, rows, out, dataset=dataset, threads=threads)


def round_matrices(
    source: Path, quants: Sequence[str], gguf: Path, rows: Sequence[Sequence[int]], folder: Path, **options: Unpack[ExportOptions]
) -> RoundedMatrices:
    """Round the matrices of a model's layers so that their outputs on rows of text change least, for an export with `rounding: "learned"`.

    What is written stays there, so a later call with the same folder goes on where it was. Its name must tell apart what the blocks depend on:
    model, adapter and rows.

    Args:
        source, quants, options: as for the `export` that follows, which gets the folder as `rounded`.
        gguf: the same model, adapter included, best in 16 or 8 bits. It reads the rows once for as many layers as the memory has room for.
        rows: token ids, each row read from an empty context. Every token counts.
        folder: for the blocks, which take as much space as the matrices in the files.

    Raises:
        OlpackError: as `export`; no rows; a GGUF that llama.cpp cannot run, or one that computes no numbers; too little space.
    """
    from olpack.export.client import worker

    with worker() as converter:
        return converter.round(source, quants, gguf, rows, folder, **options)


def measure_sensitivity(
    gguf: Path,
    rows: Sequence[Sequence[int]],
    loss_masks: Sequence[Sequence[bool]],
    out: Path,
    *,
    key: str,
    importance: Path | None = None,
    rounding: Rounding = "ggml",
    calibration: Sequence[Sequence[int]] = (),
    threads: int | None = None,
) -> bool:
    """Measure how far a model's predictions move when one of its matrices is rounded, for one matrix after the other.

    What was measured is kept after each matrix, and a later call with the same key goes on from there.

    Args:
        gguf: the model in F16 or BF16. It is loaded as a whole.
        rows: token ids, each row read from an empty context, once for each matrix.
        loss_masks: for each row one flag per id: True where the token is a target token, whose prediction counts.
        out: where the figures go, in JSON.
        key: tells apart what the figures depend on: model, rows, importance matrix.
        importance: the importance matrix with which the files will be quantized.
        rounding: how they will be quantized, as in `ExportOptions`.
        calibration: the rows of `round_matrices`, where that is "learned".
        threads: CPU threads of the passes; by default the physical cores that this process may use.

    Returns:
        False where the model's predictions are no numbers, as in F16 where that overflows; then nothing is written.

    Raises:
        OlpackError: a GGUF that llama.cpp cannot run, a matrix of importance for another model, a disk that fills up.
    """
    from olpack.export.client import worker

    with worker() as converter:
        return converter.measure(
            gguf, rows, loss_masks, out, key=key, importance=importance, rounding=rounding, calibration=calibration, threads=threads
        )
