"""A GGUF as a frozen model of transformers, whose linear layers and experts stay in the blocks of the file.

    model = load_frozen(base.gguf, torch.device("cpu"), torch.float32)

The embedding, the output layer and the norms are dequantized once. On a CPU the blocks are those of the mapped file, but for layers whose rows
llama.cpp's converter permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from olpack.model.gguf_architectures import Weight, config_of, rope_factors, weights_of
from olpack.model.gguf_base import GgufBase, GgufTensor
from olpack.model.shape import MetaModel, Shape
from olpack.train.block_experts import BlockExperts
from olpack.train.frozen import BlockLinear, Make, use_frozen

# Parameters of stacked experts, and the buffers of `BlockExperts` for each.
_EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def load_frozen(base: GgufBase, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model, without gradients, in evaluation mode.

    Args:
        dtype: that it computes in.

    Raises:
        OlpackError: an architecture that olpack does not train on from a GGUF, or tensors that do not fit it.
    """
    fields = config_of(base)
    meta = MetaModel(fields, str(base.paths[0]))
    weights = weights_of(base, meta.module)
    frozen = _frozen(meta, weights)
    config = AutoConfig.for_model(**{key: value for key, value in fields.items() if key != "quantization_config"})
    layers: dict[str, Make] = {}
    tensors: dict[str, _Lazy] = {}
    for name, weight in weights.items():
        if name not in frozen:
            tensors[name] = _Lazy("F32", partial(weight.read, base, dtype))
            continue
        module, _, end = name.rpartition(".")
        if end == "weight":
            layers[module] = partial(_block_linear, base.tensors[weight.tensors[0]], dtype)
        else:
            stacks = {part: base.tensors[tensor] for each in _EXPERTS for part, tensor in _stacks(weights, module, each)}
            layers[module] = partial(_block_experts, stacks, dtype)
        for part, tensor in _stacks(weights, module, end):
            tensors[f"{module}.{part}"] = _Lazy("U8", partial(_rows, base, weight, tensor))
    use_frozen(config, layers, dtype)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = type(meta.module).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, device_map={"": device})
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    if (factors := rope_factors(base)) is not None:
        for name, frequencies in model.named_buffers():
            if name.endswith("inv_freq"):
                frequencies.div_(factors.to(device))
    return model.eval()


class _Lazy:
    """A tensor that is read when transformers asks for it, in the place of a slice of safetensors."""

    def __init__(self, dtype: str, read: Callable[[], torch.Tensor]):
        self._dtype, self._read = dtype, read

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return self._dtype

    def __getitem__(self, places: Any) -> torch.Tensor:
        return self._read()[places]


def _block_linear(tensor: GgufTensor, dtype: torch.dtype, plain: nn.Module) -> BlockLinear:
    assert isinstance(plain, nn.Linear)
    rows, columns = tensor.shape
    return BlockLinear(tensor.type, rows, columns, plain.bias, dtype)


def _block_experts(stacks: Mapping[str, GgufTensor], dtype: torch.dtype, plain: nn.Module) -> BlockExperts:
    return BlockExperts(plain, {part: (tensor.type, tensor.shape) for part, tensor in stacks.items()}, dtype)


def _stacks(weights: Mapping[str, Weight], module: str, end: str) -> list[tuple[str, str]]:
    """(name of the buffer, tensor of the file) of what a parameter of a module has in blocks."""
    tensors = weights[f"{module}.{end}"].tensors
    names = _EXPERTS.get(end, ("blocks",))
    return list(zip(names if len(names) == len(tensors) else ("_".join(names),), tensors, strict=True))


def _rows(base: GgufBase, weight: Weight, tensor: str) -> torch.Tensor:
    return weight.rows(base.blocks(tensor))


def _frozen(meta: MetaModel, weights: Mapping[str, Weight]) -> set[str]:
    """Names of the parameters that stay in blocks: of the text model's linear layers, and of its stacked experts."""
    text, head = {id(module) for module in meta.module.get_decoder().modules()}, meta.module.get_output_embeddings()
    names = set()
    for name, module in meta.module.named_modules():
        if type(module) is nn.Linear and id(module) in text and module is not head and weights[f"{name}.weight"].in_blocks:
            names.add(f"{name}.weight")
        elif all(f"{name}.{end}" in weights for end in _EXPERTS):
            names.update(f"{name}.{end}" for end in _EXPERTS)
    return names


def activation_bytes(shape: Shape, tokens: int, full: int) -> int:
    """About what a layer saves: twelve times its hidden states, and four times those of its MLP.

    Args:
        tokens: of a micro-batch.
        full: bytes of an activation.
    """
    return tokens * full * (12 * shape.hidden + 4 * shape.intermediate)


def frozen_bytes(base: GgufBase, rest_bytes: int = 2) -> int:
    """Bytes of the model in memory: the blocks of its linear layers and experts, and `rest_bytes` for each other weight (embedding, output layer,
    norms)."""
    meta = MetaModel(config_of(base), str(base.paths[0]))
    weights, total = weights_of(base, meta.module), 0
    frozen = _frozen(meta, weights)
    for name, weight in weights.items():
        in_blocks = sum(base.tensors[tensor].nbytes for tensor in weight.tensors)
        total += in_blocks if name in frozen else rest_bytes * math.prod(weight.shape(base))
    return total
