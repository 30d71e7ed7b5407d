"""The adapter that a recipe asks for: which modules it is on, how it begins, and how it is saved."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, VeraConfig
from peft.utils.integrations import dequantize_module_weight

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.checkpoint import read_tensor_headers
from olpack.model.names import BaseNames
from olpack.model.packed import quantization_of
from olpack.model.shape import MetaModel, adapter_shapes
from olpack.recipe import Train
from olpack.train.frozen import HqqLinear

if TYPE_CHECKING:
    from torch import nn

Start = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module name to the first values of its A [rank, columns] and B [rows, rank]

_PASSES = 4  # of the randomized singular value decomposition, as PiSSA's authors use it


def adapter_config(base: Base, settings: Train) -> PeftConfig:
    """peft's configuration of the adapter, with every module by its full name, so that nothing outside the text model is meant.

    Raises:
        OlpackError: a name that no module has, or a module that cannot be trained as a whole.
    """
    meta = MetaModel(base.config, base.label)
    shared = {"r": settings.rank, "target_modules": target_names(meta, settings.target_modules), "bias": "none", "task_type": "CAUSAL_LM"}
    whole = whole_names(meta, settings, _quantized(base, settings))
    if settings.method == "vera":
        return VeraConfig(**shared, vera_dropout=settings.dropout, projection_prng_key=settings.seed, modules_to_save=whole or None)
    return LoraConfig(
        **shared,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        modules_to_save=whole or None,
        ensure_weight_tying=meta.shape.tied and _embeds(meta, whole),
    )


def target_names(meta: MetaModel, asked: str | list[str]) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Raises:
        OlpackError: a name that no linear layer of the text model has, each with those that there are.
    """
    found = list(adapter_shapes(meta, asked))
    if isinstance(asked, str) and found:  # a name, or a regular expression for full names
        return found
    known = sorted({_last(name) for name in adapter_shapes(meta, "all-linear")} | (set() if meta.shape.tied else {_head(meta)}))
    wrong = [name for name in ([asked] if isinstance(asked, str) else asked) if name != "all-linear" and name not in map(_last, found)]
    if not wrong and found:
        return found
    if wrong and wrong[0] == _head(meta):
        raise OlpackError(
            f"`train.target_modules` names '{wrong[0]}', and {meta.label} uses one matrix as embedding and as output layer.",
            f"Train it as a whole with `train.modules_to_save: [{wrong[0]}]`, or leave it out.",
        )
    if isinstance(asked, str) and re.search(r"[\\*+?()\[\]|^$]", asked):
        layer = next(iter(adapter_shapes(meta, "all-linear")), "")
        raise OlpackError(
            f"`train.target_modules` is the expression '{asked}', which matches the full name of no linear layer of {meta.label}.",
            f"Full names are like '{layer}', and all of one must match; it has {', '.join(known)}.",
        )
    raise OlpackError(
        f"`train.target_modules` names '{(wrong or [asked])[0]}', which is no linear layer of the text model of {meta.label}.",
        f"It has {', '.join(known)}; `all-linear` takes all but the output layer.",
    )


def experts_left_out(base: Base, settings: Train) -> str | None:
    """A sentence where the base holds most of its weights as stacked experts, which no linear layer is, so that no adapter is on them."""
    meta = MetaModel(base.config, base.label)
    counts = meta.parameters
    if not counts.experts:
        return None
    names = sorted({_last(name) for name in target_names(meta, settings.target_modules)})
    return (
        f"The adapter is on {', '.join(names)}. The experts of {base.label}, {counts.experts / counts.text:.0%} of its weights, stay as they "
        "are: transformers holds them as stacks, which are no linear layers."
    )


def whole_names(meta: MetaModel, settings: Train, quantized: bool) -> list[str]:
    """Full names of the modules that are trained as a whole. Where embedding and output layer are one matrix, it is named once, as the embedding.
    `quantized` says that the linear layers are held so.

    Raises:
        OlpackError: no such module, one that is quantized or has an adapter, or a shared matrix that the method cannot keep shared.
    """
    modules = {name: module for name, module in meta.module.named_modules() if name}
    embedding, head = meta.module.get_input_embeddings(), meta.module.get_output_embeddings()
    text = {id(module) for module in meta.module.get_decoder().modules()} | {id(embedding), id(head)}
    targets = set(target_names(meta, settings.target_modules))
    known = {name for name, module in modules.items() if id(module) in text and module._parameters}
    names: list[str] = []
    for asked in settings.modules_to_save:
        found = [name for name in modules if name in known and asked in (name, _last(name))]
        if not found:
            raise OlpackError(
                f"`train.modules_to_save` names '{asked}', which is no module with weights of the text model of {meta.label}.",
                f"It has {', '.join(sorted(set(map(_last, known))))}.",
            )
        if both := targets.intersection(found):
            raise OlpackError(
                f"'{sorted(both)[0]}' is to get an adapter and to be trained as a whole.",
                f"Leave '{asked}' out of `train.modules_to_save` or of `train.target_modules`.",
            )
        if quantized and any(isinstance(modules[name], torch.nn.Linear) and modules[name] is not head for name in found):
            raise OlpackError(
                f"'{asked}' is held quantized and cannot be trained as a whole.",
                "Put it into `train.target_modules`, or set `train.quantization: none`.",
            )
        names += found
    if meta.shape.tied:
        places = {id(module): name for name, module in modules.items()}
        names = list(dict.fromkeys(places[id(embedding)] if name == places[id(head)] else name for name in names))
        if settings.method == "vera" and _embeds(meta, names):
            raise OlpackError(
                f"{meta.label} uses one matrix as embedding and as output layer, and peft's vera would train two that differ.",
                "Take method lora, rslora or dora, or leave it out of `train.modules_to_save`.",
            )
    return names


def whole_parameters(base: Base, settings: Train) -> int:
    """Weights of the modules that are trained as a whole."""
    if not settings.modules_to_save:
        return 0
    meta = MetaModel(base.config, base.label)
    return sum(
        parameter.numel()
        for name in whole_names(meta, settings, _quantized(base, settings))
        for parameter in meta.module.get_submodule(name).parameters(recurse=False)
    )


def _quantized(base: Base, settings: Train) -> bool:
    return settings.quantization != "none" or bool(quantization_of(base.config))


def _embeds(meta: MetaModel, names: list[str]) -> bool:
    embedding = meta.module.get_input_embeddings()
    return any(meta.module.get_submodule(name) is embedding for name in names)


def _head(meta: MetaModel) -> str:
    head = meta.module.get_output_embeddings()
    return next(_last(name) for name, module in meta.module.named_modules() if module is head)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# -- how it begins --------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def begin(model: nn.Module, base: Base, settings: Train, dtype: torch.dtype) -> Start:
    """Give A and B their first values, by PiSSA (Meng et al., 2024) or LoftQ (Li et al., 2024, one step). Empty for the default.

    PiSSA takes the r largest singular values out of the frozen weight, which holds the rest; LoftQ takes those of what quantization lost.
    Both are drawn from the seed, so that a resumed run begins at the same place. `dtype` is the one that the base was loaded in.
    """
    if settings.initialization == "default":
        return {}
    start: Start = {}
    with _Originals(base) as originals:
        for name, layer in model.named_modules():
            if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
                continue
            name, frozen = name.removeprefix("base_model.model."), layer.base_layer
            held = _dequantized(frozen)
            weight = originals.read(name).to(held.device, dtype).float() if settings.quantization != "none" else held.float()
            scale = layer.scaling["default"]
            left, values, right = torch.svd_lowrank(weight if settings.initialization == "pissa" else weight - held.float(), settings.rank, _PASSES)
            root = (values / scale).sqrt()
            first_a, first_b = (right * root).T.contiguous(), (left * root).contiguous()
            if settings.initialization == "pissa":
                _hold(frozen, (weight - scale * first_b @ first_a).to(dtype), settings)
            layer.lora_A["default"].weight.copy_(first_a)
            layer.lora_B["default"].weight.copy_(first_b)
            start[name] = (first_a.cpu(), first_b.cpu())
    return start


def _dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight that a frozen layer computes with."""
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    if isinstance(layer, Linear8bitLt):  # peft's own way to it loses the scales on a CPU
        return int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    return dequantize_module_weight(layer)


def _hold(layer: nn.Module, weight: torch.Tensor, settings: Train) -> None:
    """Put another weight into a frozen layer, held as it is."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if isinstance(layer, HqqLinear):
        layer.replace(weight)
    elif isinstance(layer, Linear4bit):
        layer.weight = Params4bit(
            weight.cpu(),
            requires_grad=False,
            quant_type=settings.quantization,
            compress_statistics=settings.double_quantization,
            quant_storage=layer.quant_storage,
            module=layer,
        ).to(weight.device)
    elif isinstance(layer, Linear8bitLt):
        layer.weight = Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
        layer.init_8bit_state()
    else:
        layer.weight.copy_(weight)


class _Originals:
    """The base's weights as they are stored, by module name."""

    def __init__(self, base: Base):
        self._headers = read_tensor_headers(base.path)
        self._names = BaseNames(self._headers)
        self._open: dict[Path, object] = {}

    def __enter__(self) -> _Originals:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def read(self, module: str) -> torch.Tensor:
        from safetensors import safe_open

        name = self._names.find(f"{module}.weight")
        path = self._headers[name].file
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        return self._open[path].get_tensor(name)


# -- how it is saved ------------------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, start: Start, folder: Path) -> None:
    """Write the adapter in peft's format, to be added to the original base.

    An adapter that did not begin at zero is saved as its difference from its first value: [B, -B0] @ [A; A0], of twice the rank and with the
    same scale, which is a plain LoRA adapter.
    """
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card is an empty form
    if not start:
        return
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for module, (first_a, first_b) in start.items():
        a, b = (f"base_model.model.{module}.lora_{which}.weight" for which in "AB")
        tensors[a] = torch.cat([tensors[a].float(), first_a])
        tensors[b] = torch.cat([tensors[b].float(), -first_b], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text(encoding="utf-8"))
    growth = math.sqrt(2) if config["use_rslora"] else 2
    config_file.write_text(json.dumps(config | {"r": 2 * config["r"], "lora_alpha": growth * config["lora_alpha"]}, indent=2), encoding="utf-8")
