"""The usual way, as the measure of ours: convert_hf_to_gguf.py to a BF16 file, then llama.cpp's quantizer for each type.

    python tests/usual_way.py --out OUT --quants Q4_0,Q4_K_M MODEL_FOLDER...        # writes OUT/MODEL_FOLDER's name/Q4_0.gguf, ...

Only the pre-tokenizer's name is ours, where the tokenizer is one that llama.cpp's table does not have.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from olpack.export.pretokenizer import recognize
from olpack.llamacpp.source import converter_source
from olpack.quants import quant_type


def convert(source: Path, file: Path) -> None:
    """Run llama.cpp's script, unchanged, on a model folder."""
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self, tokenizer):
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            return recognize(source)

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = ["convert_hf_to_gguf.py", "--outtype", "bf16", "--outfile", str(file), str(source)]
    runpy.run_path(str(converter_source() / "convert_hf_to_gguf.py"), run_name="__main__")
    TextModel.get_vocab_base_pre = by_hash


def quantize(source: Path, file: Path, quant: str, imatrix: Path | None = None, tensor_types: Mapping[str, str] = MappingProxyType({})) -> None:
    """What `llama-quantize SOURCE FILE QUANT` does, with its --imatrix, and --tensor-type for each of `tensor_types`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = quant_type(quant).ftype
    if imatrix is not None:
        data, overrides = read_imatrix(imatrix)
        params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(data) + 1))(
            *((name.encode(), weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), weights.size) for name, weights in data.items())
        )
        params.kv_overrides = overrides
    if tensor_types:
        params.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))(
            *((pattern.encode(), getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")) for pattern, name in tensor_types.items())
        )
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not make {quant}")


def read_imatrix(file: Path):
    """What llama-quantize reads from a matrix: weights by tensor name, and the keys that it adds."""
    import gguf
    import llama_cpp
    import numpy as np

    reader = gguf.GGUFReader(file)
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    data = {}
    for name in sorted(key.removesuffix(".counts") for key in arrays if key.endswith(".counts")):
        sums, counts = arrays[f"{name}.in_sum2"].reshape(arrays[f"{name}.counts"].size, -1), arrays[f"{name}.counts"].reshape(-1, 1)
        data[name] = np.ascontiguousarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)), np.float32)
    chunks = int(reader.fields["imatrix.chunk_count"].contents())
    keys = {"file": file.name, "dataset": reader.fields["imatrix.datasets"].contents()[0], "entries_count": len(data)}
    keys |= {"chunks_count": chunks} if chunks else {}
    overrides = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(overrides, keys.items(), strict=False):
        override.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            override.tag, override.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
        else:
            override.tag, override.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return data, overrides


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quants", required=True)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.path[:0] = [str(converter_source()), str(converter_source() / "gguf-py")]
    for model in arguments.models:
        out = arguments.out / model.name
        out.mkdir(parents=True, exist_ok=True)
        convert(model, out / "BF16-intermediate.gguf")
        for quant in arguments.quants.split(","):
            quantize(out / "BF16-intermediate.gguf", out / f"{quant}.gguf", quant)


if __name__ == "__main__":
    main()
