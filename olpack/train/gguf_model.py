"""A GGUF as a frozen model of transformers, whose linear layers stay in the blocks of the file.

    model = load_frozen(base.gguf, torch.device("cpu"), torch.float32)

The embedding, the output layer and the norms are dequantized once. On a CPU the blocks are those of the mapped file, but for layers whose rows
llama.cpp's converter permuted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from olpack.model.gguf_architectures import Weight, config_of, rope_factors, weights_of
from olpack.model.gguf_base import GgufBase, GgufTensor
from olpack.model.shape import MetaModel
from olpack.train.frozen import BlockLinear, Make, use_frozen

_BYTES = 2  # of a weight that is dequantized on a GPU


def load_frozen(base: GgufBase, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model, without gradients, in evaluation mode.

    Args:
        dtype: that it computes in.

    Raises:
        OlpackError: an architecture that olpack does not train on from a GGUF, or tensors that do not fit it.
    """
    fields = config_of(base)
    meta = MetaModel(fields, str(base.paths[0]))
    weights, frozen = weights_of(base, meta.module), _frozen(meta)
    config = AutoConfig.for_model(**{key: value for key, value in fields.items() if key != "quantization_config"})
    layers: dict[str, Make] = {}
    tensors: dict[str, _Lazy] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in frozen or not weight.in_blocks:
            tensors[name] = _Lazy("F32", partial(weight.read, base, dtype))
            continue
        layers[module] = partial(_block_linear, base.tensors[weight.tensors[0]], dtype)
        tensors[f"{module}.blocks"] = _Lazy("U8", partial(_rows, base, weight))
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


def _block_linear(tensor: GgufTensor, dtype: torch.dtype, bias: nn.Parameter | None) -> BlockLinear:
    rows, columns = tensor.shape
    return BlockLinear(tensor.type, rows, columns, bias, dtype)


def _rows(base: GgufBase, weight: Weight) -> torch.Tensor:
    return weight.rows(base.blocks(weight.tensors[0]))


def _frozen(meta: MetaModel) -> set[str]:
    """Names of the linear layers that stay in blocks."""
    text, head = {id(module) for module in meta.module.get_decoder().modules()}, meta.module.get_output_embeddings()
    return {name for name, module in meta.module.named_modules() if type(module) is nn.Linear and id(module) in text and module is not head}


def frozen_bytes(base: GgufBase) -> int:
    """Bytes of the model on a GPU: the blocks of its linear layers, and 16 bits for each other weight."""
    meta = MetaModel(config_of(base), str(base.paths[0]))
    frozen, total = _frozen(meta), 0
    for name, weight in weights_of(base, meta.module).items():
        parameter, in_blocks = meta.module.get_parameter(name), weight.in_blocks and name.removesuffix(".weight") in frozen
        total += base.tensors[weight.tensors[0]].nbytes if in_blocks else _BYTES * parameter.numel()
    return total
