"""`olpack quantize`: a model to quants in one pass, with no recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from olpack import printable, progress
from olpack.errors import OlpackError
from olpack.export import ExportedFile, ExportOptions, Target, check_export, export, round_matrices
from olpack.export.client import one_worker
from olpack.quants import Rounding, bytes_of, gains_by_importance, quant_type
from olpack.recipe import Export
from olpack.workspace import remove


def quantize(
    source: str,
    quants: Sequence[str],
    *,
    adapter: Path | None = None,
    out: Path = Path(),
    name: str | None = None,
    split: str | None = None,
    importance: Path | None = None,
    rounding: Rounding = "ggml",
    rows: Path | None = None,
    scale_steps: int | None = None,
) -> list[ExportedFile]:
    """Write NAME-QUANT.gguf for every quant.

    Args:
        source: a model's folder, a GGUF in F16, BF16 or F32, builtin/tiny-coder, or a Hub id.
        quants: quant types, in any case.
        adapter: folder of a LoRA adapter in peft's format, merged on the way. Not with a GGUF.
        out: folder for the files.
        name: of the model, also in the files' header; by default the source's.
        split: most bytes of one file, such as "4GB".
        importance: an importance matrix of this model, in llama.cpp's GGUF form.
        rounding: how blocks are made, as in a recipe's `export.rounding`.
        rows: chats or texts in a form of `data.train`, for the rounding "learned", as which they are rendered.
        scale_steps: as in a recipe's `export.scale_steps`, and by default the same.

    Raises:
        OlpackError: what `olpack.export.export` refuses, no such source, an unknown quant or size, wrong rows or too few.
    """
    names = list(dict.fromkeys(quant_type(quant).name for quant in quants))
    limit = None if split is None else bytes_of(split)
    path, found = _find(source)
    title = name or (found if not path.is_file() and path.name != found else None)  # the folder of a Hub model is named after its commit
    file_name = name or found
    if Path(file_name).name != file_name:
        raise OlpackError(f"'{file_name}' cannot be a file's name.", "Give another one with --name.")
    targets = [Target(quant, out / f"{file_name}-{quant}.gguf") for quant in names]
    if path.is_file() and path.resolve() in (target.path.resolve() for target in targets):
        raise OlpackError(f"'{source}' would be replaced by what is made from it.", "Give another folder with --out, or another --name.")
    options: ExportOptions = {"adapter": adapter, "name": title, "split": limit, "importance": importance, "rounding": rounding}
    work = out / f".{file_name}.rounding"
    if rounding == "learned":
        remedy = "Name a file of chats or texts: --rows FILE."
        if rows is None:
            raise OlpackError("`--rounding learned` reads rows of data, and none are named.", remedy)
        if not rows.exists():
            raise OlpackError(f"There is no '{rows}'.", remedy)
    elif rows is not None:
        raise OlpackError("`--rows` names rows for `--rounding learned`.", "Set that, or leave --rows out.")
    elif scale_steps is not None:
        raise OlpackError("`--scale-steps` is of `--rounding learned`.", "Set that, or leave --scale-steps out.")
    with one_worker():
        if rows is not None:
            steps = Export().scale_steps if scale_steps is None else scale_steps
            options |= _round_on_rows(source, path, names, rows, work, options, steps)
        files = export(path, targets, **options)
    remove(work)
    for warning in files[0].warnings if files else ():
        progress.warn(warning)
    return files


def _round_on_rows(source: str, path: Path, quants: Sequence[str], file: Path, work: Path, options: ExportOptions, scale_steps: int) -> ExportOptions:
    """Round the matrices of some quants on rows and train their block scales, or go on where that was interrupted.

    Args:
        path: of the source's folder or GGUF.
        work: folder of what is there until the quants are complete.

    Returns:
        Options that say where blocks and scales are.
    """
    from olpack.data import Renderer, Source, load_chats, render_rows
    from olpack.deploy.bases import resolve_base
    from olpack.stages.calibration import blocks_folder, check_scales_memory, rounded_on, rounding_rows, train_scales
    from olpack.workspace import folder_fingerprint

    if not any(gains_by_importance(quant_type(quant), {}) for quant in quants):
        return {}
    base = resolve_base(source, relative_to=Path())
    rendered, _ = render_rows(load_chats(Source(file)), [], Renderer(base.tokenizer(), base.end_ids()), max_length=base.context_length)
    chosen = rounding_rows(rendered)
    adapter = options.get("adapter")
    reader = path if path.is_file() and not adapter else work / "source.gguf"
    checked: ExportOptions = {**options, "rounded": work, "scales": "later" if scale_steps else {}}
    checked_export = check_export(path, quants, temporary=[] if reader == path else ["Q8_0"], out=work.parent, **checked)
    check_scales_memory(checked_export, scale_steps, base)
    folder = blocks_folder(work, [base.digest, folder_fingerprint(adapter) if adapter else None], chosen)
    try:
        if reader != path:
            export(path, [Target("Q8_0", reader)], adapter=adapter)
        made = round_matrices(path, quants, reader, [row.ids for row in chosen], folder, **options)
        progress.say(rounded_on(made, chosen))
        scales = train_scales(reader, made, rendered, folder, scale_steps)
    finally:
        if reader != path:
            remove(reader)
    return {"rounded": folder, "scales": scales}


def _find(source: str) -> tuple[Path, str]:
    """(where a source is, what it is called)."""
    path = Path(source).expanduser()
    if path.is_file():
        return path, path.stem
    from olpack.deploy.bases import resolve_base

    base = resolve_base(source, relative_to=Path())
    return base.source, (base.path.resolve().name if path.is_dir() else source.rpartition("/")[2].replace(":", "-").removesuffix(".gguf"))


def as_plain_data(files: Sequence[ExportedFile]) -> list[dict[str, Any]]:
    """The files as JSON takes them."""
    made = []
    for file in files:
        fields = {**asdict(file), "path": str(file.path), "parts": [{**asdict(part), "path": str(part.path)} for part in file.parts]}
        made.append(fields)
    return made


def print_files(files: Sequence[ExportedFile]) -> None:
    """One row for each file."""
    from rich import box
    from rich.table import Table

    from olpack.progress import quantity

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("quant")
    table.add_column("size", justify="right")
    table.add_column("bits per weight", justify="right")
    table.add_column("path", overflow="fold")
    for file in files:
        paths = [part.path for part in file.parts] or [file.path]
        shown = [str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path) for path in paths]
        table.add_row(file.quant, quantity(file.size, "B"), f"{file.bits_per_weight:.2f}", "\n".join(shown))
    printable.console().print(table, highlight=False)
