"""Gradient checkpointing: a layer's activations are computed again in the backward pass, from its input, which waits in the host's memory.

The copies to the host and back run beside the computation: a layer of an 8B model takes longer than its input does over PCIe. Which memory
may be used again is settled by events between the two streams. (`record_stream` would leave that to the allocator, which then sees nothing
free while the host runs ahead of the GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

output_unneeded: ContextVar[bool] = ContextVar("output_unneeded", default=False)
"""Whether a layer is computed for its backward pass only, so that the product which it ends with need not be made."""


class Recompute:
    """What transformers calls in place of torch's `checkpoint`: `recompute(run, hidden, *rest)`.

    Args:
        device: of the model.
        offload: keep the inputs in pinned host memory (of a GPU's model).
        random: the layers draw random numbers (dropout), which must be the same ones again.

    Attributes:
        skips: whether `output_unneeded` is set when a layer is computed again. Only for layers whose gradients are the same then.
    """

    def __init__(self, device: torch.device, *, offload: bool, random: bool = False):
        self._devices = [device] if device.type == "cuda" else []
        self._random = random
        self._stream = torch.cuda.Stream(device) if offload and device.type == "cuda" else None
        self._waiting: list[_Input] = []
        self.skips = False

    def __call__(self, run: Callable, hidden: torch.Tensor, *rest):
        return _Layer.apply(self, run, hidden, *rest)

    def random_state(self) -> list[torch.Tensor] | None:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)] if self._random else None

    @contextmanager
    def drawing_from(self, states: list[torch.Tensor] | None) -> Iterator[None]:
        """The random numbers of then, and afterwards those of now."""
        with torch.random.fork_rng(self._devices, enabled=states is not None):
            if states is not None:
                torch.set_rng_state(states[0])
                for device, state in zip(self._devices, states[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """`output_unneeded`, where that is right."""
        before = output_unneeded.set(self.skips)
        try:
            yield
        finally:
            output_unneeded.reset(before)

    def forget(self) -> None:
        """Of a pass that came to no end."""
        self._waiting.clear()

    def put(self, hidden: torch.Tensor) -> _Input:
        if self._waiting:
            self._waiting[-1].release()
        self._waiting.append(_Input(hidden, self._stream))
        return self._waiting[-1]

    def take(self, wanted: _Input) -> torch.Tensor:
        """The input of a layer, on the GPU again; that of the layer before it begins to come back too."""
        while self._waiting.pop() is not wanted:  # of a forward pass that had no backward pass
            pass
        hidden = wanted.get()
        if self._waiting:
            self._waiting[-1].fetch()
        return hidden


class _Input:
    """One layer's input: on the GPU, on its way, or in host memory."""

    def __init__(self, hidden: torch.Tensor, stream: torch.cuda.Stream | None):
        self._here: torch.Tensor | None = hidden
        self._stream = stream
        if stream is not None:
            self._host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            self._copied = self._beside(self._host, hidden)

    def _beside(self, to: torch.Tensor, of: torch.Tensor) -> torch.cuda.Event:
        """Copy once the computation has come here, beside what it does next."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            to.copy_(of, non_blocking=True)
        return self._stream.record_event()

    def release(self) -> None:
        """Give the memory on the GPU free; the computation waits until the copy in the host's is whole."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._here = None

    def fetch(self) -> None:
        if self._here is None:
            self._here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._stream.device)
            self._copied = self._beside(self._here, self._host)

    def get(self) -> torch.Tensor:
        self.fetch()
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        return self._here


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, place, run, hidden, *rest):
        ctx.place, ctx.run, ctx.rest = place, run, rest
        ctx.input = place.put(hidden.detach()) if ctx.needs_input_grad[2] else None
        ctx.random = place.random_state()
        ctx.mixed = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        with torch.no_grad():
            return run(hidden, *rest)

    @staticmethod
    def backward(ctx, *gradients):
        hidden = ctx.place.take(ctx.input).requires_grad_()
        ctx.input = None  # the loss holds on to this object until all layers are done, and it would hold the input and its gradient
        rest = [_alone(value) for value in ctx.rest]
        mixed, dtype = ctx.mixed
        precision = torch.autocast(hidden.device.type, dtype, enabled=mixed)
        with torch.enable_grad(), ctx.place.drawing_from(ctx.random), ctx.place.skipping(), precision:
            outputs = ctx.run(hidden, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learned = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None and output.requires_grad]
        torch.autograd.backward(*zip(*learned, strict=True))
        return None, None, hidden.grad, *(value.grad if isinstance(value, torch.Tensor) else None for value in rest)


def _alone(value):
    """A tensor that needs gradients without its history, so that the gradient stops there."""
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.requires_grad else value
