"""LoRA layers whose frozen part, low-rank part and backward pass are one function.

peft computes W·x and B·A·x one after the other and leaves the sum, the scaling and the casts to separate passes over memory. Here the
low-rank product is added by the matrix product itself, layers with the same input (query, key and value; gate and up) share the product
with their A matrices and the gradient of the input, and what can be computed again from the input is not kept:

    y_i = x·W_iᵀ + (x·A_iᵀ)·(s_i·B_i)ᵀ
    dx  = [dy_1 … dy_n  dh]·[W_1; …; W_n; A],  dh = [dy_i·s_i·B_i],  dA = dhᵀ·x,  dB_i = s_i·dy_iᵀ·h_i

Weights in 4 bits are dequantized for each product, never kept. Adapters stay in float32 and are cast for each product, as autocast does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from olpack.train import pointwise

GROUPS = (("q_proj", "k_proj", "v_proj"),)  # of an attention: one input


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer with its adapter.

    Attributes:
        weight: function of a dtype that gives the frozen weight, [out, in]; written into its second argument, if there is one.
        bias: [out], or None.
        a, b: the adapter's parameters, [rank, in] and [out, rank].
        scaling: the low-rank product is multiplied by it.
    """

    weight: Callable[..., torch.Tensor]
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


def fuse(model: torch.nn.Module) -> int:
    """Replace the forward passes of plain LoRA layers, of attentions' inputs and of gated MLPs. Returns how many layers are fused.

    Layers of other kinds (DoRA, dropout on the adapter's input, weights that are no matrices) stay as peft made them.
    """
    from peft.tuners.lora import LoraLayer

    found = {module: layer for module in model.modules() if isinstance(module, LoraLayer) and (layer := _layer(module))}
    done: set[torch.nn.Module] = set()
    for module in list(model.modules()):
        if _is_gated_mlp(module, found):
            _fuse_mlp(module, found)
            done |= {module.gate_proj, module.up_proj, module.down_proj}
        for names in GROUPS:
            if all(getattr(module, name, None) in found for name in names):
                layers = [getattr(module, name) for name in names]
                _fuse_group(layers, [found[layer] for layer in layers])
                done |= set(layers)
    for module in found.keys() - done:
        _fuse_group([module], [found[module]])
    return len(found)


def _layer(module) -> Layer | None:
    """What a peft layer comes to; None for one that is more than W·x + s·B·A·x."""
    (name,) = module.active_adapters
    if name not in module.lora_A or name in getattr(module, "lora_variant", {}) or module.lora_bias.get(name):
        return None
    if not isinstance(module.lora_dropout[name], torch.nn.Identity) or not isinstance(module.lora_A[name], torch.nn.Linear):
        return None
    weight = _frozen_weight(module.get_base_layer())
    if weight is None:
        return None
    return Layer(weight, module.get_base_layer().bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _frozen_weight(base: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """The dense weight of a frozen linear layer as `Layer.weight`; computed at each call where it is held in fewer bits."""
    if not isinstance(base, torch.nn.Linear):
        return None
    if hasattr(base, "dequantize"):
        return lambda dtype, out=None: _into(base.dequantize().to(dtype), out)
    if getattr(base.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        def from_four_bits(dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
            state = base.weight.quant_state
            if base.weight.is_cuda and state.dtype == dtype:  # on a CPU it cannot write into a tensor that is there
                return dequantize_4bit(base.weight.data, state, out=out)
            return _into(dequantize_4bit(base.weight.data, state).to(dtype), out)

        return from_four_bits
    if type(base) is torch.nn.Linear and base.weight.is_floating_point() and not base.weight.requires_grad:
        return lambda dtype, out=None: _into(base.weight.to(dtype), out)
    return None


def _into(weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return weight if out is None else out.copy_(weight)


def _is_gated_mlp(module: torch.nn.Module, found: dict) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(part in found and found[part].bias is None for part in parts) and pointwise.gate_of(getattr(module, "act_fn", None)) is not None


def _fuse_mlp(module: torch.nn.Module, found: dict) -> None:
    gate = pointwise.gate_of(module.act_fn)
    layers = tuple(found[getattr(module, name)] for name in ("gate_proj", "up_proj", "down_proj"))
    module.forward = lambda x: _GatedMlp.apply(x, gate, layers, *_adapters(layers))


def _fuse_group(modules: list, layers: list[Layer]) -> None:
    """The first of the layers that is called with an input computes all of them; the others take what it left for them."""
    layers = tuple(layers)
    if len(layers) == 1:
        modules[0].forward = lambda x, *_, **__: _Group.apply(x, layers, *_adapters(layers))[0]
        return
    waiting: dict[int, torch.Tensor] = {}
    of: list[torch.Tensor] = []  # the input that they belong to

    def forward(x: torch.Tensor, index: int) -> torch.Tensor:
        if index not in waiting or of[0] is not x:
            waiting.update(enumerate(_Group.apply(x, layers, *_adapters(layers))))
            of[:] = [x]
        found = waiting.pop(index)
        if not waiting:
            of.clear()
        return found

    for index, module in enumerate(modules):
        module.forward = lambda x, *_, index=index, **__: forward(x, index)


def _adapters(layers: tuple[Layer, ...]) -> list[torch.nn.Parameter]:
    return [parameter for layer in layers for parameter in (layer.a, layer.b)]


def _down(x: torch.Tensor, layers: tuple[Layer, ...]) -> torch.Tensor:
    """h = x·Aᵀ of all layers, [tokens, ranks]."""
    return x @ torch.cat([layer.a for layer in layers]).to(x.dtype).T


def _up(x: torch.Tensor, h: torch.Tensor, layer: Layer) -> torch.Tensor:
    """h·(s·B)ᵀ + bias + x·Wᵀ, [tokens, out]; the large product adds to the small one, which costs no pass of its own."""
    low = h @ layer.scaled_b(x.dtype).T if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), h, layer.scaled_b(x.dtype).T)
    return low.addmm_(x, layer.weight(x.dtype).T)


def _h_of(h: torch.Tensor, layers: tuple[Layer, ...]) -> tuple[torch.Tensor, ...]:
    return h.split([layer.rank for layer in layers], dim=1)


def _join(tokens: int, layers: tuple[Layer, ...], like: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Room for [dy_1 … dy_n  dh]: (all of it, the parts of the dy). Its width is a multiple of 8, which matrix units want."""
    outs = [layer.b.shape[0] for layer in layers]
    width = sum(outs) + sum(layer.rank for layer in layers)
    joined = like.new_empty(tokens, width + -width % 8)
    joined[:, width:] = 0
    return joined, list(joined[:, : sum(outs)].split(outs, dim=1))


def _stacked_weights(layers: tuple[Layer, ...], width: int, dtype: torch.dtype) -> torch.Tensor:
    """[W_1; …; W_n; A_1; …; A_n], [width, in], the last rows zero where the width is more than these."""
    stacked = torch.empty(width, layers[0].a.shape[1], dtype=dtype, device=layers[0].a.device)
    at = 0
    for layer in layers:
        layer.weight(dtype, stacked[at : (at := at + layer.b.shape[0])])
    for layer in layers:
        stacked[at : (at := at + layer.rank)] = layer.a
    stacked[at:] = 0
    return stacked


def _backward(joined: torch.Tensor, dys: list[torch.Tensor], h: torch.Tensor, layers: tuple[Layer, ...], *, need_x: bool):
    """(dx or None, dh, the dB) of a group, with the dy in `joined`, which is completed."""
    outs = sum(dy.shape[1] for dy in dys)
    dh = joined[:, outs : outs + h.shape[1]]
    for dy, part, layer in zip(dys, _h_of(dh, layers), layers, strict=True):
        part.copy_(dy @ layer.scaled_b(h.dtype))
    dbs = [(dy.T @ part).float().mul_(layer.scaling) for dy, part, layer in zip(dys, _h_of(h, layers), layers, strict=True)]
    dx = joined @ _stacked_weights(layers, joined.shape[1], h.dtype) if need_x else None
    return dx, dh, dbs


def _gradients(dh: torch.Tensor, x: torch.Tensor, dbs: list[torch.Tensor], layers: tuple[Layer, ...]) -> list[torch.Tensor]:
    """[dA_1, dB_1, dA_2, …] in float32."""
    das = (dh.T @ x).float().split([layer.rank for layer in layers])
    return [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]


class _Group(torch.autograd.Function):
    """Layers with one input: x [..., in] -> one [..., out] for each."""

    @staticmethod
    def forward(ctx, x, layers, *adapters):
        flat = x.flatten(0, -2)
        h = _down(flat, layers)
        ctx.save_for_backward(flat, h)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(_up(flat, part, layer).unflatten(0, x.shape[:-1]) for part, layer in zip(_h_of(h, layers), layers, strict=True))

    @staticmethod
    def backward(ctx, *gradients):
        x, h = ctx.saved_tensors
        joined, dys = _join(len(x), ctx.layers, h)
        for dy, gradient in zip(dys, gradients, strict=True):
            dy.copy_(gradient.flatten(0, -2))
        dx, dh, dbs = _backward(joined, dys, h, ctx.layers, need_x=ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape), None, *_gradients(dh, x, dbs, ctx.layers))


class _GatedMlp(torch.autograd.Function):
    """down(gate_function(gate(x)) · up(x)), with the product of the two computed again in the backward pass."""

    @staticmethod
    def forward(ctx, x, gate, layers, *adapters):
        flat = x.flatten(0, -2)
        pair, (down,) = layers[:2], layers[2:]
        h = _down(flat, pair)
        gated, upped = (_up(flat, part, layer) for part, layer in zip(_h_of(h, pair), pair, strict=True))
        middle = gate.product(gated, upped)
        low = _down(middle, (down,))
        ctx.save_for_backward(flat, h, gated, upped, low)
        ctx.gate, ctx.layers, ctx.shape = gate, layers, x.shape
        return _up(middle, low, down).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        x, h, gated, upped, low = ctx.saved_tensors
        pair, down = ctx.layers[:2], ctx.layers[2:]
        joined, (dy,) = _join(len(x), down, low)
        dy.copy_(gradient.flatten(0, -2))
        dmiddle, dlow, ddown = _backward(joined, [dy], low, down, need_x=True)
        joined, (dgated, dupped) = _join(len(x), pair, h)
        middle = ctx.gate.gradients(dmiddle, gated, upped, dgated, dupped)
        of_down = _gradients(dlow, middle, ddown, down)
        del dmiddle, middle
        dx, dh, dbs = _backward(joined, [dgated, dupped], h, pair, need_x=ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape), None, None, *_gradients(dh, x, dbs, pair), *of_down)
