"""Whether llama.cpp's library runs on this machine: a model of one layer, run in a process of its own.

Some compilers make a library that loads, runs F16, and dies as soon as a quantized model runs (GCC 12 on a processor with AMX does).
A crash there would take the whole build with it, after the training, so it is looked for first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

from olpack import workers
from olpack.errors import OlpackError
from olpack.llamacpp.library import INSTALL, library_folder, load_llama_cpp, quantize_rows, row_size, tensor_type
from olpack.workspace import make_user_cache, scratch, user_cache

_WIDTH = 256  # one block of a K-quant


def check_library() -> None:
    """Run a small Q8_0 and Q4_K model unless this very library has passed before. Takes about a second the first time.

    Raises:
        OlpackError: the library is missing, does not load, or crashes.
    """
    passed = _record(library_folder())
    if passed.exists():
        return
    child = subprocess.run(
        workers.command("olpack.llamacpp.probe"),
        env=workers.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    if child.returncode == 0:
        with contextlib.suppress(OSError, OlpackError):  # a cache that cannot be written costs a second each time, no more
            make_user_cache()
            passed.touch()
        return
    raise workers.exit_error(
        "The check whether llama.cpp runs a small quantized model on this machine",
        child.returncode,
        child.stderr,
        f"Install llama.cpp again: {INSTALL}",
        crash_remedy=f"Its library was built for another processor, or miscompiled. Install the portable build: {INSTALL}",
        memory_remedy="Close other programs.",
    )


def _record(folder: Path) -> Path:
    """The file that records that these libraries passed. Its name is a hash of their paths, sizes and times."""
    libraries = sorted(path for path in folder.iterdir() if path.is_file())
    seen = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in libraries)
    return user_cache() / f"llama.cpp-runs-{hashlib.sha256(seen.encode()).hexdigest()[:16]}"


def _run_small_model() -> None:
    import ctypes

    llama = load_llama_cpp()
    with scratch() as folder:
        path = folder / "probe.gguf"
        _write_small_model(path)
        model = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
        if not model:
            raise SystemExit("the model does not load")
        params = llama.llama_context_default_params()
        params.n_ctx = 64
        context = llama.llama_init_from_model(model, params)
        for length in (1, 32):  # one token and many take different ways through the library
            tokens = (llama.llama_token * length)(*range(length))
            if llama.llama_decode(context, llama.llama_batch_get_one(tokens, length)):
                raise SystemExit("the model does not run")
        logits = ctypes.cast(llama.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float * _WIDTH)).contents
        if any(value != value for value in logits):
            raise SystemExit("the model computes no numbers")
        llama.llama_free(context)
        llama.llama_model_free(model)


def _write_small_model(path: Path) -> None:
    """A Llama of one layer without a vocabulary: attention in Q8_0, the rest in Q4_K."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_WIDTH)
    writer.add_tokenizer_model("no_vocab")
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    for name in (
        "token_embd",
        "output",
        *(f"blk.0.{part}" for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    ):
        type_ = tensor_type("q8_0" if "attn" in name else "q4_K")
        values = random.standard_normal((_WIDTH, _WIDTH), np.float32) / 16
        rows = np.empty((_WIDTH, row_size(type_, _WIDTH)), np.uint8)
        quantize_rows(type_, values, rows)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType(type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    _run_small_model()
