"""Memory of a training step: frozen weights, adapter, gradients, optimizer, activations and logits.

Activations are counted, not estimated: the model runs forward on torch's meta device, and the bytes of all tensors that autograd saves for the
backward pass are added up. What olpack's own functions save instead of transformers' and peft's follows from formulas (`layer_terms`): attention
saves queries, keys, values and its output, never the square of the length; layers with one input save it once; the loss makes some logits at a time.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from olpack.errors import OlpackError, first_line
from olpack.model.shape import MetaModel, Shape, adapter_shapes
from olpack.progress import quantity
from olpack.train.ops.limits import SLOTS, tokens_at_once

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

# Bytes a weight of NF4 with double quantization: half a byte, an 8-bit scale for 64 weights, a float32 scale for 256 of those.
NF4_CODES = 0.5
NF4_SCALES = 1 / 64 + 4 / (64 * 256)
HQQ_SCALES = (2 + 2) / 64  # a scale and a zero point in 16 bits for 64 weights
# Bytes a logit, where all are made at once: 16 bits as the model makes them, float32 log-probabilities, and in the backward pass two float32
# gradients. Made a chunk at a time: 16 bits, whose place the gradient takes.
_LOGIT, _CHUNK_LOGIT = 2 + 4 + 4 + 4, 2
_LAYERS_ON_GPU = 3  # checkpointed layers whose inputs are on the GPU at once: the one in use, and one on its way in each direction
# Bytes an adapter's weight: float32, its gradient, and two moments in 8 bits with a float32 scale for 256 of each.
_ADAPTER, _GRADIENT, _MOMENTS_8BIT, _MOMENTS_32BIT = 4, 4, 2 + 2 * 4 / 256, 8

# The purpose of a layer's modules, by a part of their class's name.
_PARTS = {"Norm": "norms", "Attention": "attention", "MLP": "feed-forward"}


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd saves in one forward pass.

    Attributes:
        layers: of each repeating layer, by purpose; see `layer_terms`.
        inputs: of the checkpointed layers.
        offloadable: whether these inputs can be in pinned memory: not those of layers that share keys, which torch's own checkpointing runs.
        attention: of the same layers, the attention outputs (of a fused kernel) and the products after them, which can be saved instead of
            computed again.
        outside: of all that is no repeating layer.
        working: temporary memory of one layer's backward pass beside what the layer saved.
    """

    layers: tuple[dict[str, int], ...]
    inputs: int
    offloadable: bool
    attention: int
    outside: int
    working: int


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of GPU memory that a training step takes. plan.json and the memory estimate have these names.

    Attributes:
        weights: the frozen base weights.
        adapter, gradients, optimizer: of the adapter.
        activations: saved from forward to backward pass without gradient checkpointing; None where they cannot be counted.
        checkpointed: saved with it.
        results: attention outputs on the GPU, which can be saved with it as well (`olpack.train.ops.activation_checkpointing.once`).
        host_inputs, host_results: bytes of pinned memory for the layers' inputs and for the attention outputs, with checkpointing.
        offloaded: of the weights, those in pinned memory with checkpointing: embeddings that are no output layer.
        head: of the weights, the output layer, where it can be offloaded except for the loss; else 0.
        streamable: of the weights, those of one layer, where layers can be streamed with checkpointing (`olpack.train.ops.layer_stream`); else 0.
        working: temporary memory of one layer's backward pass; with checkpointing, that layer's activations come on top.
        dequantized: the largest matrix in 16 bits, where the base is quantized; it is made anew for each product.
        layer: activations of the largest layer, by purpose.
        logits: of all target tokens that go through at once, with their gradients.
        workspace: of cuBLAS, 32 MiB in each of the threads that go forward and back.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    checkpointed: int | None
    results: int
    host_inputs: int
    host_results: int
    offloaded: int
    head: int
    streamable: int
    working: int
    dequantized: int
    layer: dict[str, int]
    logits: int
    workspace: int = 64 << 20

    def parts(self, checkpointing: bool, *, offload_attention: bool = False, offload_head: bool = False, streamed: int = 0) -> dict[str, int]:
        """The bytes at the peak of a step, by purpose. The peak is either at the loss, where the logits are, or in the backward pass, where they are
        gone. Activations that cannot be counted are left out.

        Args:
            checkpointing: gradient checkpointing.
            offload_attention: also save `results`; with checkpointing.
            offload_head: the output layer is on the GPU at the loss only; with checkpointing.
            streamed: so many layers are on the GPU only while they compute; with checkpointing.
        """
        head = self.head if offload_head else 0
        parts = {
            "base": self.weights - head - (self.offloaded if checkpointing else 0) - max(0, streamed - SLOTS) * self.streamable,
            "adapter, gradients, optimizer, cuBLAS": self.adapter + self.gradients + self.optimizer + self.workspace,
        }
        if self.activations is None or self.checkpointed is None:
            return parts
        if not checkpointing:
            parts["activations"] = self.activations
        elif offload_attention:
            parts["inputs of the layers, attention's results"] = self.checkpointed + self.results
        else:
            parts["inputs of the layers"] = self.checkpointed
        # Where the output layer is offloaded there is so little memory that a matrix counts: the checks before the first step have both on the GPU.
        at_loss, name = head + max(self.logits, self.dequantized if offload_head else 0), "output layer and logits" if offload_head else "logits"
        backward = self.working + self.dequantized + (sum(self.layer.values()) if checkpointing else 0)
        parts[f"the larger of {name} ({quantity(at_loss, 'B')}) and one layer's backward pass"] = max(at_loss, backward)
        return parts

    def total(self, checkpointing: bool, *, offload_attention: bool = False, offload_head: bool = False, streamed: int = 0) -> int | None:
        """Sum of `parts`; None where activations cannot be counted."""
        if self.activations is None:
            return None
        return sum(self.parts(checkpointing, offload_attention=offload_attention, offload_head=offload_head, streamed=streamed).values())

    @property
    def before_steps(self) -> int:
        """The bytes of a base that loads on the GPU, at the checks before the first step: they compute a few tokens forward and back, before anything
        is offloaded."""
        return self.weights + self.adapter + self.gradients + self.workspace + self.dequantized

    def pinned_parts(self, *, offload_attention: bool = False, offload_head: bool = False, streamed: int = 0) -> dict[str, int]:
        """The bytes of pinned memory that a step with checkpointing fills, by purpose."""
        parts = {
            "inputs of the layers": self.host_inputs,
            "attention's results": self.host_results if offload_attention else 0,
            "embeddings": self.offloaded,
            "output layer": self.head if offload_head else 0,
            "streamed layers": streamed * self.streamable,
        }
        return {name: size for name, size in parts.items() if size}

    def pinned(self, *, offload_attention: bool = False, offload_head: bool = False) -> int:
        """Sum of `pinned_parts`."""
        return sum(self.pinned_parts(offload_attention=offload_attention, offload_head=offload_head).values())

    def attention_fits(self, available: int, pinnable: int, *, offload_head: bool = False) -> bool:
        """Whether there are `results`, and memory for them on the GPU and in the host's memory that may be pinned."""
        total = self.total(True, offload_attention=True, offload_head=offload_head)
        pinned = self.pinned(offload_attention=True, offload_head=offload_head)
        return self.results > 0 and total is not None and total <= available and pinned <= pinnable

    def scaled(self, factor: float, logits: int) -> TrainingMemory:
        """The same step with `factor` times as many tokens at once, and so many bytes of logits."""

        def times(size: int) -> int:
            return round(size * factor)

        return replace(
            self,
            activations=None if self.activations is None else times(self.activations),
            checkpointed=None if self.checkpointed is None else times(self.checkpointed),
            results=times(self.results),
            host_inputs=times(self.host_inputs),
            host_results=times(self.host_results),
            working=times(self.working),
            layer={name: times(size) for name, size in self.layer.items()},
            logits=logits,
        )


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


def adapter_parameters(model: MetaModel, rank: int, targets: str | list[str] = "all-linear", method: str = "lora") -> int:
    """Weights of an adapter: rank × (rows + columns) of each layer that gets one, with DoRA a norm for each row besides; of VeRA the vectors."""
    shapes = adapter_shapes(model, targets).values()
    if method == "vera":
        return sum(rank + rows for rows, _ in shapes)
    return sum(rank * (rows + columns) + (rows if method == "dora" else 0) for rows, columns in shapes)


def layer_terms(saved: Mapping[str, int], norms: int, linears: Mapping[str, tuple[int, int]], tokens: int, fused: bool) -> dict[str, int]:
    """Bytes that one layer saves from its forward to its backward pass, by purpose.

    Args:
        saved: bytes that autograd saves for transformers' own modules without adapters: of the "norms", the "attention" (rotation included), the
            "feed-forward" part, and the "rest".
        norms: bytes that the norms' inputs take.
        linears: (rows, columns) of the layers that get an adapter, by the last part of their names.
        tokens: that go through at once.
        fused: by olpack's own functions (`olpack.train.ops.lora`, `pointwise`), else by transformers' and peft's modules.
    """
    inputs = {name: 2 * tokens * columns for name, (_, columns) in linears.items()}
    if not fused:
        return {**saved, "adapter inputs": sum(inputs.values())}
    terms = {**saved, "norms": norms}  # a norm saves its input alone
    if "attention" in saved:
        inputs.pop("o_proj", None)  # is the attention output
    for shared in (("k_proj", "v_proj"), ("up_proj",)):  # have the input of q_proj and of gate_proj
        if all(name in inputs for name in shared) and ("q_proj" if "k_proj" in shared else "gate_proj") in inputs:
            for name in shared:
                inputs.pop(name)
    if all(name in linears for name in ("gate_proj", "up_proj", "down_proj")):
        terms["feed-forward"] = sum(2 * tokens * linears[name][0] for name in ("gate_proj", "up_proj"))
        inputs.pop("down_proj")  # is computed again
    return {**terms, "adapter inputs": sum(inputs.values())}


def logits_bytes(shape: Shape, targets: int, chunked: bool = True) -> int:
    """Bytes that the loss of so many target tokens takes at its peak.

    Args:
        chunked: some of the logits at a time (`olpack.train.ops.loss`), with the hidden states and those they were taken from, else all at once.
    """
    if not chunked:
        return targets * shape.vocabulary * _LOGIT
    return min(targets, tokens_at_once(targets, shape.vocabulary)) * shape.vocabulary * _CHUNK_LOGIT + targets * shape.hidden * (2 + 2)


def estimate_training(
    model: MetaModel,
    *,
    rank: int,
    tokens: int,
    precision: str,
    weights: int | None = None,
    targets: str | list[str] = "all-linear",
    method: str = "lora",
    whole: int = 0,
    shards: int = 1,
    fused: bool = True,
    chunked: bool | None = None,
) -> TrainingMemory:
    """The peak of one step on a GPU as olpack trains: float32 adapter, bfloat16 computation, 8-bit AdamW.

    Args:
        precision: of the frozen base weights, as `frozen_bytes` takes it.
        weights: bytes of a base that comes quantized; None: `frozen_bytes` computes them.
        rank, method: of the adapter.
        whole: weights of modules that are trained as a whole.
        tokens: that go through the model at once; all of them are taken to be target tokens.
        targets: the recipe's `target_modules`.
        shards: GPUs over which the frozen layers are sharded (two layers at a time are there whole); 1 where each has all of them.
        fused: with olpack's own functions; False for plain transformers and peft, as with dropout on the adapter's input.
        chunked: the loss makes some logits at a time, and embeddings are in pinned memory; not so where the head is trained. None: if `fused`.
    """
    adapter = adapter_parameters(model, rank, targets, method) + whole
    chunked = fused if chunked is None else chunked
    counted = None
    with contextlib.suppress(OlpackError):
        counted = activations(model, tokens, targets, fused)
    largest = 2 * max((rows * columns for rows, columns in adapter_shapes(model).values()), default=0)
    dequantized = largest if weights is not None or precision != "bfloat16" else 0
    weights = sum(frozen_bytes(model, precision)) if weights is None else weights
    rest = 2 * (model.parameters.total - model.parameters.linear - model.parameters.experts)
    layer_bytes = max(0, weights - rest) // model.shape.layers
    if shards > 1:
        whole = 2 * (model.parameters.embedding + model.parameters.head)
        layers = weights - whole
        weights = round(whole + layers / shards + 2 * layers / model.shape.layers)

    def of_layers(size: int, layers: int) -> int:
        """Of the bytes that all layers save, those of so many layers."""
        return size * min(layers, model.shape.layers) // model.shape.layers if fused else size

    return TrainingMemory(
        weights=weights,
        adapter=adapter * _ADAPTER,
        gradients=adapter * _GRADIENT,
        optimizer=round(adapter * _MOMENTS_8BIT),
        activations=sum(sum(layer.values()) for layer in counted.layers) + counted.outside if counted else None,
        checkpointed=(of_layers(counted.inputs, _LAYERS_ON_GPU) if counted.offloadable else counted.inputs) + counted.outside if counted else None,
        results=of_layers(counted.attention, 1) if counted else 0,  # of the next layer: those of the one in use are among its activations
        host_inputs=counted.inputs if counted and counted.offloadable else 0,
        host_results=counted.attention if counted else 0,
        offloaded=2 * model.parameters.embedding if chunked and model.parameters.head else 0,
        head=2 * _offloadable_head(model, targets) if chunked else 0,
        streamable=layer_bytes if counted and counted.offloadable and shards == 1 else 0,
        working=counted.working if counted else 0,
        dequantized=dequantized,
        layer=max(counted.layers, key=lambda layer: sum(layer.values()), default={}) if counted else {},
        logits=logits_bytes(model.shape, tokens, chunked),
    )


def _offloadable_head(model: MetaModel, targets: str | list[str]) -> int:
    """Weights of an output layer that can be offloaded: a plain one. Where it is the embedding as well, that must be plain, so that its rows can
    be looked up in pinned memory."""
    import torch

    parameters, head = model.parameters, model.module.get_output_embeddings()
    if type(head) is not torch.nn.Linear or any(model.module.get_submodule(name) is head for name in adapter_shapes(model, targets)):
        return 0
    if parameters.head:
        return parameters.head
    return parameters.embedding if type(model.module.get_input_embeddings()) is torch.nn.Embedding else 0


class _Ledger:
    """Bytes that a forward pass saves for the backward pass, by layer (-1: outside all layers).

    Attributes:
        saved: bytes, by purpose.
        norms: bytes that the norms' inputs take.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[nn.Module]):
        self.saved: dict[int, Counter[str]] = defaultdict(Counter)
        self.norms: Counter[int] = Counter()
        self._seen: set[int] = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
        self._alive: list[torch.Tensor] = []  # a storage that is freed could give its address to another
        self._layer = -1
        self._inside: list[str] = []
        self._handles: list[RemovableHandle] = []
        for index, layer in enumerate(layers):
            self._on(layer, before=partial(setattr, self, "_layer", index), after=partial(setattr, self, "_layer", -1))
        for module in decoder.modules():
            if "Norm" in type(module).__name__:
                self._handles.append(module.register_forward_pre_hook(self._count_norm))
            if kind := next((kind for part, kind in _PARTS.items() if part in type(module).__name__), None):
                self._on(module, before=partial(self._inside.append, kind), after=self._inside.pop)

    def _on(self, module: nn.Module, before: Callable[[], object], after: Callable[[], object]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda *_: (before(), None)[1], with_kwargs=True))
        self._handles.append(module.register_forward_hook(lambda *_: (after(), None)[1], with_kwargs=True))

    def _count_norm(self, module: nn.Module, arguments: tuple) -> None:
        self.norms[self._layer] += 2 * arguments[0].numel()

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd calls this for each tensor that it saves."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.saved[self._layer][self._inside[-1] if self._inside else "rest"] += storage.nbytes()
        return tensor

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def activations(model: MetaModel, tokens: int, targets: str | list[str] = "all-linear", fused: bool = True) -> Activations:
    """Bytes that a forward pass over one row of `tokens` tokens saves for the backward pass, the adapters' inputs included, the logits not.

    Args:
        targets, fused: as `estimate_training` takes them.

    Raises:
        OlpackError: the architecture computes with data that the meta device does not have (mixtures of experts choose by value).
    """
    import torch
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.module.get_decoder()
    AttentionInterface.register("olpack-counted", _fused_attention)
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    adapted = adapter_shapes(model, targets)
    ledger = _Ledger(decoder, layers)
    before, frozen = decoder.config._attn_implementation, [parameter.requires_grad for parameter in decoder.parameters()]
    try:
        decoder.config._attn_implementation = "olpack-counted"
        decoder.requires_grad_(False)
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor):
            embedded = torch.empty(1, tokens, model.shape.hidden, dtype=torch.bfloat16, requires_grad=True)
            decoder(inputs_embeds=embedded, position_ids=torch.arange(tokens)[None], use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise OlpackError(
            f"The activations of {model.label} cannot be counted without data: {first_line(error)}",
            "Measure a step on the GPU.",
        ) from error
    finally:
        decoder.config._attn_implementation = before
        ledger.close()
        for parameter, required in zip(decoder.parameters(), frozen, strict=True):
            parameter.requires_grad_(required)
    widest = max((max(shape) for shape in adapted.values()), default=0)
    owners = {name: index for index, layer in enumerate(layers) for name in _names(model, layer)}
    linears: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, shape in adapted.items():
        linears[owners.get(name, -1)][name.rsplit(".", 1)[-1]] = shape
    outside, *within = (layer_terms(ledger.saved[index], ledger.norms[index], linears[index], tokens, fused) for index in range(-1, len(layers)))
    inputs, attention = len(layers) * 2 * tokens * model.shape.hidden, 0
    offloadable = not getattr(decoder.config, "num_kv_shared_layers", 0)
    if fused:  # the product of the MLP, and the gradients before and behind it, at 16 bits
        working = tokens * 2 * (widest + 2 * model.shape.hidden)
        # The attention output with a number a head in float32, and the product of the layer after it.
        sums = 4 * model.shape.heads
        if offloadable:
            attention = sum(tokens * (2 * sum(of["o_proj"]) + sums) for index, of in linears.items() if index >= 0 and "o_proj" in of)
    else:  # gradients of the widest activation on their way back, and the float32 copy that an adapter's input goes through
        working = tokens * widest * (2 + 2 + 4)
    return Activations(tuple(within), inputs, offloadable, attention, sum(outside.values()), working)


def _names(model: MetaModel, layer: nn.Module) -> list[str]:
    inside = {id(module) for module in layer.modules()}
    return [name for name, module in model.module.named_modules() if id(module) in inside]


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **options: object
) -> tuple[torch.Tensor, None]:
    """In place of attention: the shape of its output, and the tensors that a fused kernel saves.

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
