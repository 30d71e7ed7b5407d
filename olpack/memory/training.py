"""What a training step keeps in memory: frozen weights, adapter, gradients, optimizer, activations and logits.

Activations are counted, not estimated: the model runs forward on torch's meta device, and what autograd would keep for the backward pass
is added up. Three things are known rather than run: attention keeps queries, keys, values and its result (as a fused kernel does, never the
square of the length), each adapter keeps its input in 16 bits, and the loss keeps the logits.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass

from olpack.errors import OlpackError
from olpack.memory.shape import MetaModel, linear_shape

# Bytes a weight of NF4 with double quantization: half a byte, an 8-bit scale for 64 weights, a float32 scale for 256 of those.
NF4_CODES = 0.5
NF4_SCALES = 1 / 64 + 4 / (64 * 256)
HQQ_SCALES = (2 + 2) / 64  # a scale and a zero point in 16 bits for 64 weights
# Bytes a logit: 16 bits as the model makes them, float32 log-probabilities, and in the backward pass two float32 gradients.
_LOGIT = 2 + 4 + 4 + 4
# Bytes an adapter's weight: float32, its gradient, and two moments in 8 bits with a float32 scale for 256 of each.
_ADAPTER, _GRADIENT, _MOMENTS_8BIT, _MOMENTS_32BIT = 4, 4, 2 + 2 * 4 / 256, 8


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of one forward pass, in bytes.

    Attributes:
        layers: of each repeating layer.
        inputs: what a checkpointed layer keeps: its input.
        outside: of all that is no repeating layer.
        working: what the backward pass of one layer needs for a moment beside what it kept.
    """

    layers: tuple[int, ...]
    inputs: int
    outside: int
    working: int


@dataclass(frozen=True)
class Training:
    """Bytes of GPU memory that a training step takes.

    Attributes:
        weights: the frozen base.
        adapter, gradients, optimizer: of the adapter.
        activations: kept from forward to backward pass without gradient checkpointing; None where they cannot be counted.
        checkpointed: kept with it.
        backward: what the backward pass of one layer needs for a moment; with checkpointing, that layer's activations come on top.
        layer: activations of the largest layer.
        logits: of all tokens of the batch, with their gradients.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    checkpointed: int | None
    backward: int
    layer: int
    logits: int

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    def total(self, checkpointing: bool) -> int | None:
        """Peak of a step: either at the loss, where the logits are, or in the backward pass, where they are gone."""
        if self.activations is None:
            return None
        if checkpointing:
            return self.fixed + self.checkpointed + max(self.logits, self.layer + self.backward)
        return self.fixed + self.activations + max(self.logits, self.backward)


def frozen_bytes(model: MetaModel, precision: str, rest_bytes: int = 2) -> tuple[int, int]:
    """(weights, quantization constants) of a model that transformers has loaded, in bytes.

    Args:
        precision: "float32", "bfloat16", "int8" (bitsandbytes' LLM.int8), "nf4" or "fp4" (double quantization), "hqq4" or "hqq8". All but the
            first two leave embeddings, output layer, norms and stacked experts as they are.
        rest_bytes: of each weight that is left as it is.
    """
    total = model.parameters.total
    if precision in ("float32", "bfloat16"):
        return total * (4 if precision == "float32" else 2), 0
    shapes = model.quantizable().values()
    packed = sum(rows * columns for rows, columns in shapes)
    rest = rest_bytes * (total - packed)
    if precision == "int8":
        return rest + packed, 4 * sum(rows for rows, _ in shapes)
    if precision in ("hqq4", "hqq8"):
        return rest + packed * int(precision[3:]) // 8, round(packed * HQQ_SCALES)
    return rest + round(packed * NF4_CODES), round(packed * NF4_SCALES)


def adapter_shapes(model: MetaModel, targets: str | list[str] = "all-linear") -> dict[str, tuple[int, int]]:
    """(rows, columns) of the linear layers of the text model that get an adapter: all but the output layer, or those of the given names."""
    text = {id(module) for module in model.module.get_decoder().modules()}
    named = [targets] if isinstance(targets, str) else targets
    if named != ["all-linear"] and not model.shape.tied:
        text.add(id(model.module.get_output_embeddings()))
    return {name: shape for name, module in model.module.named_modules()
            if (shape := linear_shape(module)) and id(module) in text
            and (named == ["all-linear"] or any(f".{name}".endswith(f".{target}") for target in named))}  # fmt: skip


def adapter_parameters(model: MetaModel, rank: int, targets: str | list[str] = "all-linear", method: str = "lora") -> int:
    """Weights of an adapter: rank × (rows + columns) of each layer that gets one, with DoRA a norm for each row besides; of VeRA the vectors."""
    shapes = adapter_shapes(model, targets).values()
    if method == "vera":
        return sum(rank + rows for rows, _ in shapes)
    return sum(rank * (rows + columns) + (rows if method == "dora" else 0) for rows, columns in shapes)


def estimate_training(model: MetaModel, *, rank: int, tokens: int, quantized: bool) -> Training:
    """The peak of one step of LoRA, or of QLoRA where `quantized`, on a GPU as olpack trains: all linear layers, float32 adapter, bfloat16
    computation, paged 8-bit AdamW.

    Args:
        rank: of the adapter.
        tokens: that go through the model at once; all of them are taken to be learned.
    """
    adapter = adapter_parameters(model, rank)
    found = None
    with contextlib.suppress(OlpackError):
        found = activations(model, tokens)
    dequantized = 2 * max((rows * columns for rows, columns in adapter_shapes(model).values()), default=0) if quantized else 0
    return Training(
        weights=sum(frozen_bytes(model, "nf4" if quantized else "bfloat16")),
        adapter=adapter * _ADAPTER,
        gradients=adapter * _GRADIENT,
        optimizer=round(adapter * _MOMENTS_8BIT),
        activations=sum(found.layers) + found.outside if found else None,
        checkpointed=found.inputs + found.outside if found else None,
        backward=(found.working if found else 0) + dequantized,
        layer=max(found.layers, default=0) if found else 0,
        logits=tokens * model.shape.vocabulary * _LOGIT,
    )


def activations(model: MetaModel, tokens: int) -> Activations:
    """What a forward pass over one row of `tokens` tokens keeps for the backward pass, the adapters' inputs included, the logits not.

    Raises:
        OlpackError: the architecture computes with data that the meta device does not have (mixtures of experts choose by value).
    """
    import torch
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.module.get_decoder()
    AttentionInterface.register("olpack-counted", _fused_attention)
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    adapted = adapter_shapes(model)
    by_layer: dict[int, int] = defaultdict(int)
    seen: set[int] = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
    kept: list[torch.Tensor] = []  # a storage that is freed could give its address to another
    state = {"layer": -1, "inputs": 0}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)
            by_layer[state["layer"]] += storage.nbytes()
        return tensor

    def enter(index: int):
        def hook(module, arguments, named):
            state["layer"] = index
            state["inputs"] += 2 * tokens * model.shape.hidden

        return hook

    def leave(module, arguments, named, output):
        state["layer"] = -1

    handles = []
    for index, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(enter(index), with_kwargs=True), layer.register_forward_hook(leave, with_kwargs=True)]
    before, frozen = decoder.config._attn_implementation, [parameter.requires_grad for parameter in decoder.parameters()]
    try:
        decoder.config._attn_implementation = "olpack-counted"
        decoder.requires_grad_(False)
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs = torch.empty(1, tokens, model.shape.hidden, dtype=torch.bfloat16, requires_grad=True)
            decoder(inputs_embeds=inputs, position_ids=torch.arange(tokens)[None], use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise OlpackError(f"What {model.label} keeps for the backward pass cannot be counted without data: {str(error).splitlines()[0]}",
                          "Measure a step on the GPU.") from error
    finally:
        decoder.config._attn_implementation = before
        for handle in handles:
            handle.remove()
        for parameter, required in zip(decoder.parameters(), frozen, strict=True):
            parameter.requires_grad_(required)
    widest = max((max(shape) for shape in adapted.values()), default=0)
    owners = {name: index for index, layer in enumerate(layers) for name in _names(model, layer)}
    for name, (_, columns) in adapted.items():
        by_layer[owners.get(name, -1)] += 2 * tokens * columns
    # Gradients of the widest activation on their way back, and the float32 copy that an adapter's input goes through.
    return Activations(tuple(by_layer[index] for index in range(len(layers))), state["inputs"], by_layer[-1], tokens * widest * (2 + 2 + 4))


def _names(model: MetaModel, layer) -> list[str]:
    inside = {id(module) for module in layer.modules()}
    return [name for name, module in model.module.named_modules() if id(module) in inside]


def _fused_attention(module, query, key, value, attention_mask, **options):
    """In place of attention: the shape of its result, and what a fused kernel keeps of it.

    Args:
        query, key, value: [rows, heads, tokens, width]; keys and values may have fewer heads.
    """
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(context, query, key, value):
            result = query.new_empty(*query.shape[:-1], value.shape[-1])
            context.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return result

        @staticmethod
        def backward(context, gradient):
            raise NotImplementedError

    return Fused.apply(query, key, value).transpose(1, 2), None
