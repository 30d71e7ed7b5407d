"""What goes into the matrices of a GGUF, as transformers computes it on a GPU: in seconds where llama.cpp needs minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olpack.errors import OlpackError
from olpack.llamacpp.activations import InputProducts
from olpack.model.gguf_architectures import config_of, weights_of
from olpack.model.gguf_base import GgufBase, open_gguf
from olpack.model.shape import MetaModel
from olpack.train.batches import by_length, padded
from olpack.train.device import working_dtype
from olpack.train.gguf_model import activation_bytes, frozen_bytes, load_frozen

_TOKENS = 2_048  # of a micro-batch, if no row is longer


class LayerInputs:
    """Reads rows with the model of a GGUF.

    Args:
        gguf: the model.
        modules: by ggml's name of a matrix that of the linear layer.
        device: that it computes on.
    """

    def __init__(self, gguf: GgufBase, modules: dict[str, str], device: torch.device):
        self._modules, self._device = modules, device
        self._decoder = load_frozen(gguf, device, working_dtype(device)).get_decoder()

    @classmethod
    def load(cls, gguf: Path, names: Collection[str], longest: int, device: torch.device, room: int) -> LayerInputs | None:
        """The model, or None where it does not fit, or where not all of the matrices are linear layers of a model that olpack reads from a GGUF.

        Args:
            names: of the matrices.
            longest: tokens of the longest row.
            room: bytes that it may take.
        """
        try:
            base = open_gguf(gguf)
            meta = MetaModel(config_of(base), str(gguf))
            modules = _linear_layers(base, meta)
            matrix = 6 * meta.shape.hidden * meta.shape.intermediate  # the largest one, once it is dequantized
            activations = activation_bytes(meta.shape, max(_TOKENS, longest), 4)
            needed = frozen_bytes(base, working_dtype(device).itemsize) + activations + matrix
        except OlpackError:  # llama.cpp computes more architectures
            return None
        if needed > room or not modules.keys() >= set(names):
            return None
        return cls(base, {name: modules[name] for name in names}, device)

    def products(self, rows: Sequence[Sequence[int]], names: Collection[str], advance: Callable[[int], None]) -> dict[str, InputProducts]:
        """`olpack.llamacpp.activations.input_products` of some of the matrices."""
        found: dict[str, InputProducts] = {}
        shared: tuple[torch.Tensor, InputProducts] | None = None
        counted = torch.empty(0)

        def add(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
            nonlocal shared
            x: torch.Tensor = given[0]
            if shared is None or shared[0] is not x:  # those of query, key and value have the same
                columns = x.shape[-1]
                products = found.get(name) or InputProducts(torch.zeros(columns, columns, device=x.device))
                vectors = x.reshape(-1, columns)[counted].float()
                products.sums.addmm_(vectors.T, vectors)
                products.count += len(vectors)
                shared = x, products
            found[name] = shared[1]

        hooks = [self._decoder.get_submodule(self._modules[name]).register_forward_pre_hook(partial(add, name)) for name in names]
        try:
            for group in by_length(rows, _TOKENS):
                ids, places = padded(group, self._device)
                counted = places.flatten()
                self._decoder(ids, use_cache=False)
                advance(sum(map(len, group)))
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _linear_layers(base: GgufBase, meta: MetaModel) -> dict[str, str]:
    """By ggml's name of a matrix the linear layer of the decoder whose inputs are its own, in the same order."""
    found = {}
    decoder = {id(module): name for name, module in meta.module.get_decoder().named_modules()}
    for name, weight in weights_of(base, meta.module).items():
        module, _, end = name.rpartition(".")
        layer = meta.module.get_submodule(module)
        if end == "weight" and type(layer) is nn.Linear and id(layer) in decoder and weight.form == "plain":
            found.update(dict.fromkeys(weight.tensors, decoder[id(layer)]))
    return found
