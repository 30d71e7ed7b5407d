"""Checks of a recipe's adapter on its base, before anything is loaded; and which merge each kind of base allows."""

from __future__ import annotations

import re
from dataclasses import dataclass

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.packed import HQQ_GROUP
from olpack.model.quantized import method_of, quantization_method, quantization_of
from olpack.model.shape import MetaModel, adapter_shapes
from olpack.recipe import Train
from olpack.train.planner import SHARDABLE

_TOWERS = re.compile("vision|visual|audio|projector|embed_vision")  # of models that see or hear: not trained, and not exported
_TAKE_ORIGINAL = "Take the original model in 16 bits as base; `train.quantization` quantizes it to 4 or 8 bits."


@dataclass(frozen=True)
class BaseKind:
    """A form of the frozen base weights.

    Attributes:
        name: in words.
        recipe: the value of `train.quantization`; for a base that comes so, the `quant_method` of its config.json.
        bits: of a weight in a linear layer, constants included.
        original, dequantized: whether an adapter can be merged into the original weights, and into the dequantized ones.
    """

    name: str
    recipe: str
    bits: str
    original: bool
    dequantized: bool


BASE_KINDS = (
    BaseKind("NF4", "`nf4`", "4.13; 4.5 without double quantization", True, True),
    BaseKind("FP4", "`fp4`", "4.13; 4.5 without double quantization", True, True),
    BaseKind("LLM.int8", "`int8`", "8", True, True),
    BaseKind("HQQ, 4 bits", "`hqq4`", "4.5", True, True),
    BaseKind("HQQ, 8 bits", "`hqq8`", "8.5", True, True),
    BaseKind("unquantized", "`none`", "16; 32 on a CPU", True, False),
    BaseKind("GPTQ", "comes so: gptq", "2, 4 or 8, and scales", False, True),
    BaseKind("AWQ (gemm)", "comes so: awq", "4, and scales", False, True),
    BaseKind("AQLM", "comes so: aqlm", "about 2 to 4", False, True),
    BaseKind("EETQ", "comes so: eetq", "8", False, True),
    BaseKind("HQQ", "comes so: hqq", "1, 2, 4 or 8, and scales", False, True),
    BaseKind("fp8", "comes so: fp8", "8", False, True),
    BaseKind("compressed-tensors", "comes so: compressed-tensors", "4 or 8, and scales", False, True),
    BaseKind("bitsandbytes", "comes so: bitsandbytes", "4 or 8, and scales", False, True),
    BaseKind("GGUF", "comes so: gguf", "those of the file", False, True),
)


def merge_table() -> str:
    """Markdown: which base kind is merged where."""
    columns = ("base", "in the recipe", "bits per weight", "merged into the original weights", "into the dequantized weights of training")
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for kind in BASE_KINDS:
        original = "yes, by default" if kind.original else "those are not in the checkpoint"
        seen = "`merge_base: dequantized`" if kind.original and kind.dequantized else "yes, always" if kind.dequantized else "they are the same"
        lines.append(f"| {kind.name} | {kind.recipe} | {kind.bits} | {original} | {seen} |")
    return "\n".join(lines) + "\n"


def check_training(base: Base, settings: Train, *, on_gpu: bool) -> None:
    """Refuse now what could not be trained or exported later. Reads config.json and headers.

    Raises:
        OlpackError: a module that the base does not have or that cannot be trained so, a base that cannot be quantized or read, a method that does
            not work on the base's quantization.
    """
    from olpack.train.adapter import adapter_config

    meta = MetaModel(base.config, base.label)
    adapter_config(base, settings)
    if quantization_of(base.config):
        _check_quantized(base, settings, on_gpu)
    elif settings.quantization in ("hqq4", "hqq8"):
        for name, (rows, columns) in adapter_shapes(meta).items():
            if columns % HQQ_GROUP or rows * columns // HQQ_GROUP % 2:
                raise OlpackError(
                    f"HQQ quantizes groups of {HQQ_GROUP} weights of a row, and '{name}' of {base.label} is {rows} × {columns}.",
                    "Set `train.quantization` to nf4 or int8.",
                )
    _refuse_lacking(base, meta)
    if settings.sharding == "full" and (quantization_of(base.config) or settings.quantization not in SHARDABLE):
        raise OlpackError(
            "Only frozen layers in nf4, fp4 or 16 bits can be sharded over GPUs (`train.sharding: full`).",
            "Set `train.sharding: none`, or `train.quantization` to nf4.",
        )
    if settings.products == "fp8":
        _check_fp8(settings)
    if settings.method == "dora" and settings.quantization == "int8" and not on_gpu and not quantization_of(base.config):
        raise OlpackError(
            "DoRA on an int8 base needs a GPU: on a CPU peft loses the scales of int8 when it looks at their norms.",
            "Set `train.quantization` to nf4 or hqq8, or `train.method` to lora.",
        )
    if (begins := settings.initialization) != "default":
        for name, shape in adapter_shapes(meta, settings.target_modules).items():
            if settings.rank > min(shape):
                raise OlpackError(
                    f"`train.initialization: {begins}` takes {settings.rank} singular values, and '{name}' has {min(shape)}.",
                    f"Lower `train.rank` to {min(shape)} or less.",
                )


def _check_fp8(settings: Train) -> None:
    from olpack.train.device import pick_device
    from olpack.train.planner import multiplies_fp8

    if not multiplies_fp8(pick_device()):
        raise OlpackError("This machine has no GPU that multiplies in fp8 (Ada, Hopper or later).", "Set `train.products: auto` or `bf16`.")
    if settings.method not in ("lora", "rslora") or settings.dropout:
        raise OlpackError(
            "Products in fp8 are for lora and rslora without dropout.", "Set `train.products: bf16`, or `train.method: lora` and `train.dropout: 0`."
        )
    if settings.sharding == "full":
        raise OlpackError(
            "Frozen layers that are sharded over GPUs are not multiplied in fp8.", "Set `train.products: bf16`, or `train.sharding: none`."
        )


def _refuse_lacking(base: Base, meta: MetaModel) -> None:
    """Raises OlpackError for a weight of the text model that the checkpoint lacks: transformers would fill it with random numbers.

    A GGUF that opens as a base lacks none, and stacks experts that a checkpoint has one by one.
    """
    if base.gguf is not None:
        return
    lacking = [name for name in meta.lacking(base.tensor_headers()) if not _TOWERS.search(name)]
    if lacking:
        more = f" and {len(lacking) - 1} more weights" if len(lacking) > 1 else ""
        tied = "lm_head.weight" in lacking
        raise OlpackError(
            f"{base.label} has no '{lacking[0]}'{more}: training would begin with random numbers there.",
            "Set `tie_word_embeddings` to true in config.json if the model has no output layer of its own, else fetch the model again."
            if tied
            else "Fetch the model again, or take another base.",
        )


def _check_quantized(base: Base, settings: Train, on_gpu: bool) -> None:
    name, method = quantization_method(base.config), method_of(base.config)
    base.tensor_headers()  # which refuses what cannot be read, with the reason
    if base.gguf is None and (method is None or not method.trains):
        raise OlpackError(f"{base.label} is quantized by {name}, which olpack exports and does not train on.", _TAKE_ORIGINAL)
    if settings.initialization != "default":
        raise OlpackError(
            f"`train.initialization: {settings.initialization}` begins with the original weights, and {base.label} comes quantized ({name}).",
            "Set it to `default`, or take the original model in 16 bits as base.",
        )
    if settings.merge_base == "dequantized":
        raise OlpackError(
            f"{base.label} comes quantized ({name}): its adapter is always merged into the dequantized weights.",
            "Leave out `train.merge_base`.",
        )
    in_8_bits = method is not None and method.dequantizer == "bitsandbytes" and quantization_of(base.config).get("load_in_8bit")
    if in_8_bits and settings.method == "dora" and not on_gpu:
        raise OlpackError("DoRA on an int8 base needs a GPU: on a CPU peft loses the scales of int8.", "Set `train.method` to lora.")


if __name__ == "__main__":
    print(merge_table(), end="")
