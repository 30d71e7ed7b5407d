"""What a layer does beside its matrix products, each as one pass over memory: norms, rotary embeddings, gates, the loss of the logits.

The functions are plain torch. On a GPU `torch.compile` makes one kernel of each; where it cannot (`use_kernels` says so once), they run
as they stand. Their gradients are written out, because a frozen norm needs none for its weight and a gate can give three results at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from olpack import progress

_compiled: dict[Callable, Callable] = {}


def _kernel(function: Callable) -> Callable:
    """The function, or its compiled form once `use_kernels` has made one.

    That is compiled for any number of rows, the first dimension of every argument that has two or more, and for the other dimensions as they
    are: a kernel that has to divide by sizes it does not know takes several times as long.
    """

    @functools.wraps(function)
    def call(*arguments):
        if function not in _compiled:
            return function(*arguments)
        for value in arguments:
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        with torch.autocast("cuda", enabled=False):  # which would be another form, and there may be eight of a function
            return _compiled[function](*arguments)

    call.plain = function
    return call


def use_kernels(device: torch.device) -> None:
    """Compile the functions of this module for a GPU, if that works there."""
    if device.type != "cuda" or _compiled:
        return
    kernels = [_norm, _norm_backward, _rotate, _loss, *(kernel for gate in _GATES for kernel in (gate.product, gate.gradients))]
    compiled = {kernel.plain: torch.compile(kernel.plain, dynamic=False) for kernel in kernels}
    try:
        x = torch.randn(4, 8, device=device)
        compiled[_norm.plain](x, x[0], 1e-6, 0.0)
    except Exception as error:  # no Triton, no C compiler, a torch that cannot: whatever it is, the plain functions do
        progress.warn(f"torch.compile does not work here, so training goes without fused kernels: {str(error).splitlines()[0]}")
        return
    _compiled.update(compiled)


@_kernel
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / rms(x) · (offset + weight), 1 / rms(x)) over the last dimension, computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (offset + weight.float())).to(x.dtype), scale


@_kernel
def _norm_backward(dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    """dx = scale · (g - x̂ · mean(g · x̂)) with g = dy · (offset + weight) and x̂ = x · scale."""
    scaled = x.float() * scale
    gradient = dy.float() * (offset + weight.float())
    return ((gradient - scaled * (gradient * scaled).mean(-1, keepdim=True)) * scale).to(dy.dtype)


class _RmsNorm(torch.autograd.Function):
    """RMS norm with a frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        rows = _rows(x)
        y, scale = _norm(rows, weight, eps, offset)
        ctx.save_for_backward(rows, scale, weight)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, scale, weight = ctx.saved_tensors
        return _norm_backward(_rows(dy), rows, scale, weight, ctx.offset).view(dy.shape), None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, size], without its history: a function is compiled once, not once for every number of dimensions and need of gradients."""
    return x.detach().reshape(-1, x.shape[-1])


def fuse_norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Replace the forward pass of every RMS norm that computes what `_norm` does, which is tried. Returns these norms."""
    changed = []
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (found := _norm_settings(module)):
            module.forward = functools.partial(_norm_forward, module.weight, *found)
            changed.append(module)
    return changed


def _norm_forward(weight: torch.Tensor, eps: float, offset: float, x: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(x, weight, eps, offset)


def _norm_settings(module: torch.nn.Module) -> tuple[float, float] | None:
    """(eps, offset) with which `_norm` gives what the module does; None where it does something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or weight.requires_grad or eps is None:
        return None
    x = torch.linspace(-3, 4, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        wanted = module(x)
        for offset in (0.0, 1.0):
            if torch.allclose(_norm.plain(x, weight, eps, offset)[0], wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item()):
                return eps, offset
    return None


@_kernel
def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
    """As the projections leave it in memory: token by token."""
    return _rotate(x.detach()[0].transpose(0, 1).contiguous(), cos[0], sin[0]).transpose(0, 1)[None]


def fuse_rotary(model: torch.nn.Module) -> None:
    """Replace `apply_rotary_pos_emb` in the module that defines the model, for flat rows, where it does what `_Rotary` does, which is tried."""
    home = sys.modules[type(model).__module__]
    original = getattr(home, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "fused"):
        return

    @functools.wraps(original)
    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest, **named):
        if q.shape[0] != 1 or cos.shape != (1, q.shape[-2], q.shape[-1]) or rest or named:
            return original(q, k, cos, sin, *rest, **named)
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    q, angles = torch.linspace(-2, 3, 24).view(1, 2, 3, 4), torch.linspace(0, 3, 6).view(1, 3, 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = original(q, q, cos, sin)
    except Exception:  # another signature
        return
    wanted = q * cos + torch.cat((-q[..., 2:], q[..., :2]), dim=-1) * sin
    if all(torch.allclose(each, wanted, atol=1e-6) for each in found):
        rotary.fused = True
        home.apply_rotary_pos_emb = rotary


class _Gate:
    """A gate of an MLP: f(gate) · up, and its gradients."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], slope: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

        @_kernel
        def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return (function(gate.float()) * up.float()).to(gate.dtype)

        @_kernel
        def gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
            slope_of, wide_up, raised = dy.float(), up.float(), function(gate.float())
            dgate, dup = slope_of * wide_up * slope(gate.float()), slope_of * raised
            dy.copy_(raised * wide_up)
            gate.copy_(dgate)
            up.copy_(dup)

        self.product = product
        """(gate, up) -> f(gate) · up"""
        self.gradients = gradients
        """(dy, gate, up), of which f(gate) · up, the gradient of gate and that of up take the places"""


def _silu_slope(x: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


def _gelu_tanh_slope(x: torch.Tensor) -> torch.Tensor:
    inner = torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))  # √(2/π)
    return 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


_SILU = _Gate(F.silu, _silu_slope)
_GELU_TANH = _Gate(functools.partial(F.gelu, approximate="tanh"), _gelu_tanh_slope)
_GATES = (_SILU, _GELU_TANH)


def gate_of(function: Callable | None) -> _Gate | None:
    """The gate of an MLP's activation function, found by trying it; None for another one."""
    if function is None:
        return None
    x = torch.linspace(-6, 6, 101)
    return next((gate for gate in _GATES if torch.allclose(function(x), gate.function(x), atol=1e-6)), None)


@_kernel
def _loss(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(negative log-probabilities of the targets [tokens, 1] in float32, gradient of their sum for the logits). With a softcap other than 0
    the logits are first squashed into (-softcap, softcap) by tanh."""
    wide = logits.float()
    slope = None
    if softcap:
        squashed = torch.tanh(wide / softcap)
        wide, slope = squashed * softcap, 1 - squashed * squashed
    highest = wide.amax(-1, keepdim=True)
    powers = torch.exp(wide - highest)
    total = powers.sum(-1, keepdim=True)
    nll = torch.log(total) + highest - wide.gather(-1, targets)
    gradient = powers / total - (torch.arange(logits.shape[-1], device=logits.device) == targets).float()
    return nll[:, 0], (gradient if slope is None else gradient * slope).to(logits.dtype)


def loss_of(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token and the gradient of their sum.

    Args:
        logits: [tokens, vocabulary]; targets: int64 [tokens].
        softcap: of the final logits, as Gemma 2 has it, or None.

    Returns:
        (float32 [tokens] in nats, [tokens, vocabulary] in the logits' dtype)
    """
    return _loss(logits, targets[:, None], softcap or 0.0)
