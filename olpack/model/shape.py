"""A model's shape from its configuration alone: every parameter by name and size, and what each of them is for.

transformers builds the model on torch's meta device, which computes shapes and allocates nothing, so that the counts are exact for each
architecture that it knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import regex

from olpack import bounded_regex
from olpack.errors import OlpackError, first_line
from olpack.templating import bounded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_SECONDS = 60.0  # to build a model without data; the largest published ones take 3
# Kinds whose kernel takes the weight of `out_proj` itself, so that an adapter on it would do nothing: peft refuses to put one there.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, by what they are for. Tied weights count once.

    Attributes:
        embedding: token embeddings of the text model.
        head: the output layer; 0 where it is the embedding (tied).
        linear: weights of the text model's linear layers, the output layer not among them.
        experts: weights in stacked experts.
        other: norms, biases, routers that are no linear layers.
        towers: of all that is no text model: vision and audio towers, projectors.
        active: of the text model, those that one token goes through (all but the experts that are not chosen).
    """

    embedding: int
    head: int
    linear: int
    experts: int
    other: int
    towers: int
    active: int

    @property
    def text(self) -> int:
        """Of the text model, which is what llama.cpp runs and olpack trains."""
        return self.embedding + self.head + self.linear + self.experts + self.other

    @property
    def total(self) -> int:
        return self.text + self.towers


@dataclass(frozen=True)
class Shape:
    """The sizes that memory follows from.

    Attributes:
        layers, hidden, heads, kv_heads, vocabulary: of the text model; no heads where no layer attends.
        head_dim, value_dim: width of a key and of a value.
        intermediate: width of the feed-forward layers; of one expert where there are only experts.
        tied: the output layer is the embedding.
        context_length: tokens the model was made for, None where its configuration gives none.
        window: tokens that a sliding-window layer sees, None where there is none.
        kinds: of each layer: "full" attends to the whole context, "sliding" to the window, "none" keeps no keys and values.
        experts, experts_used: of each layer, and for each token; 0 without experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    context_length: int | None
    window: int | None
    kinds: tuple[Literal["full", "sliding", "none"], ...]
    experts: int
    experts_used: int

    def kv_bytes(self, context: int, bytes_per_value: float) -> int:
        """Keys and values of one sequence in transformers' cache, where a sliding layer keeps its window, the others the whole context."""
        cells = self.kinds.count("full") * context + self.kinds.count("sliding") * min(self.window or context, context)
        return round(cells * self.kv_heads * (self.head_dim + self.value_dim) * bytes_per_value)


class MetaModel:
    """A model without data: transformers' modules with shapes and names.

    Args:
        config: the fields of a config.json.
        label: what messages call it.

    Attributes:
        published: `config`.
        config: transformers' configuration of it, defaults included.
        module: the model on torch's meta device.

    Raises:
        OlpackError: transformers does not know the architecture, or the configuration makes no model.
    """

    def __init__(self, config: dict[str, Any], label: str):
        if "model_type" not in config:
            raise OlpackError(f"The configuration of {label} names no model_type.", "Take config.json as the model's publisher has it.")
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.label = label
        self.published = config
        # How the weights are stored is no part of the shape, and a quantizer's modules would hide it.
        plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map", "dtype", "torch_dtype")}
        try:
            self.config = transformers.AutoConfig.for_model(**plain)
            named = getattr(transformers, (plain.get("architectures") or [""])[0], None)
            make = named._from_config if named is not None else transformers.AutoModelForCausalLM.from_config
            with bounded(_SECONDS, memory=None), torch.device("meta"):
                self.module: PreTrainedModel = make(self.config, dtype=torch.bfloat16)
        except ImportError as error:
            raise OlpackError(
                f"transformers needs another package for {label}: {first_line(error)}",
                "Install it, or name a GGUF of the model, which needs none.",
            ) from error
        except Exception as error:  # of any kind: each architecture reads its configuration in a way of its own
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OlpackError(
                f"transformers {transformers.__version__} makes no model of the configuration of {label}: {why}",
                "Take a newer transformers, or a GGUF of the model, which needs none.",
            ) from error
        if self.module.get_output_embeddings() is None:
            raise OlpackError(f"{label} is no language model: it has no output layer over a vocabulary.", "Name a causal language model.")

    @cached_property
    def text_config(self):
        """The configuration of the text model, which is the whole of it unless the model sees or hears."""
        return self.config.get_text_config(decoder=True)

    @cached_property
    def shape(self) -> Shape:
        config = self.text_config
        # Layers with settings of their own, as Gemma 4 has them, must be asked one by one.
        each = (
            [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)] if getattr(config, "is_heterogeneous", False) else [config]
        )
        widest = max(each, key=lambda one: (getattr(one, "head_dim", None) or 0) * (getattr(one, "num_key_value_heads", None) or 0))

        def first(*names: str) -> int | None:
            return next((value for name in names if (value := getattr(widest, name, None))), None)

        layers, heads = config.num_hidden_layers, first("num_attention_heads") or 0
        experts = first("num_local_experts", "num_experts", "n_routed_experts") or 0
        width = first("moe_intermediate_size", "intermediate_size") if experts else first("intermediate_size", "moe_intermediate_size")
        head_dim = first("head_dim") or (config.hidden_size // heads if heads else 0)
        if nope := first("qk_nope_head_dim"):  # multi-head latent attention, whose cache transformers keeps expanded
            head_dim = nope + config.qk_rope_head_dim
        window = first("sliding_window", "attention_chunk_size") if getattr(config, "use_sliding_window", True) else None
        names = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        kinds = tuple(_kind(name) if heads else "none" for name in names)
        embedding, head = self.module.get_input_embeddings().get_parameter("weight"), self.module.get_output_embeddings().get_parameter("weight")
        return Shape(
            layers=layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=first("num_key_value_heads") or heads,
            head_dim=head_dim,
            value_dim=first("v_head_dim") or head_dim,
            intermediate=max(width) if isinstance(width, list | tuple) else width or 4 * config.hidden_size,
            vocabulary=embedding.shape[0],
            tied=head is embedding,
            context_length=first("max_position_embeddings"),
            window=window if "sliding" in kinds else None,
            kinds=kinds,
            experts=experts,
            experts_used=(first("num_experts_per_tok") or 0) if experts else 0,
        )

    @cached_property
    def carries_state(self) -> bool:
        """Whether a layer takes something of earlier tokens other than by attention: by a convolution, or a recurrence. Where attention ends a
        row among packed rows, these go on into the next one."""
        import torch

        convolutions = any(isinstance(module, torch.nn.Conv1d) for module in self.module.get_decoder().modules())
        return convolutions or "none" in self.shape.kinds

    @cached_property
    def parameters(self) -> Parameters:
        import torch

        head = self.module.get_output_embeddings()
        linear = {id(module.get_parameter("weight")) for module in self.module.modules() if linear_shape(module)} - {id(head.weight)}
        embeddings = {id(module.weight) for module in self.module.modules() if isinstance(module, torch.nn.Embedding)}
        text = {id(parameter) for parameter in self.module.get_decoder().parameters()} | {id(parameter) for parameter in head.parameters()}
        counts = dict.fromkeys(("embedding", "head", "linear", "experts", "other", "towers"), 0)
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in text:
                kind = "towers"
            elif id(parameter) in embeddings:
                kind = "embedding"
            elif parameter is head.weight:
                kind = "head"
            elif "experts." in name and parameter.ndim == 3:
                kind = "experts"
            else:
                kind = "linear" if id(parameter) in linear else "other"
            counts[kind] += parameter.numel()
        everything = sum(counts.values()) - counts["towers"]
        shape = self.shape
        idle = counts["experts"] * (1 - shape.experts_used / shape.experts) if shape.experts else 0
        return Parameters(**counts, active=round(everything - idle))

    def quantizable(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weights that bitsandbytes quantizes when transformers loads the model: by transformers' own rule, every
        plain linear layer, towers included, but neither the output layer nor stacked experts."""
        import torch
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = get_keys_to_not_convert(self.module)
        return {
            name: shape
            for name, module in self.module.named_modules()
            if type(module) in (torch.nn.Linear, Conv1D) and should_convert_module(name, kept) and (shape := linear_shape(module))
        }

    def checkpoint(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors as the model's checkpoint has them: stacked experts apart, tied weights once."""
        from transformers.core_model_loading import revert_weight_conversion

        named = revert_weight_conversion(self.module, dict(self.module.named_parameters()))
        return {name: tuple(tensor.shape) for name, tensor in named.items()}

    def lacking(self, stored: Iterable[str]) -> list[str]:
        """Names of the model's checkpoint that are not among the stored ones, by whichever of its spellings transformers knows.

        Publishers' checkpoints, older transformers and this one spell the same weight differently: with or without the base model's prefix
        (`h.0.` of GPT-2), and with the text model of a vision model in front or behind (`language_model.model.`).
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [change for change in get_model_conversion_mapping(self.module) if isinstance(change, WeightRenaming)]

        def renamed(name: str) -> str:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            return name

        ends = set()
        for name in stored:
            parts = renamed(name).split(".")
            ends |= {".".join(parts[at:]) for at in range(len(parts))}
        prefix = f"{self.module.base_model_prefix}."
        return [name for name in self.checkpoint() if renamed(name).removeprefix(prefix) not in ends]


def write_header_only_checkpoint(model: MetaModel, folder: Path) -> None:
    """A model's folder for llama.cpp's converter: config.json, placeholder tokens, and a sparse safetensors file with a real header and a
    hole in place of the weights. A few MB on the disk, whatever the model's size."""
    header, offset = {}, 0
    for name, shape in model.checkpoint().items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    # What the publisher's config.json leaves to transformers' defaults, the converter may want written out.
    full = {**model.config.to_dict(), "architectures": [type(model.module).__name__]}
    full |= {key: value for key, value in model.published.items() if not isinstance(value, dict)}
    full.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(full, default=str), encoding="utf-8")
    # Some architectures cut the embedding to the tokens that there are; here that is all of them.
    tokens = {str(index): index for index in range(model.shape.vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}), encoding="utf-8")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) of a linear layer as it multiplies, None for any other module. GPT-2's Conv1D is one, stored the other way round."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return (module.weight.shape[1], module.weight.shape[0]) if isinstance(module, Conv1D) else None


def adapter_shapes(model: MetaModel, targets: str | list[str] = "all-linear") -> dict[str, tuple[int, int]]:
    """(rows, columns) of the linear layers of the text model that get an adapter: all but the output layer and Mamba's last layer, those of the
    given names, or those whose full names a regular expression matches, as peft takes a `target_modules` that is a text.

    Raises:
        OlpackError: a text that is neither a name nor a regular expression.
    """
    text = {id(module) for module in model.module.get_decoder().modules()}
    named = [targets] if isinstance(targets, str) else targets
    if named != ["all-linear"] and not model.shape.tied:
        text.add(id(model.module.get_output_embeddings()))
    layers = {name: shape for name, module in model.module.named_modules() if (shape := linear_shape(module)) and id(module) in text}
    if model.config.model_type in _MAMBA:
        layers = {name: shape for name, shape in layers.items() if not name.endswith(".out_proj")}
    if named == ["all-linear"]:
        return layers
    found = {name: shape for name, shape in layers.items() if any(f".{name}".endswith(f".{target}") for target in named)}
    if found or not isinstance(targets, str):
        return found
    try:
        return {name: shape for name, shape in layers.items() if bounded_regex.search(targets, name, "`train.target_modules`", full=True)}
    except (regex.error, RecursionError) as error:
        raise OlpackError(
            f"`train.target_modules` is '{targets}', which is neither the name of a layer nor a regular expression ({error}).",
            "Give a list of names, `all-linear`, or an expression for full names.",
        ) from error


def _kind(name: str) -> Literal["full", "sliding", "none"]:
    """What a layer of one of transformers' `layer_types` keeps."""
    if "attention" not in name or name.startswith("linear"):
        return "none"
    return "sliding" if name.startswith(("sliding", "chunked")) else "full"
