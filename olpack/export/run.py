"""Three jobs of the worker: to check an export, to round matrices before it, and to run it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from olpack import progress
from olpack.errors import OlpackError
from olpack.export.adapter import read_adapter
from olpack.export.adapter_tokenizer import adapter_tokenizer
from olpack.export.converter import SourceModel, open_model
from olpack.export.gguf_source import open_source
from olpack.export.importance import ColumnWeights, column_weights
from olpack.export.job import (
    LATER,
    ExportedFile,
    ExportedPart,
    ExportOptions,
    ExportPlan,
    RoundedMatrices,
    TokenDifference,
    TokenText,
    partial_path,
)
from olpack.export.plan import FilePlan, header_only_gguf, plan_files
from olpack.export.rounded import few_bit_matrices, missing_types, packed_size, round_to_files, rounded_files, rounded_types
from olpack.export.shards import split_plan
from olpack.export.size_budget import read_sensitivity
from olpack.export.verify import settle_pretokenizer, training_tokenizer, verify_file, verify_model
from olpack.export.write import write_files
from olpack.llamacpp import gpu_encoder, library
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.grids import GRID_TYPES, HALVES
from olpack.model.checkpoint import check_tokenizer_files, read_config, read_tensor_headers
from olpack.model.gguf_header import part_names
from olpack.model.quantized import dequantized_headers
from olpack.quants import overridable, quant_type
from olpack.workspace import remove

Report = Callable[[int, int], None]

_SCALE_STATE = 28  # bytes of a trained number of a block: its factor, its best value, and what Adam knows of it, twice while that is written
GPU_FROM = 1 << 30  # bytes of weights; of fewer, the CPU makes the quants before a GPU has started


def check(
    source: str, quants: list[str], out: str | None, texts: list[dict], options: ExportOptions, report: Report, temporary: Sequence[str] = ()
) -> ExportPlan:
    """`olpack.export.check_export`, over the pipe."""
    model, plans, _, warnings, differences = _prepare(Path(source), quants, options, temporary, [TokenText(**text) for text in texts], report)
    few_bits = _few_bits(model, plans, options)
    if out is not None:
        paths, sizes = [Path(out, plan.quant.name) for plan in plans], [plan.size for plan in plans]
        if options.get("rounding") == "learned":
            folder = Path(options.get("rounded") or out)
            paths.append(folder / "blocks")
            trained = sum(_scales_size(model, types) for types in few_bits.values()) if options.get("scales") == LATER else 0
            sizes.append(max(0, packed_size(model, rounded_types(model, plans)) + trained - _blocks_size(options)))
        check_space(paths, sizes)
    context = model.key(f"{model.architecture}.context_length")
    return ExportPlan(
        architecture=model.architecture,
        pre_tokenizer=model.key("tokenizer.ggml.pre") or "",
        context_length=None if context is None else int(context),
        parameters=model.parameters,
        sizes={plan.quant.name: plan.size for plan in plans},
        warnings=warnings,
        texts=len(texts),
        differences=differences,
        few_bits=list(few_bits),
    )


def _few_bits(model: SourceModel, plans: Sequence[FilePlan], options: ExportOptions) -> dict[str, dict[str, str]]:
    """As `RoundedMatrices.few_bits`."""
    if options.get("rounding") != "learned":
        return {}
    found = {plan.quant.name: few_bit_matrices(model, plan, options.get("tensor_types", {})) for plan in plans}
    return {quant: types for quant, types in found.items() if types}


def _scales_size(model: SourceModel, types: Mapping[str, str]) -> int:
    """Most bytes of what an interrupted training of the block scales of matrices of some types needs to go on."""
    return sum(_SCALE_STATE * len(HALVES[one]) * (model.tensors[name].elements // GRID_TYPES[one].block) for name, one in types.items())


def _blocks_size(options: ExportOptions) -> int:
    """Bytes of the blocks of an earlier run, in whatever folder of its own: they are used again, or they go when others are made."""
    folder = options.get("rounded")
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) if folder else 0


def round_matrices(
    source: str, quants: list[str], gguf: str, rows: list[list[int]], folder: str, options: ExportOptions, report: Report
) -> RoundedMatrices:
    """`olpack.export.round_matrices`, over the pipe."""
    model, plans, _, _, _ = _prepare(Path(source), quants, options)
    wanted, place = rounded_types(model, plans), Path(folder)
    few_bits = _few_bits(model, plans, options)
    place.mkdir(parents=True, exist_ok=True)
    check_space([place / "blocks"], [packed_size(model, missing_types(place, wanted))])
    made = round_to_files(
        model,
        wanted,
        Path(gguf),
        rows,
        place,
        round_to_bf16=options.get("round_to_bf16", False),
        threads=options.get("threads"),
        report=report,
    )
    matrices = {quant: {name: one for name, one in types.items() if name not in made.unread} for quant, types in few_bits.items()}
    return replace(made, few_bits={quant: types for quant, types in matrices.items() if types})


def export(
    source: str, targets: list[tuple[str, str]], options: ExportOptions, report: Report, gpu: Future[gpu_encoder.GpuEncoder | None] | None = None
) -> list[ExportedFile]:
    """`olpack.export.export`, over the pipe. `gpu`: what `begin_gpu_encoder` returned."""
    started = time.monotonic()
    model, plans, weights, warnings, _ = _prepare(Path(source), [quant for quant, _ in targets], options)
    parameters, keys = model.parameters, dict(model.keys)
    files = [_Output(Path(path), split_plan(plan, options.get("split"))) for plan, (_, path) in zip(plans, targets, strict=True)]
    check_space([path for file in files for path in file.paths], [part.size for file in files for part in file.parts])
    rounded, scales = _rounded(model, plans, options), options.get("scales", {})
    assert scales != LATER  # which is of a check
    total = sum(file.size for file in files)
    try:
        for file in files:
            file.begin()
        encoder = gpu.result() if gpu else None
        digests = write_files(
            model,
            [file.partial for file in files],
            threads=options.get("threads") or usable_processors(),
            round_to_bf16=options.get("round_to_bf16", False),
            importance=weights,
            search=options.get("rounding", "ggml") != "ggml",
            encoder=encoder,
            rounded=rounded,
            scales=[Path(scales[quant]) if quant in scales else None for quant, _ in targets],
            advance=lambda count: report(count, total),
        )
        for file in files:
            verify_file(file.partial, keys)
        for file in files:
            file.finish()
    finally:
        for file in files:
            file.clean()
    seconds = time.monotonic() - started
    exported = []
    for plan, file, of_parts in zip(plans, files, digests, strict=True):
        parts = [ExportedPart(path, part.size, digest) for path, part, digest in zip(file.paths, file.parts, of_parts, strict=True)]
        exported.append(
            ExportedFile(
                quant=plan.quant.name,
                path=file.paths[0],
                size=file.size,
                sha256=of_parts[0],
                parameters=parameters,
                bits_per_weight=8 * plan.data_size / parameters,
                seconds=seconds,
                parts=parts if len(parts) > 1 else [],
                types=plan.types,
                needs_importance=plan.needs_importance,
                warnings=warnings,
                encoder=encoder.used if encoder else "CPU",
            )
        )
    return exported


def begin_gpu_encoder(source: str, options: ExportOptions) -> Future[gpu_encoder.GpuEncoder | None] | None:
    """Start the GPU's encoder in a thread of its own, where it would be used and the weights are worth its start; needs no converter yet."""
    place = Path(source)
    files = [place] if place.is_file() else [file for file in place.glob("*.safetensors") if file.is_file()]  # no link to what is gone
    if options.get("rounding", "ggml") != "ggml" or sum(file.stat().st_size for file in files) < GPU_FROM:
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="gpu")
    future = pool.submit(gpu_encoder.start)
    pool.shutdown(wait=False)
    return future


class _Output:
    """One GGUF under way: the paths of its parts, and their temporary paths until all are complete."""

    def __init__(self, path: Path, parts: list[FilePlan]):
        self.parts = parts
        self.size = sum(part.size for part in parts)
        self._place = partial_path(path, os.getpid())
        if len(parts) == 1:
            self.paths, places = [path], [self._place]
        else:
            self.paths = [path.with_name(name) for name in part_names(path.name, len(parts))]
            places = [self._place / path.name for path in self.paths]  # llama.cpp finds parts by their names alone
        self.partial = list(zip(parts, places, strict=True))

    def begin(self) -> None:
        remove(self._place)
        if len(self.parts) > 1:
            self._place.mkdir()

    def finish(self) -> None:
        """Move every part to its path; the first part last, because it is the one that is opened."""
        for path, (_, place) in reversed(list(zip(self.paths, self.partial, strict=True))):
            place.replace(path)

    def clean(self) -> None:
        remove(self._place)


def _prepare(
    source: Path,
    quants: list[str],
    options: ExportOptions,
    temporary: Sequence[str] = (),
    texts: Sequence[TokenText] = (),
    report: Report = lambda *_: None,
) -> tuple[SourceModel, list[FilePlan], dict[str, np.ndarray], list[str], list[TokenDifference]]:
    """Everything up to the first weight: (model, one plan per quant, weights of the columns by tensor, warnings, texts that differ).

    Quants that are `temporary` have plans after the others, and no warnings.
    """
    types = [quant_type(name) for name in [*quants, *temporary]]
    if options.get("rounding", "ggml") != "ggml":
        library.searcher()  # raises where it cannot be compiled
    warnings: list[str] = []
    folder = source
    header: dict[str, Any] = {name: options.get(name) for name in ("name", "chat_template", "end_of_turn", "metadata")}
    if source.is_file():
        adapter = options.get("adapter")
        model = open_source(source, adapter=None if adapter is None else Path(adapter), requantize=options.get("requantize", False), **header)
    else:
        model, folder = _open_folder(source, options, header, warnings)
    weights = None
    if (importance := options.get("importance")) is not None:
        weights = ColumnWeights(None, {}) if importance == LATER else column_weights(Path(importance), model.tensors)
    losses = read_sensitivity(Path(sensitivity)) if (sensitivity := options.get("sensitivity")) is not None else {}
    tokenizer = training_tokenizer(folder)
    if (settled := options.get("pre_tokenizer")) and "tokenizer.ggml.pre" in model.keys:
        model.keys["tokenizer.ggml.pre"] = replace(model.keys["tokenizer.ggml.pre"], value=settled)
        differences = []
    else:
        differences = settle_pretokenizer(folder, tokenizer, model, texts, report)
    with header_only_gguf(model) as header_gguf:
        plans = plan_files(model, header_gguf, types, importance=weights, tensor_types=options.get("tensor_types", {}), losses=losses)
        warnings += verify_model(folder, tokenizer, header_gguf, model.keys)
    kept = plans[: len(quants)]
    for plan in kept:
        if plan.fallbacks:
            more = f", and {len(plan.fallbacks) - 1} more tensors" if len(plan.fallbacks) > 1 else ""
            warnings.append(f"{plan.quant.name} does not fit this model's shapes everywhere: {plan.fallbacks[0]}{more}.")
    warnings += _rounded_away(model, kept)
    if options.get("rounding") == "learned":
        warnings += _without_gain(model, kept)
    alike: dict[tuple, list[str]] = {}
    for plan in kept:
        alike.setdefault(tuple(plan.tensors), []).append(plan.quant.name)
    for names in alike.values():
        if len(names) > 1:
            warnings.append(f"{' and '.join(names)} have the same type for every tensor of this model: one of them is enough.")
    if weights is None or weights.by_tensor is None:
        return model, plans, {}, warnings, differences
    if unweighted := list(dict.fromkeys(name for plan in kept for name in plan.unweighted)):
        more = f" and {len(unweighted) - 1} more tensors" if len(unweighted) > 1 else ""
        warnings.append(f"The importance matrix lacks {unweighted[0]}{more}, quantized as without one.")
    if weights.unknown:
        more = f" and {len(weights.unknown) - 1} more tensors" if len(weights.unknown) > 1 else ""
        warnings.append(f"The importance matrix also has {weights.unknown[0]}{more}: is it of another model?")
    return model, plans, weights.by_tensor, warnings, differences


def _rounded_away(model: SourceModel, plans: Sequence[FilePlan]) -> list[str]:
    """A warning where an adapter is merged into a file of the types that the base has: rounded to the same steps, small changes are lost."""
    changed = {name: tensor.changed for name, tensor in model.tensors.items() if tensor.changed is not None}
    lossy = [plan.quant.name for plan in plans if changed and 2 * sum(changed.get(name) == type_ for name, type_, _ in plan.tensors) > len(changed)]
    if not lossy:
        return []
    return [
        f"{' and '.join(lossy)} has the steps of the base's own quantization, to which merged weights are rounded back where the adapter changes "
        "them by less than half a step. An adapter on the file loses nothing (`package: adapter`), and other types lose less."
    ]


def _without_gain(model: SourceModel, plans: Sequence[FilePlan]) -> list[str]:
    """A warning where `rounding: learned` changes no matrix of a file."""
    idle = [plan.quant.name for plan in plans if overridable(plan.quant) and not rounded_types(model, [plan])]
    return [f"`rounding: learned` gains nothing for {' and '.join(idle)}: none of its types leaves a choice that counts."] if idle else []


def _rounded(model: SourceModel, plans: Sequence[FilePlan], options: ExportOptions) -> dict[tuple[str, int], Path]:
    """The files of blocks that were made before, by matrix and tensor type."""
    wanted = rounded_types(model, plans) if options.get("rounding") == "learned" else {}
    if not wanted:
        return {}
    if (folder := options.get("rounded")) is None:
        raise OlpackError(
            "`rounding: learned` rounds matrices by what they are multiplied with on rows of data, and there are none.",
            "Give rows to `olpack quantize` with --rows.",
        )
    return rounded_files(Path(folder), wanted)


def _open_folder(source: Path, options: ExportOptions, header: dict, warnings: list[str]) -> tuple[SourceModel, Path]:
    """(the model, the folder of its tokenizer)."""
    config = read_config(source)
    check_tokenizer_files(source)
    headers = dequantized_headers(source, config, read_tensor_headers(source))
    if (adapter := options.get("adapter")) is None:
        return open_model(source, **header), source
    tied = config.get("text_config", config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is True
    change = read_adapter(Path(adapter), headers, dequantized=options.get("merge_base") == "dequantized", tied=tied)
    tokenizer, warning = adapter_tokenizer(Path(adapter), source, change, headers)
    if warning:
        warnings.append(warning)
    return open_model(source, adapter=change, tokenizer=tokenizer, **header), tokenizer or source


def check_space(paths: list[Path], sizes: list[int]) -> None:
    """Raises OlpackError if the disks of `paths` have too little free space for files of these sizes."""
    wanted: dict[int, int] = {}
    place: dict[int, Path] = {}
    for path, size in zip(paths, sizes, strict=True):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        device = folder.stat().st_dev
        place[device] = folder
        wanted[device] = wanted.get(device, 0) + size
    for device, needed in wanted.items():
        free = shutil.disk_usage(place[device]).free
        if needed > free:
            raise OlpackError(
                f"The files need {progress.quantity(needed, 'B')} in '{place[device]}', and {progress.quantity(free, 'B')} are free.",
                "Free space, name another folder, or choose fewer quant types.",
            )
