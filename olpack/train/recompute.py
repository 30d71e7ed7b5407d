"""Gradient checkpointing: a layer's activations are computed again in the backward pass, from its input, which waits in the host's memory.

The copies to the host and back run beside the computation: a layer of an 8B model takes longer than its input does over PCIe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recompute:
    """What transformers calls in place of torch's `checkpoint`: `recompute(run, hidden, *rest)`.

    Args:
        device: of the model.
        offload: keep the inputs in pinned host memory (of a GPU's model).
    """

    def __init__(self, device: torch.device, *, offload: bool):
        self.offload = offload and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.offload else None
        self.waiting: list[_Kept] = []

    def __call__(self, run: Callable, hidden: torch.Tensor, *rest):
        return _Layer.apply(self, run, hidden, *rest)

    def put(self, hidden: torch.Tensor) -> _Kept:
        kept = _Kept(self, hidden)
        self.waiting.append(kept)
        return kept

    def take(self, kept: _Kept) -> torch.Tensor:
        """The input of a layer, on the GPU again; that of the layer before it begins to come back too."""
        while self.waiting.pop() is not kept:  # of a forward pass that had no backward pass
            pass
        hidden = kept.get()
        if self.waiting:
            self.waiting[-1].fetch()
        return hidden


class _Kept:
    """One layer's input."""

    def __init__(self, place: Recompute, hidden: torch.Tensor):
        self.place, self.device_copy = place, hidden
        if not place.offload:
            return
        self.host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            self.host.copy_(hidden, non_blocking=True)
        hidden.record_stream(place.stream)
        self.device_copy = None

    def fetch(self) -> None:
        if self.device_copy is None:
            with torch.cuda.stream(self.place.stream):
                self.device_copy = self.host.to(self.place.stream.device, non_blocking=True)

    def get(self) -> torch.Tensor:
        self.fetch()
        if self.place.offload:
            torch.cuda.current_stream().wait_stream(self.place.stream)
            self.device_copy.record_stream(torch.cuda.current_stream())
        return self.device_copy


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, place, run, hidden, *rest):
        ctx.place, ctx.run, ctx.rest = place, run, rest
        ctx.kept = place.put(hidden) if ctx.needs_input_grad[2] else None
        with torch.no_grad():
            return run(hidden, *rest)

    @staticmethod
    def backward(ctx, *gradients):
        hidden = ctx.place.take(ctx.kept).detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.run(hidden, *ctx.rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learned = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None and output.requires_grad]
        torch.autograd.backward(*zip(*learned, strict=True))
        return None, None, hidden.grad, *[None] * len(ctx.rest)
