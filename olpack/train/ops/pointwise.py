"""The work of a layer beside its large matrix products, each as one pass over memory: norms, rotary embeddings, gates, the loss of the logits.

The functions are plain torch, and define what is computed. On a GPU those of `olpack.train.ops.kernels` take their place; where these do not work
(`use_kernels` warns once), the plain ones run. Their gradients are written out, because a frozen norm needs none for its
weight and a gate can give several results at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from olpack import progress
from olpack.errors import first_line
from olpack.train.ops.limits import UNCOUNTED
from olpack.train.ops.low_rank import Gradients, MlpLowRank

P = ParamSpec("P")
R = TypeVar("R")

_kernels: ModuleType | None = None  # `olpack.train.ops.kernels`, once they have run
_compiling: threading.Thread | None = None
_compiled: tuple | None = None  # the arguments of what compiles or has been compiled


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """`olpack.train.ops.kernels`, for a tensor on a GPU where they work."""
    return _kernels if x.is_cuda and x.numel() else None


class _WithKernel(Generic[P, R]):
    """A function whose place a kernel of the same name takes, for tensors on a GPU where the kernels work.

    Attributes:
        plain: the function itself.
    """

    def __init__(self, plain: Callable[Concatenate[torch.Tensor, P], R]):
        self.plain = plain

    def __call__(self, x: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        kernels = kernels_for(x)
        function = getattr(kernels, self.plain.__name__) if kernels else self.plain
        return function(x, *args, **kwargs)


def compile_kernels(device: torch.device, dtype: torch.dtype, config: Mapping[str, Any], rank: int) -> None:
    """Begin to compile the kernels for a GPU, while libraries are imported and the model loads. They stay on disk: this is for the first run on a
    machine. What has begun with the same arguments is not begun again.

    Args:
        dtype: that the model computes in.
        config: the base's config.json.
        rank: of the adapter.
    """
    global _compiling, _compiled
    if device.type != "cuda":
        return
    try:  # here and not in the thread: two threads that import the same modules find them half made
        from olpack.train.ops import block_kernels, kernels
    except ImportError:  # `use_kernels` warns of it
        return
    sizes = _sizes({**config, **(config.get("text_config") or {})}, rank)
    of_gguf = (config.get("quantization_config") or {}).get("types", ())
    if _compiled == (compiled := (dtype, sizes, list(of_gguf))):
        return
    _compiled = compiled

    def compile_all() -> None:
        with contextlib.suppress(Exception):
            for _ in itertools.chain(kernels.compile_for(dtype, **sizes), block_kernels.compile_for(of_gguf, dtype)):
                if not threading.main_thread().is_alive():  # the run is over already
                    return

    _compiling = threading.Thread(target=compile_all)
    _compiling.start()


def _sizes(config: Mapping[str, Any], rank: int) -> dict[str, int]:
    """The arguments of `olpack.train.ops.kernels.compile_for`; a usual size where the config has none, or one for each layer."""

    def size(name: str, usual: int) -> int:
        value = config.get(name)
        return value if isinstance(value, int) else usual

    hidden = size("hidden_size", 4096)
    head = size("head_dim", hidden // size("num_attention_heads", 32))
    return {"hidden": hidden, "middle": size("intermediate_size", 4 * hidden), "head": head, "vocabulary": size("vocab_size", 32000), "rank": rank}


def use_kernels(device: torch.device, dtype: torch.dtype, config: Mapping[str, Any], rank: int) -> None:
    """Use the kernels on a GPU, if they work there: each runs once.

    Args:
        dtype: that the model computes in.
        config: of its text model; rank: of the adapter.
    """
    global _kernels
    if device.type != "cuda" or _kernels is not None:
        return
    if _compiling is not None:
        _compiling.join()
    try:
        from olpack.train.ops import kernels

        kernels.run_once(device, dtype, **_sizes(config, rank))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, the plain functions run
        progress.warn(f"Triton does not work here, so training goes without fused kernels: {first_line(error)}")
        return
    _kernels = kernels


@_WithKernel
def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / rms(x) · (offset + weight), 1 / rms(x)) over the last dimension, computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (offset + weight.float())).to(x.dtype), scale


@_WithKernel
def norm_backward(dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    """dx = scale · (g - x̂ · mean(g · x̂)) with g = dy · (offset + weight) and x̂ = x · scale."""
    scaled = x.float() * scale
    gradient = dy.float() * (offset + weight.float())
    return ((gradient - scaled * (gradient * scaled).mean(-1, keepdim=True)) * scale).to(dy.dtype)


class _RmsNorm(torch.autograd.Function):
    """RMS norm with a frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        rows = _rows(x)
        y, scale = norm(rows, weight, eps, offset)
        ctx.save_for_backward(rows, scale, weight)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, scale, weight = ctx.saved_tensors
        return norm_backward(_rows(dy), rows, scale, weight, ctx.offset).view(dy.shape), None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, size], one after the other in memory."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def fuse_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Replace the forward pass of every RMS norm that computes what `norm` does, which is tried. Returns these norms."""
    changed = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (forward := _fused_norm(module)):
            module.forward = forward
            changed.append(module)
    return changed


def _fused_norm(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """`_RmsNorm` with the module's weight, for its forward pass; None where the module computes something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or weight.requires_grad or eps is None:
        return None
    x = torch.linspace(-3, 4, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        expected = module(x)
        for offset in (0.0, 1.0):
            if torch.allclose(norm.plain(x, weight, eps, offset)[0], expected, rtol=0.02, atol=0.02 * expected.abs().max().item()):
                return functools.partial(_norm_forward, weight, eps, offset)
    return None


def _norm_forward(weight: torch.Tensor, eps: float, offset: float, x: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(x, weight, eps, offset)


@_WithKernel
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x · cos + (x₂, x₁) · sin, with x = (x₁, x₂) the halves of the last dimension: x [tokens, heads, size], cos and sin [tokens, size].
    The first half of `sin` is negative."""
    halves = x.float().unflatten(-1, (2, -1))
    cos, sin = (angle.unflatten(-1, (2, -1))[:, None] for angle in (cos, sin))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)


class _Rotary(torch.autograd.Function):
    """The rotation of [1, heads, tokens, size], whose gradient is the rotation back (both halves of cos and of sin are the same)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        sin = torch.cat((-sin[..., : x.shape[-1] // 2], sin[..., x.shape[-1] // 2 :]), dim=-1)
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, size] rotated; in memory token by token, as the projections leave it."""
    return rotate(x.detach()[0].transpose(0, 1).contiguous(), cos[0], sin[0]).transpose(0, 1)[None]


def fuse_rotary(model: torch.nn.Module) -> None:
    """Replace `apply_rotary_pos_emb` in the module that defines the model, for packed batches, where it does what `_Rotary` does, which is tried."""
    names = vars(sys.modules[type(model).__module__])
    original = names.get("apply_rotary_pos_emb")
    if original is None or original in _fused_rotaries:
        return

    @functools.wraps(original)
    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest, **named):
        if q.shape[0] != 1 or cos.shape != (1, q.shape[-2], q.shape[-1]) or rest or named:
            return original(q, k, cos, sin, *rest, **named)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    q, angles = torch.linspace(-2, 3, 24).view(1, 2, 3, 4), torch.linspace(0, 3, 6).view(1, 3, 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        outputs = original(q, q, cos, sin)
    except Exception:  # another signature
        return
    expected = q * cos + torch.cat((-q[..., 2:], q[..., :2]), dim=-1) * sin
    if all(torch.allclose(output, expected, atol=1e-6) for output in outputs):
        _fused_rotaries.add(rotary)
        names["apply_rotary_pos_emb"] = rotary


_fused_rotaries: set[Callable] = set()


def _kernels_taking(adapters: MlpLowRank) -> ModuleType | None:
    """The kernels, where they add what these adapters add."""
    kernels = kernels_for(adapters.h)
    return kernels if kernels is not None and kernels.takes(adapters) else None


class Gate:
    """A gated MLP between its large products: middle = f(gate) · up, and its gradients.

    Args:
        name: by which the kernels know it.
        function, slope: f and its derivative.
    """

    def __init__(self, name: str, function: Callable[[torch.Tensor], torch.Tensor], slope: Callable[[torch.Tensor], torch.Tensor]):
        self.name, self.function, self.slope = name, function, slope

    @staticmethod
    def adds(adapters: MlpLowRank) -> bool:
        """Whether a kernel adds what the adapters add. Where there is none, a large product adds to it and saves a pass over memory."""
        return _kernels_taking(adapters) is not None

    def product(self, gated: torch.Tensor, upped: torch.Tensor, adapters: MlpLowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """(middle [tokens, columns], middle times down's A [tokens, rank]).

        Args:
            gated, upped: [tokens, columns], the input times the frozen weights, and what the adapters add unless the gate `adds` it.
        """
        if kernels := _kernels_taking(adapters):
            return kernels.product(gated, upped, adapters, self.name)
        if kernels := kernels_for(gated):
            middle, _ = kernels.product(gated, upped, None, self.name)
        else:
            middle = (self.function(gated.float()) * upped.float()).to(gated.dtype)
        return middle, middle @ adapters.down_a.T

    def gradients(self, dmiddle: torch.Tensor, gated: torch.Tensor, upped: torch.Tensor, adapters: MlpLowRank, dlow: torch.Tensor) -> Gradients:
        """The gradients of the adapters. Those of gated and upped take the places of these two; `dmiddle` is overwritten.

        Args:
            dmiddle: [tokens, columns], gradient of the middle by way of the frozen weight of down; unless the gate `adds` what the adapters add,
                by way of its A too.
            gated, upped, adapters: as `product` takes them.
            dlow: [tokens, rank], gradient of middle times down's A.
        """
        if kernels := _kernels_taking(adapters):
            gate_b, up_b, down_a = kernels.gradients(dmiddle, gated, upped, adapters, dlow, self.name)
        else:
            if kernels := kernels_for(gated):
                kernels.gradients(dmiddle, gated, upped, None, None, self.name)
            else:
                self._plain_gradients(dmiddle, gated, upped)
            of_gate, of_up = adapters.halves
            gate_b, up_b, down_a = ((gradient.T @ low).float() for gradient, low in ((gated, of_gate), (upped, of_up), (dmiddle, dlow)))
        return Gradients(torch.cat([gated @ adapters.gate_b, upped @ adapters.up_b], dim=1), gate_b, up_b, down_a.T)

    def _plain_gradients(self, dmiddle: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
        """The middle, the gradient of gate and that of up take the places of dmiddle, gate and up."""
        wide, wide_up, raised = dmiddle.float(), up.float(), self.function(gate.float())
        dgate, dup = wide * wide_up * self.slope(gate.float()), wide * raised
        dmiddle.copy_(raised * wide_up)
        gate.copy_(dgate)
        up.copy_(dup)


def _silu_slope(x: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


def _gelu_tanh_slope(x: torch.Tensor) -> torch.Tensor:
    inner = torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))  # √(2/π)
    return 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


_GATES = (Gate("silu", F.silu, _silu_slope), Gate("gelu_tanh", functools.partial(F.gelu, approximate="tanh"), _gelu_tanh_slope))


def gate_of(function: Callable | None) -> Gate | None:
    """The gate of an MLP's activation function, found by trying it; None for another one."""
    if function is None:
        return None
    x = torch.linspace(-6, 6, 101)
    return next((gate for gate in _GATES if torch.allclose(function(x), gate.function(x), atol=1e-6)), None)


@_WithKernel
def loss(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token and the gradient of their sum.

    Args:
        logits: [tokens, vocabulary]; targets: int64 [tokens], of which `UNCOUNTED` has no loss and no gradient.
        softcap: of the final logits, as Gemma 2 has it: they are first squashed into (-softcap, softcap) by tanh; 0: they are not.

    Returns:
        (negative log-probabilities, float32 [tokens] in nats; [tokens, vocabulary] in the logits' dtype, which may have taken their place)
    """
    counted, wide, slope = (targets != UNCOUNTED)[:, None], logits.float(), None
    targets = targets.clamp(min=0)[:, None]
    if softcap:
        squashed = torch.tanh(wide / softcap)
        wide, slope = squashed * softcap, 1 - squashed * squashed
    highest = wide.amax(-1, keepdim=True)
    powers = torch.exp(wide - highest)
    total = powers.sum(-1, keepdim=True)
    nll = torch.log(total) + highest - wide.gather(-1, targets)
    gradient = powers / total - (torch.arange(logits.shape[-1], device=logits.device) == targets).float()
    gradient = gradient * counted if slope is None else gradient * slope * counted
    return (nll * counted)[:, 0], gradient.to(logits.dtype)
