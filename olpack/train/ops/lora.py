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
from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from olpack.train.ops import fp8, pointwise
from olpack.train.ops.activation_checkpointing import once, output_unneeded
from olpack.train.ops.low_rank import MlpLowRank

GROUPS = (("q_proj", "k_proj", "v_proj"),)  # of an attention: one input
OFFLOADED = "o_proj"  # whose product, after the attention output, may be saved (`olpack.train.ops.activation_checkpointing.once`)
GATED = ("gate_proj", "up_proj", "down_proj")  # of a gated MLP


@runtime_checkable
class _Packed(Protocol):
    """A layer that has its weight in fewer bits."""

    def dequantize(self) -> torch.Tensor: ...

    def write_fp8(self, scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool: ...


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer with its adapter.

    Attributes:
        weight: the frozen weight as a function of the dtype, [out, in].
        write_fp8: writes its fp8 codes; None for a weight that is not packed.
        bias: [out], or None.
        a, b: the adapter's parameters, [rank, in] and [out, rank].
        scaling: the low-rank product is multiplied by it.
    """

    weight: Callable[[torch.dtype], torch.Tensor]
    write_fp8: fp8.WriteFp8 | None
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


class _Products:
    """The products of layers that have one input, in `dtype`."""

    def __init__(self, layers: tuple[Layer, ...], dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype

    def operand(self, x: torch.Tensor) -> Any:
        """The input as `product` takes it."""
        return x

    def product(self, x: Any, index: int) -> torch.Tensor:
        """x·Wᵀ, [tokens, out]."""
        return x @ self.layers[index].weight(self.dtype).T

    def up(self, x: Any, h: torch.Tensor, index: int) -> torch.Tensor:
        """h·(s·B)ᵀ + bias + x·Wᵀ, [tokens, out]; the large product adds to the small one, which costs no pass of its own."""
        layer = self.layers[index]
        low = h @ layer.scaled_b(h.dtype).T if layer.bias is None else torch.addmm(layer.bias.to(h.dtype), h, layer.scaled_b(h.dtype).T)
        return low.addmm_(x, layer.weight(h.dtype).T)

    def ups(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`up` of all layers."""
        operand = self.operand(x)
        return tuple(self.up(operand, part, index) for index, part in enumerate(_h_of(h, self.layers)))

    def to_x(self, dys: Sequence[torch.Tensor], dh: torch.Tensor) -> torch.Tensor:
        """dx, [tokens, in]; each large product adds to the ones before."""
        dx = dh @ _a(self.layers, dh.dtype)
        for dy, layer in zip(dys, self.layers, strict=True):
            dx.addmm_(dy, layer.weight(dh.dtype))
        return dx

    def to_x_alone(self, dy: torch.Tensor) -> torch.Tensor:
        """dy·W of a single layer, without what its adapter adds."""
        (layer,) = self.layers
        return dy @ layer.weight(dy.dtype)


class _Fp8Products(_Products):
    """The same in fp8: the small product adds to the large one."""

    def __init__(self, layers: tuple[Layer, ...], dtype: torch.dtype):
        super().__init__(layers, dtype)
        self._weights = fp8.Fp8Weights([fp8.Weight(layer.weight, layer.write_fp8) for layer in layers], dtype)

    def operand(self, x: torch.Tensor) -> torch.Tensor | fp8.Codes:
        return x if fp8.in_16_bits.get() else fp8.quantize_rows(x)

    def product(self, x: torch.Tensor | fp8.Codes, index: int) -> torch.Tensor:
        return super().product(x, index) if isinstance(x, torch.Tensor) else self._weights.product(x, index)

    def up(self, x: torch.Tensor | fp8.Codes, h: torch.Tensor, index: int) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return super().up(x, h, index)
        layer = self.layers[index]
        y = self.product(x, index).addmm_(h, layer.scaled_b(h.dtype).T)
        return y if layer.bias is None else y.add_(layer.bias)

    def to_x(self, dys: Sequence[torch.Tensor], dh: torch.Tensor) -> torch.Tensor:
        return self._weights.gradient(dys).addmm_(dh, _a(self.layers, dh.dtype))

    def to_x_alone(self, dy: torch.Tensor) -> torch.Tensor:
        return self._weights.gradient([dy])


def _products(layers: tuple[Layer, ...], dtype: torch.dtype, in_fp8: bool) -> _Products:
    fits = all(fp8.fits(layer.a.shape[1], layer.b.shape[0]) for layer in layers)
    return (_Fp8Products if in_fp8 and fits else _Products)(layers, dtype)


def fuse(model: torch.nn.Module, dtype: torch.dtype, *, in_fp8: bool = False) -> list[torch.nn.Module]:
    """Replace the forward passes of plain LoRA layers, of attentions' inputs and of gated MLPs, which then compute in `dtype`.

    Layers of other kinds (DoRA, dropout on the adapter's input, weights that are no matrices) stay as peft made them.

    Args:
        in_fp8: the products with frozen weights are computed in fp8 (`olpack.train.ops.fp8`), where it takes their sizes.

    Returns:
        the modules with another `forward` than their class's.
    """
    plain: dict[torch.nn.Module, Layer] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer) and (layer := _plain_layer(module)):
            plain[module] = layer
    done: set[torch.nn.Module] = set()
    changed: list[torch.nn.Module] = []
    for module in list(model.modules()):
        if (gate := _gate(module, plain)) is not None:
            parts = [getattr(module, name) for name in GATED]
            module.forward = _mlp_forward(gate, tuple(plain[part] for part in parts), dtype, in_fp8)
            changed.append(module)
            done |= set(parts)
        for names in GROUPS:
            if all(getattr(module, name, None) in plain for name in names):
                layers = [getattr(module, name) for name in names]
                _fuse_group(layers, _products(tuple(plain[layer] for layer in layers), dtype, in_fp8))
                done |= set(layers)
                changed += layers
    for name, module in model.named_modules():
        if module in plain and module not in done:
            _fuse_group([module], _products((plain[module],), dtype, in_fp8), offloaded=name.rpartition(".")[2] == OFFLOADED)
            changed.append(module)
    return changed


def all_fused(model: torch.nn.Module) -> bool:
    """Whether `fuse` takes all layers with an adapter."""
    return all(isinstance(layer, LoraLayer) and _plain_layer(layer) is not None for layer in _adapted(model))


def frozen_weights(model: torch.nn.Module) -> int:
    """Weights of the layers with an adapter."""
    layers = (layer for layer in _adapted(model) if isinstance(layer, LoraLayer))
    return sum((layer.in_features or 0) * (layer.out_features or 0) for layer in layers)


def _adapted(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


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
    return Layer(*weight, module.get_base_layer().bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _frozen_weight(base: torch.nn.Module) -> fp8.Weight | None:
    """The weight of a frozen linear layer, computed at each call where it is quantized."""
    if not isinstance(base, torch.nn.Linear):
        return None
    if isinstance(base, _Packed):
        return fp8.Weight(lambda dtype: base.dequantize().to(dtype), base.write_fp8)
    # Read now, because a weight that is sharded over several GPUs no longer has it.
    if (state := getattr(base.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        def dense(dtype: torch.dtype) -> torch.Tensor:
            kernels = pointwise.kernels_for(base.weight) if state.dtype == dtype else None
            return (kernels.dequantize_4bit if kernels else dequantize_4bit)(base.weight.data, state).to(dtype)

        def write_fp8(scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool:
            kernels = pointwise.kernels_for(codes) if state.shape[1] % state.blocksize == 0 else None
            if kernels is not None:
                kernels.dequantize_4bit_to_fp8(base.weight.data, state, scale, codes, turned)
            return kernels is not None

        return fp8.Weight(dense, write_fp8)
    if type(base) is torch.nn.Linear and base.weight.is_floating_point() and not base.weight.requires_grad:
        return fp8.Weight(lambda dtype: base.weight.to(dtype), None)
    return None


def _gate(module: torch.nn.Module, plain: Mapping[torch.nn.Module, Layer]) -> pointwise.Gate | None:
    """The gate of a gated MLP of plain layers without bias; None for any other module."""
    layers = [plain.get(getattr(module, name, module)) for name in GATED]
    if not all(layer is not None and layer.bias is None for layer in layers):
        return None
    return pointwise.gate_of(getattr(module, "act_fn", None))


def _mlp_forward(gate: pointwise.Gate, layers: tuple[Layer, ...], dtype: torch.dtype, in_fp8: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    pair, down = _products(layers[:2], dtype, in_fp8), _products(layers[2:], dtype, in_fp8)
    return lambda x: _GatedMlp.apply(x.to(dtype), gate, pair, down, *_adapters(layers))


def _fuse_group(modules: Sequence[torch.nn.Module], products: _Products, *, offloaded: bool = False) -> None:
    """The first of the layers that is called with an input computes all of them; the others take their products from it."""
    layers, dtype = products.layers, products.dtype
    if len(layers) == 1:
        modules[0].forward = lambda x, *_, **__: _Group.apply(x.to(dtype), products, offloaded, *_adapters(layers))[0]
        return
    waiting: dict[int, torch.Tensor] = {}  # products that no layer has taken yet
    of: list[torch.Tensor] = []  # the input that they belong to

    def forward(x: torch.Tensor, index: int) -> torch.Tensor:
        if index not in waiting or of[0] is not x:
            waiting.update(enumerate(_Group.apply(x.to(dtype), products, offloaded, *_adapters(layers))))
            of[:] = [x]
        product = waiting.pop(index)
        if not waiting:
            of.clear()
        return product

    for index, module in enumerate(modules):
        module.forward = lambda x, *_, index=index, **__: forward(x, index)


def _adapters(layers: tuple[Layer, ...]) -> list[torch.nn.Parameter]:
    return [parameter for layer in layers for parameter in (layer.a, layer.b)]


def _a(layers: Sequence[Layer], dtype: torch.dtype) -> torch.Tensor:
    """A of all layers, [ranks, in]."""
    return torch.cat([layer.a for layer in layers]).to(dtype)


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


class _Group(torch.autograd.Function):
    """Layers with one input: x [..., in] -> one [..., out] for each."""

    @staticmethod
    def forward(ctx, x, products, offloaded, *adapters):
        flat = x.flatten(0, -2)
        h = flat @ _a(products.layers, flat.dtype).T
        ctx.save_for_backward(flat, h)
        ctx.products, ctx.shape = products, x.shape
        ups = once(lambda: products.ups(flat, h)) if offloaded else products.ups(flat, h)
        return tuple(product.unflatten(0, x.shape[:-1]) for product in ups)

    @staticmethod
    def backward(ctx, *gradients):
        x, h = ctx.saved_tensors
        dys = [gradient.flatten(0, -2) for gradient in gradients]
        dh = _to_h(dys, ctx.products.layers)
        dx = ctx.products.to_x(dys, dh).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *_gradients(dys, x, h, ctx.products.layers, dh)


class _GatedMlp(torch.autograd.Function):
    """down(f(gate(x)) · up(x)). With kernels, what the adapters of gate and up add is computed in the gate's kernel, and never written to memory; the
    product of the two is computed again in the backward pass, and their gradients take their places: the MLP is where a layer needs most memory."""

    @staticmethod
    def forward(ctx, x, gate, pair, down, *adapters):
        flat = x.flatten(0, -2)
        h = flat @ _a(pair.layers, flat.dtype).T
        low_rank = _low_rank(h, pair, down)
        if gate.adds(low_rank):
            operand = pair.operand(flat)
            gated, upped = (pair.product(operand, index) for index in range(2))
            del operand
        else:
            gated, upped = pair.ups(flat, h)
        ctx.gate, ctx.pair, ctx.down, ctx.shape = gate, pair, down, x.shape

        def product() -> tuple[torch.Tensor, torch.Tensor]:
            return gate.product(gated, upped, low_rank)

        if output_unneeded.get():
            (low,) = once(lambda: product()[1:], small=True)
            y = x.new_zeros(()).expand(*x.shape[:-1], down.layers[0].b.shape[0])
        else:
            middle, low = product()
            (low,) = once(lambda: (low,), small=True)
            y = down.up(down.operand(middle), low, 0).unflatten(0, x.shape[:-1])
        ctx.save_for_backward(flat, h, gated, upped, low)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, h, gated, upped, low = ctx.saved_tensors
        pair, down, layers = ctx.pair, ctx.down, (*ctx.pair.layers, *ctx.down.layers)
        adapters, dy = _low_rank(h, pair, down), gradient.flatten(0, -2)
        dlow = _to_h([dy], down.layers)
        dmiddle = down.to_x_alone(dy) if ctx.gate.adds(adapters) else down.to_x([dy], dlow)
        of_adapters = ctx.gate.gradients(dmiddle, gated, upped, adapters, dlow)
        del dmiddle
        torch.autograd.graph.increment_version((gated, upped))  # so that autograd refuses a second backward pass
        dx = pair.to_x([gated, upped], of_adapters.h).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_a = _gradients_of_a(x, of_adapters.h, pair.layers)
        of_b = [of_adapters.gate_b, of_adapters.up_b, (dy.T @ low).float()]
        of_b = [gradient * layer.scaling for gradient, layer in zip(of_b, layers, strict=True)]
        return dx, None, None, None, *chain.from_iterable(zip([*of_a, of_adapters.down_a], of_b, strict=True))


def _low_rank(h: torch.Tensor, pair: _Products, down: _Products) -> MlpLowRank:
    (gate, up), (last,) = pair.layers, down.layers
    return MlpLowRank(h, gate.scaled_b(h.dtype), up.scaled_b(h.dtype), last.a.to(h.dtype))
