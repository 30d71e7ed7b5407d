"""Products of activations and frozen weights in fp8 (e4m3): one scale for each row of the activations and for each row of the weight.

    y = (x_codes · w_codesᵀ) · x_scale · w_scale,   codes = x / scale in e4m3,   scale = max |row| / 448

A weight is frozen, so its scales are computed once. Its codes are made for each product from the packed weight, like the dense weight otherwise, and
are half as large. The gradient of the input multiplies the turned weight, whose rows are the columns of the weight, with scales of their own:
for layers with one input that is one product, of all gradients side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch

from olpack.train.ops.pointwise import kernels_for

LARGEST = 448.0  # number of e4m3
STEP = 16  # of the sizes that a product in fp8 takes
_TURNED_STEP = 64  # of the row strides of turned codes
_TRIED = 16  # tokens with which gradients are compared
_TOLERANCE = 0.2  # of a gradient; rounding to e4m3 alone gives about 0.05
CAPABILITY = (8, 9)  # of a GPU that multiplies in fp8: Ada, Hopper and later


in_16_bits: ContextVar[bool] = ContextVar("in_16_bits", default=False)
"""Whether forward passes compute in 16 bits for now."""


@contextmanager
def computing_in_16_bits() -> Iterator[None]:
    """Forward passes compute in 16 bits meanwhile, because fp8 is no part of the model that is exported."""
    before = in_16_bits.set(True)
    try:
        yield
    finally:
        in_16_bits.reset(before)


class Codes(NamedTuple):
    """A matrix in fp8.

    Attributes:
        codes: float8_e4m3fn [rows, columns].
        scale: float32 [rows, 1], by which the codes are multiplied.
    """

    codes: torch.Tensor
    scale: torch.Tensor


class WriteFp8(Protocol):
    """Writes the codes of a packed weight."""

    def __call__(self, scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool:
        """Returns False, with nothing written, where no kernel does it.

        Args:
            scale: float32, of each row, or of each column if turned.
            codes: float8_e4m3fn [out, in], or [in, out] if turned: then with a row stride that is divisible by 64.
        """


class Weight(NamedTuple):
    """A frozen weight.

    Attributes:
        dense: the weight in a dtype, [out, in].
        write: writes its codes without the dense weight; None for a weight that is not packed.
    """

    dense: Callable[[torch.dtype], torch.Tensor]
    write: WriteFp8 | None


class Fp8Weights:
    """The frozen weights of layers with one input.

    Args:
        weights: [out_i, in] each.
        dtype: that the model computes in.

    Raises:
        RuntimeError: gradients are others than those of the dense weights.
    """

    def __init__(self, weights: Sequence[Weight], dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype
        highest: list[torch.Tensor] = []
        dys, expected = [], []
        self._scales: list[torch.Tensor] = []  # [out_i, 1] each
        self._outs: list[int] = []
        for weight in weights:
            dense = weight.dense(dtype)
            dys.append(_some(dense))
            expected.append(dys[-1] @ dense)
            sizes = dense.abs()
            self._scales.append(_scale(sizes.amax(1, keepdim=True)))
            highest.append(sizes.amax(0))
            self._outs.append(sizes.shape[0])
        self._turned_scale = _scale(torch.stack(highest).amax(0)[:, None])  # [in, 1]
        # The checks of a model's layers compare forward passes only.
        wanted = torch.stack(expected).float().sum(0)
        if not (self.gradient(dys).float() - wanted).norm() <= _TOLERANCE * wanted.norm():
            raise RuntimeError(f"in fp8 gradients differ by more than {_TOLERANCE:.0%} from those of the dense weights")

    def product(self, x: Codes, index: int) -> torch.Tensor:
        """x · W_indexᵀ, [tokens, out]."""
        scale = self._scales[index]
        codes = torch.empty(self._outs[index], x.codes.shape[1], dtype=torch.float8_e4m3fn, device=x.codes.device)
        _write(self._weights[index], scale, codes, self._dtype)
        return multiply(x, Codes(codes, scale), self._dtype)

    def gradient(self, dys: Sequence[torch.Tensor]) -> torch.Tensor:
        """Σ dy_i · W_i, [tokens, in]; dys: [tokens, out_i]."""
        scale = self._turned_scale
        codes = turned_codes(scale.shape[0], sum(self._outs), scale.device)
        for weight, part in zip(self._weights, codes.split(self._outs, dim=1), strict=True):
            _write(weight, scale, part, self._dtype, turned=True)
        return multiply(quantize_rows(*dys), Codes(codes, scale), self._dtype)


def turned_codes(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Room for the codes of a turned weight, float8_e4m3fn [rows, columns]; its row stride is divisible by 64.

    Kernels turn words of 4 codes. Where the stride is no multiple of 16 words, Triton 3.6 compiles them in another way, and an eighth of the codes
    is wrong.
    """
    stride = -(-columns // _TURNED_STEP) * _TURNED_STEP
    return torch.empty(rows, stride, dtype=torch.float8_e4m3fn, device=device)[:, :columns]


def _some(dense: torch.Tensor) -> torch.Tensor:
    """Random gradients of an output, [16, out]: the same each time, and torch's own random numbers stay as they are."""
    generator = torch.Generator(dense.device).manual_seed(0)
    return torch.randn(_TRIED, dense.shape[0], generator=generator, device=dense.device, dtype=dense.dtype)


def fits(*sizes: int) -> bool:
    """Whether a product in fp8 takes weights of these sizes."""
    return all(size % STEP == 0 for size in sizes)


def _scale(highest: torch.Tensor) -> torch.Tensor:
    """Of rows whose largest absolute numbers these are; of zeros, 1."""
    scale = highest.float() / LARGEST
    return torch.where(scale > 0, scale, 1.0)


def quantize_rows(*parts: torch.Tensor) -> Codes:
    """Matrices [tokens, columns_i], side by side, with one scale for each row."""
    if kernels := kernels_for(parts[0]):
        return Codes(*kernels.quantize_rows(parts))
    whole = torch.cat(parts, dim=1).float()
    scale = _scale(whole.abs().amax(1, keepdim=True))
    return Codes(_codes(whole / scale), scale)


def _codes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _write(weight: Weight, scale: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype, *, turned: bool = False) -> None:
    """Write the codes of a weight, or of the turned weight."""
    if weight.write is not None and weight.write(scale, codes, turned=turned):
        return
    dense = weight.dense(dtype)
    codes.copy_(_codes((dense.T if turned else dense) / scale))


def multiply(x: Codes, w: Codes, dtype: torch.dtype) -> torch.Tensor:
    """x · wᵀ, [rows of x, rows of w]."""
    if x.codes.is_cuda:
        return torch._scaled_mm(x.codes, w.codes.T, scale_a=x.scale, scale_b=w.scale.T, out_dtype=dtype, use_fast_accum=True)
    return (x.codes.float() @ w.codes.float().T * x.scale * w.scale.T).to(dtype)
