"""Ask llama.cpp what a model would take: it loads the header, lays out the KV cache and reserves the compute graph, and allocates nothing.

Runs in the worker process only: a header that llama.cpp does not expect can end the process.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import psutil

from olpack.errors import OlpackError
from olpack.llamacpp.library import captured_log, load_llama_cpp, tensor_type

_MIB = 1 << 20
_CACHE = re.compile(r"^llama_kv_cache: size =\s*([\d.]+) MiB \(\s*(\d+) cells")
_CACHE_LAYER = re.compile(r"^llama_kv_cache: layer\s+(\d+): dev = ")
_STATE = re.compile(r"^(?:llama_memory_recurrent: size|.*state buffer size) =\s*([\d.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size =\s*([\d.]+) MiB")
_OUTPUT = re.compile(r"output buffer size =\s*([\d.]+) MiB")
_INFO = re.compile(r"^print_info: (\w+)\s*= (.*)$")
_LAYER = re.compile(r"^load_tensors: layer\s+(\d+) assigned to device .*is_swa = 1")


def dry_run(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp reports of one file.

    Args:
        path: a GGUF, whose data may be a hole.
        setting: the fields of a `footprint.Setting`.

    Returns:
        `info`: what llama.cpp prints of the model, as text; `sliding`: layers with a sliding window; `caches`: [bytes, cells, layers] of
        each KV cache; `state_bytes`: of recurrent layers; `compute_bytes`; `output_bytes`; `process_bytes`: by how much the resident set
        grew for all else (vocabulary, bookkeeping, the graph's nodes); `flash`: whether flash attention is used.

    Raises:
        OlpackError: llama.cpp refuses the file or the setting, in its own words.
    """
    llama = load_llama_cpp()
    before = psutil.Process().memory_info().rss
    with captured_log() as log:
        params = llama.llama_model_default_params()
        params.no_alloc, params.load_mode = True, llama.LLAMA_LOAD_MODE_NONE
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    lines = "".join(log).splitlines()
    if not model:
        raise OlpackError(f"llama.cpp cannot load {path.name}: {_reason(lines)}.", "Make the file again, or take another model.")
    try:
        run = _run(llama, model, setting, before)
        sliding = [int(match[1]) for match in map(_LAYER.match, lines) if match]
        return {"info": {match[1]: match[2] for match in map(_INFO.match, lines) if match}, "sliding": sliding, **run}
    finally:
        llama.llama_model_free(model)


def _run(llama, model, setting: dict[str, Any], before: int) -> dict[str, Any]:
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = setting["context"], setting["micro_batch"], setting["micro_batch"]
    params.n_outputs_max = setting["outputs"]
    params.swa_full = False  # as llama.cpp's server has it: a sliding layer keeps its window, not the whole context
    params.type_k = params.type_v = tensor_type(setting["kv_type"])
    if setting["flash_attention"] is not None:
        params.flash_attn_type = int(setting["flash_attention"])
    with captured_log() as log:
        context = llama.llama_init_from_model(model, params)
    lines = "".join(log).splitlines()
    if not context:
        raise OlpackError(
            f"llama.cpp cannot make a context of {setting['context']:,} tokens: {_reason(lines)}.", "Try a shorter context, or a KV cache in f16."
        )
    grown = psutil.Process().memory_info().rss - before
    llama.llama_free(context)
    caches, layers = [], []
    for line in lines:
        if match := _CACHE_LAYER.match(line):
            layers.append(int(match[1]))
        elif match := _CACHE.match(line):
            caches.append([round(float(match[1]) * _MIB), int(match[2]), layers])
            layers = []
    state = _total(_STATE, lines)  # the one buffer that is really allocated
    return {
        "caches": caches,
        "state_bytes": state,
        "process_bytes": max(0, grown - state),
        "compute_bytes": _total(_COMPUTE, lines),
        "output_bytes": _total(_OUTPUT, lines),
        "flash": setting["flash_attention"] is True or any("Flash Attention enabled" in line for line in lines),
    }


def _total(pattern: re.Pattern, lines: list[str]) -> int:
    return round(sum(float(match[1]) for match in map(pattern.search, lines) if match) * _MIB)


def _reason(lines: list[str]) -> str:
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (errors or lines or ["no reason given"])[0].strip().rstrip(".")
