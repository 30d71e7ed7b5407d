"""LoRA layers whose frozen part, low-rank part and backward pass are one function.

peft computes W·x and B·A·x one after the other and leaves the sum, the scaling and the casts to separate passes over memory. Here the large
product adds to the low-rank one, layers with the same input (query, key and value; gate and up) share the product with their A matrices and
the gradient of the input, and what can be computed again from the input is not saved:

    h = x·Aᵀ,  y_i = h_i·(s_i·B_i)ᵀ + x·W_iᵀ
    dh_i = dy_i·s_i·B_i,  dx = dh·A + Σ dy_i·W_i,  dA = dhᵀ·x,  dB_i = s_i·dy_iᵀ·h_i

Weights in 4 bits are dequantized for each product, never saved. Adapters stay in float32 and are cast for each product, as autocast does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import torch

from olpack.train.ops import pointwise
from olpack.train.ops.activation_checkpointing import once, output_unneeded
from olpack.train.ops.low_rank import MlpLowRank

GROUPS = (("q_proj", "k_proj", "v_proj"),)  # of an attention: one input
OFFLOADED = "o_proj"  # whose product, after the attention output, may be saved (`olpack.train.ops.activation_checkpointing.once`)
GATED = ("gate_proj", "up_proj", "down_proj")  # of a gated MLP


@runtime_checkable
class _Packed(Protocol):
    """A layer that has its weight in fewer bits."""

    def dequantize(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer with its adapter.

    Attributes:
        weight: the frozen weight as a function of the dtype, [out, in].
        bias: [out], or None.
        a, b: the adapter's parameters, [rank, in] and [out, rank].
        scaling: the low-rank product is multiplied by it.
    """

    weight: Callable[[torch.dtype], torch.Tensor]
    bias: torch.Tensor | None
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaled_b(self, dtype: torch.dtype) -> torch.Tensor:
        """s·B, [out, rank]."""
        return (self.b * self.scaling).to(dtype)


def fuse(model: torch.nn.Module, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Replace the forward passes of plain LoRA layers, of attentions' inputs and of gated MLPs, which then compute in `dtype`.

    Layers of other kinds (DoRA, dropout on the adapter's input, weights that are no matrices) stay as peft made them.

    Returns:
        the modules with another `forward` than their class's.
    """
    from peft.tuners.lora import LoraLayer

    plain: dict[torch.nn.Module, Layer] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer) and (layer := _plain_layer(module)):
            plain[module] = layer
    done: set[torch.nn.Module] = set()
    changed: list[torch.nn.Module] = []
    for module in list(model.modules()):
        if (gate := _gate(module, plain)) is not None:
            parts = [getattr(module, name) for name in GATED]
            module.forward = _mlp_forward(gate, tuple(plain[part] for part in parts), dtype)
            changed.append(module)
            done |= set(parts)
        for names in GROUPS:
            if all(getattr(module, name, None) in plain for name in names):
                layers = [getattr(module, name) for name in names]
                _fuse_group(layers, tuple(plain[layer] for layer in layers), dtype)
                done |= set(layers)
                changed += layers
    for name, module in model.named_modules():
        if module in plain and module not in done:
            _fuse_group([module], (plain[module],), dtype, offloaded=name.rpartition(".")[2] == OFFLOADED)
            changed.append(module)
    return changed


def _plain_layer(module) -> Layer | None:
    """A peft layer that computes W·x + s·B·A·x; None for one that does more."""
    (name,) = module.active_adapters
    if name not in module.lora_A or name in getattr(module, "lora_variant", {}) or module.lora_bias.get(name):
        return None
    if not isinstance(module.lora_dropout[name], torch.nn.Identity) or not isinstance(module.lora_A[name], torch.nn.Linear):
        return None
    weight = _frozen_weight(module.get_base_layer())
    if weight is None:
        return None
    return Layer(weight, module.get_base_layer().bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _frozen_weight(base: torch.nn.Module) -> Callable[[torch.dtype], torch.Tensor] | None:
    """The dense weight of a frozen linear layer as `Layer.weight`; computed at each call where it is quantized."""
    if not isinstance(base, torch.nn.Linear):
        return None
    if isinstance(base, _Packed):
        return lambda dtype: base.dequantize().to(dtype)
    # Read now, because a weight that is sharded over several GPUs no longer has it.
    if (state := getattr(base.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        def dense(dtype: torch.dtype) -> torch.Tensor:
            kernels = pointwise.kernels_for(base.weight) if state.dtype == dtype else None
            return (kernels.dequantize_4bit if kernels else dequantize_4bit)(base.weight.data, state).to(dtype)

        return dense
    if type(base) is torch.nn.Linear and base.weight.is_floating_point() and not base.weight.requires_grad:
        return lambda dtype: base.weight.to(dtype)
    return None


def _gate(module: torch.nn.Module, plain: Mapping[torch.nn.Module, Layer]) -> pointwise.Gate | None:
    """The gate of a gated MLP of plain layers without bias; None for any other module."""
    layers = [plain.get(getattr(module, name, module)) for name in GATED]
    if not all(layer is not None and layer.bias is None for layer in layers):
        return None
    return pointwise.gate_of(getattr(module, "act_fn", None))


def _mlp_forward(gate: pointwise.Gate, layers: tuple[Layer, ...], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _GatedMlp.apply(x.to(dtype), gate, layers, *_adapters(layers))


def _fuse_group(modules: Sequence[torch.nn.Module], layers: tuple[Layer, ...], dtype: torch.dtype, *, offloaded: bool = False) -> None:
    """The first of the layers that is called with an input computes all of them; the others take their products from it."""
    if len(layers) == 1:
        modules[0].forward = lambda x, *_, **__: _Group.apply(x.to(dtype), layers, offloaded, *_adapters(layers))[0]
        return
    waiting: dict[int, torch.Tensor] = {}  # products that no layer has taken yet
    of: list[torch.Tensor] = []  # the input that they belong to

    def forward(x: torch.Tensor, index: int) -> torch.Tensor:
        if index not in waiting or of[0] is not x:
            waiting.update(enumerate(_Group.apply(x.to(dtype), layers, offloaded, *_adapters(layers))))
            of[:] = [x]
        product = waiting.pop(index)
        if not waiting:
            of.clear()
        return product

    for index, module in enumerate(modules):
        module.forward = lambda x, *_, index=index, **__: forward(x, index)


def _adapters(layers: tuple[Layer, ...]) -> list[torch.nn.Parameter]:
    return [parameter for layer in layers for parameter in (layer.a, layer.b)]


def _down(x: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """h = x·Aᵀ of all layers, [tokens, ranks]."""
    return x @ torch.cat([layer.a for layer in layers]).to(x.dtype).T


def _up(x: torch.Tensor, h: torch.Tensor, layer: Layer) -> torch.Tensor:
    """h·(s·B)ᵀ + bias + x·Wᵀ, [tokens, out]; the large product adds to the small one, which costs no pass of its own."""
    low = h @ layer.scaled_b(x.dtype).T if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), h, layer.scaled_b(x.dtype).T)
    return low.addmm_(x, layer.weight(x.dtype).T)


def _h_of(h: torch.Tensor, layers: tuple[Layer, ...]) -> tuple[torch.Tensor, ...]:
    return h.split([layer.rank for layer in layers], dim=1)


def _gradients(dys: list[torch.Tensor], x: torch.Tensor, h: torch.Tensor, layers: tuple[Layer, ...], dh: torch.Tensor) -> list[torch.Tensor]:
    """[dA_1, dB_1, dA_2, …] in float32."""
    of_b = [(dy.T @ part).float().mul_(layer.scaling) for dy, part, layer in zip(dys, _h_of(h, layers), layers, strict=True)]
    return list(chain.from_iterable(zip(_gradients_of_a(x, dh, layers), of_b, strict=True)))


def _gradients_of_a(x: torch.Tensor, dh: torch.Tensor, layers: Sequence[Layer]) -> Sequence[torch.Tensor]:
    """dA of each, float32."""
    return (dh.T @ x).float().split([layer.rank for layer in layers])


def _to_h(dys: list[torch.Tensor], layers: tuple[Layer, ...]) -> torch.Tensor:
    """dh, [tokens, ranks]."""
    return torch.cat([dy @ layer.scaled_b(dy.dtype) for dy, layer in zip(dys, layers, strict=True)], dim=1)


def _to_x(dys: list[torch.Tensor], dh: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """dx, [tokens, in]; each large product adds to the ones before."""
    dx = dh @ torch.cat([layer.a for layer in layers]).to(dh.dtype)
    for dy, layer in zip(dys, layers, strict=True):
        dx.addmm_(dy, layer.weight(dh.dtype))
    return dx


class _Group(torch.autograd.Function):
    """Layers with one input: x [..., in] -> one [..., out] for each."""

    @staticmethod
    def forward(ctx, x, layers, offloaded, *adapters):
        flat = x.flatten(0, -2)
        h = _down(flat, layers)
        ctx.save_for_backward(flat, h)
        ctx.layers, ctx.shape = layers, x.shape

        def products() -> tuple[torch.Tensor, ...]:
            return tuple(_up(flat, part, layer) for part, layer in zip(_h_of(h, layers), layers, strict=True))

        return tuple(product.unflatten(0, x.shape[:-1]) for product in (once(products) if offloaded else products()))

    @staticmethod
    def backward(ctx, *gradients):
        x, h = ctx.saved_tensors
        dys = [gradient.flatten(0, -2) for gradient in gradients]
        dh = _to_h(dys, ctx.layers)
        dx = _to_x(dys, dh, ctx.layers).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *_gradients(dys, x, h, ctx.layers, dh)


class _GatedMlp(torch.autograd.Function):
    """down(f(gate(x)) · up(x)). With kernels, what the adapters of gate and up add is computed in the gate's kernel, and never written to memory; the
    product of the two is computed again in the backward pass, and their gradients take their places: the MLP is where a layer needs most memory."""

    @staticmethod
    def forward(ctx, x, gate, layers, *adapters):
        flat = x.flatten(0, -2)
        *pair, down = layers
        h = _down(flat, pair)
        low_rank = _low_rank(h, layers)
        if gate.adds(low_rank):
            gated, upped = (flat @ layer.weight(flat.dtype).T for layer in pair)
        else:
            gated, upped = (_up(flat, part, layer) for part, layer in zip(_h_of(h, pair), pair, strict=True))
        ctx.gate, ctx.layers, ctx.shape = gate, layers, x.shape

        def product() -> tuple[torch.Tensor, torch.Tensor]:
            return gate.product(gated, upped, low_rank)

        if output_unneeded.get():
            (low,) = once(lambda: product()[1:], small=True)
            y = x.new_zeros(()).expand(*x.shape[:-1], down.b.shape[0])
        else:
            middle, low = product()
            (low,) = once(lambda: (low,), small=True)
            y = _up(middle, low, down).unflatten(0, x.shape[:-1])
        ctx.save_for_backward(flat, h, gated, upped, low)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, h, gated, upped, low = ctx.saved_tensors
        *pair, down = ctx.layers
        adapters, dy = _low_rank(h, ctx.layers), gradient.flatten(0, -2)
        dlow = dy @ down.scaled_b(dy.dtype)
        dmiddle = dy @ down.weight(dy.dtype) if ctx.gate.adds(adapters) else _to_x([dy], dlow, [down])
        of_adapters = ctx.gate.gradients(dmiddle, gated, upped, adapters, dlow)
        torch.autograd.graph.increment_version((gated, upped))  # so that autograd refuses a second backward pass
        dx = _to_x([gated, upped], of_adapters.h, pair).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_a = _gradients_of_a(x, of_adapters.h, pair)
        of_b = [of_adapters.gate_b, of_adapters.up_b, (dy.T @ low).float()]
        of_b = [gradient * layer.scaling for gradient, layer in zip(of_b, ctx.layers, strict=True)]
        return dx, None, None, *chain.from_iterable(zip([*of_a, of_adapters.down_a], of_b, strict=True))


def _low_rank(h: torch.Tensor, layers: tuple[Layer, ...]) -> MlpLowRank:
    gate, up, down = layers
    return MlpLowRank(h, gate.scaled_b(h.dtype), up.scaled_b(h.dtype), down.a.to(h.dtype))
