"""An adapter by itself as a GGUF: what llama.cpp's `convert_lora_to_gguf.py` makes of it, for packages in which many assistants share a base.

    export_adapter(base, adapter, Path("build/NAME/gguf/NAME-adapter.gguf"))
    check_adapter(base, {"model.layers.0.self_attn.q_proj": (2048, 1024)})       # before anything is trained

llama.cpp scales an adapter by one alpha over the rank of each of its products. Where peft scales otherwise (rank-stabilized, or with
patterns of ranks and alphas), the rest of the factor is put into B before the conversion.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from olpack import workers
from olpack.errors import OlpackError
from olpack.export.adapter import Adapter, read_adapter
from olpack.llamacpp.source import converter_source
from olpack.model.checkpoint import TensorHeader, read_config, read_tensor_headers
from olpack.model.quantized import dequantized_headers
from olpack.workspace import file_digest, remove, scratch, unfinished

# The script makes a class of its own from that of the base's architecture, which leaves out what the converter does before: it counts the layers of a
# model that predicts ahead, and picks the class that works for Mistral 3.
_SCRIPT = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
folder = pathlib.Path(sys.argv[0]).parent
sys.path[:1] = [str(folder), str(folder / "gguf-py")]
import conversion
known = conversion.get_model_class
def get_model_class(*asked, **named):
    found = known(*asked, **named)
    if found.supports_mtp_export:
        found.no_mtp, found._original_block_count = True, 0
    return getattr(found, "Ministral3Model", found)
conversion.get_model_class = get_model_class
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_TYPE = "f16"  # half the size of float32; its rounding (2^-11) is far below that of any quantized base


def export_adapter(base: Path, adapter: Path, out: Path) -> tuple[int, str]:
    """Write an adapter as a GGUF that llama.cpp and Ollama apply to a GGUF of the base. It appears under its name when it is complete.

    Args:
        base: folder of the base model, or its GGUF; only its configuration and its tensors' headers are read.
        adapter: folder of a LoRA adapter in peft's format.
        out: the file.

    Returns:
        (bytes, SHA-256 in hex).

    Raises:
        OlpackError: an adapter for another base, one with tensors trained as a whole, or one that llama.cpp cannot apply by itself.
    """
    config, headers = _described(base)
    change = read_adapter(adapter, headers)
    if change.tokens or change.untied or any(product.stack for product in change.low_rank.values()):
        raise OlpackError(
            f"The adapter '{adapter}' changes tokens, experts or an output layer that is the base's embedding, and llama.cpp's adapters cannot.",
            "Set `package: merged`.",
        )
    if change.replaced:
        raise OlpackError(
            f"The adapter '{adapter}' replaces '{sorted(change.replaced)[0]}' as a whole, and llama.cpp's adapters only add to weights.",
            "Set `package: merged`, or train without modules_to_save.",
        )
    if any(product.magnitude for product in change.low_rank.values()):
        raise OlpackError(
            f"The adapter '{adapter}' is a DoRA, which scales the base's weights, and llama.cpp's adapters only add to weights.",
            "Set `package: merged`, or train without use_dora.",
        )
    if any(product.vectors for product in change.low_rank.values()):
        raise OlpackError(
            f"The adapter '{adapter}' is a VeRA, whose vectors stand between shared matrices, and llama.cpp's adapters are products of two matrices.",
            "Set `package: merged`, or train with method lora.",
        )
    with scratch() as place:
        plain = _plain(adapter, change, place / adapter.name)
        if config.pop("quantization_config", None):
            base = _without_weights(base, config, place / "base" / base.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(out, "partial")
        remove(partial)
        try:
            _convert(base, plain, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    return out.stat().st_size, file_digest(out)


def check_adapter(base: Path, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse, before anything is trained, an adapter that llama.cpp could not apply by itself: one of rank 1 is made and converted.

    Args:
        base: folder of the base model, or its GGUF.
        layers: the linear layers that the adapter will be on, module name to (rows, columns).

    Raises:
        OlpackError: as `export_adapter`.
    """
    import torch
    from safetensors.torch import save_file

    with scratch() as place:
        folder = place / "adapter"
        folder.mkdir()
        tensors = {}
        for name, (rows, columns) in layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(1, columns)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(rows, 1)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        export_adapter(base, folder, place / "adapter.gguf")


def _plain(folder: Path, adapter: Adapter, scratch: Path) -> Path:
    """The adapter in a form in which every product is scaled by `lora_alpha` over its rank; the folder itself where it is so already."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(str(adapter.file), framework="pt") as file:
        rank = {change.b: file.get_slice(change.b).get_shape()[-1] for change in adapter.low_rank.values()}
        rest = {change.b: change.scale * rank[change.b] / config["lora_alpha"] for change in adapter.low_rank.values()}
        if all(abs(factor - 1) < 1e-6 for factor in rest.values()):
            return folder
        tensors = {key: file.get_tensor(key) * rest.get(key, 1.0) for key in file.keys()}  # noqa: SIM118 — the handle is no dict
    scratch.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch / "adapter_model.safetensors")
    (scratch / "adapter_config.json").write_text(json.dumps(config))
    return scratch


def _described(base: Path) -> tuple[dict, dict[str, TensorHeader]]:
    """(config.json's fields, tensors) of a base."""
    if base.is_file():
        from olpack.model.gguf_architectures import config_of, tensor_headers
        from olpack.model.gguf_base import open_gguf

        opened = open_gguf(base)
        return config_of(opened), tensor_headers(opened)
    config = read_config(base)
    return config, dequantized_headers(base, config, read_tensor_headers(base))


def _without_weights(base: Path, config: dict, scratch: Path) -> Path:
    """A base's folder without its weights: llama.cpp's script refuses bases by the form of their weights, and an adapter needs none."""
    scratch.mkdir(parents=True)
    for file in base.iterdir() if base.is_dir() else ():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copyfile(file, scratch / file.name)
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return scratch


def _convert(base: Path, adapter: Path, out: Path) -> None:
    script = converter_source() / "convert_lora_to_gguf.py"
    done = subprocess.run(
        workers.program(
            sys.executable,
            "-B",  # as `use_converter` does
            "-c",
            _SCRIPT,
            str(script),
            "--base",
            str(base.absolute()),
            "--outfile",
            str(out.absolute()),
            "--outtype",
            _TYPE,
            str(adapter.absolute()),
        ),
        env={name: value for name, value in workers.environment().items() if name != "PYTHONSAFEPATH"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode or not out.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        reason = next((line for line in reversed(lines) if "Error" in line or "ERROR" in line), lines[-1])
        raise OlpackError(
            f"llama.cpp cannot make an adapter by itself for '{base}': {reason.rstrip('.')}.",
            "Set `package: merged`: what can be merged is not bound to this form.",
        )
