"""Gradient checkpointing with activation offloading: a layer's activations are computed again in the backward pass, from its input, which is in
pinned memory meanwhile.

Outputs that take much work and little memory can be saved too, so that they are not computed again (`once`): the attention output and the
product after it. The copies to pinned memory and back run beside the computation: a layer of an 8B model takes longer than they do over PCIe.
Events between the two streams order the reuse of memory. (`record_stream` would leave that to the allocator, which then sees nothing free while
the host runs ahead of the GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from olpack.train.ops.pinned_memory import PinnedMemory

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[[], Tensors]
Intercept = Callable[[Compute, bool], Tensors]
"""Takes the place of a call of `once`: (compute, small) to the tensors."""

output_unneeded: ContextVar[bool] = ContextVar("output_unneeded", default=False)
"""Whether a layer is computed for its backward pass only, so that its last product can be left out."""

_intercept: ContextVar[Intercept | None] = ContextVar("intercept", default=None)


def once(compute: Compute, *, small: bool = False) -> Tensors:
    """The tensors of `compute`, without history. A checkpointed layer saves them in the forward pass and does not compute them again.

    Args:
        small: save them always, on the GPU; others are saved only with `Recompute(offload_attention=True)`.
    """
    intercept = _intercept.get()
    return compute() if intercept is None else intercept(compute, small)


class Recompute:
    """Takes the place of torch's `checkpoint` in transformers: `recompute(run, hidden, *rest)`.

    Args:
        device: of the model.
        offload_attention: save the tensors of `once`, too.
        random: the layers draw random numbers (dropout), and must draw the same ones again.

    Attributes:
        pinned: memory for the layers' inputs and the saved tensors; None: they stay on the GPU.
        skips: whether `output_unneeded` is set when a layer is computed again. Only for layers whose gradients are the same then.
    """

    def __init__(self, device: torch.device, *, offload_attention: bool = False, random: bool = False):
        self._devices = [device] if device.type == "cuda" else []
        self._random = random
        self._offload_attention = offload_attention
        self._saved: list[_SavedLayer] = []  # of the layers whose backward pass is still to come, in the order of the forward pass
        self.pinned: PinnedMemory | None = None
        self.skips = False

    def __call__(self, run: Callable, hidden: torch.Tensor, *rest):
        return _Layer.apply(self, run, hidden, *rest)

    def random_state(self) -> list[torch.Tensor] | None:
        """States of the generators of CPU and GPU; None where the layers draw no random numbers."""
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)] if self._random else None

    @contextmanager
    def drawing_from(self, states: list[torch.Tensor] | None) -> Iterator[None]:
        """Random numbers come from these states; afterwards the generators are where they were."""
        with torch.random.fork_rng(self._devices, enabled=states is not None):
            if states is not None:
                torch.set_rng_state(states[0])
                for device, state in zip(self._devices, states[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            yield

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Set `output_unneeded`, where `skips` allows it."""
        before = output_unneeded.set(self.skips)
        try:
            yield
        finally:
            output_unneeded.reset(before)

    def forget(self) -> None:
        """Free what a pass saved that ended without its backward pass."""
        self._drop(len(self._saved))

    def _drop(self, count: int) -> None:
        """Free the last saved layers. Copies in flight end first, so that nothing else gets their memory before."""
        if count and self.pinned is not None:
            torch.cuda.current_stream().wait_stream(self.pinned.stream)
        for _ in range(count):
            self._saved.pop().release_pinned()

    def save(self, hidden: torch.Tensor) -> _SavedLayer:
        """Save the input of a layer that begins. The tensors of the layer before go to pinned memory meanwhile, and the GPU's copies of those of
        the layer before that are freed."""
        for layer in self._saved[-2:-1]:
            layer.release_gpu()
        for layer in self._saved[-1:]:
            layer.offload()
        self._saved.append(_SavedLayer(hidden, self.pinned, self._offload_attention))
        return self._saved[-1]

    def restore(self, layer: _SavedLayer) -> torch.Tensor:
        """The input of a layer, on the GPU again; the copies of the layer before it begin."""
        self._drop(len(self._saved) - 1 - self._saved.index(layer))  # of a forward pass that had no backward pass
        self._saved.pop()
        layer.arrive()
        layer.release_pinned()
        if self._saved:
            self._saved[-1].fetch()
        return layer.input()


@contextmanager
def intercepting(intercept: Intercept | None) -> Iterator[None]:
    """Calls of `once` go to this function meanwhile."""
    before = _intercept.set(intercept)
    try:
        yield
    finally:
        _intercept.reset(before)


class _SavedLayer:
    """What the backward pass of a layer needs: its input, the small tensors of `once`, and with `offload_attention` its other tensors. All but
    the small ones may be offloaded."""

    def __init__(self, hidden: torch.Tensor, pinned: PinnedMemory | None, offload_attention: bool):
        self._pinned, self._offload_attention = pinned, offload_attention
        self._on_gpu: dict[int, torch.Tensor] = {0: hidden}  # by place
        self._offloaded: list[torch.Tensor] = []  # by place
        self._used_before: int | None = None  # bytes of the pinned memory in use before these went there
        self._copied: torch.cuda.Event | None = None
        self._calls: list[Tensors | range] = []  # of `once`: the small tensors, or the places of others

    def record(self, compute: Compute, small: bool) -> Tensors:
        """`once` in the forward pass: compute and save."""
        tensors = compute()
        if small:
            self._calls.append(tensors)
        elif self._offload_attention:
            places = range(len(self._on_gpu), len(self._on_gpu) + len(tensors))
            self._calls.append(places)
            self._on_gpu.update(zip(places, tensors, strict=True))
        return tensors

    def recall(self, compute: Compute, small: bool) -> Tensors:
        """`once` when the layer is computed again: the saved tensors, in the same order."""
        if not small and not self._offload_attention:
            return compute()
        saved = self._calls.pop(0)
        return tuple(map(self._on_gpu.pop, saved)) if isinstance(saved, range) else saved

    def input(self) -> torch.Tensor:
        return self._on_gpu.pop(0)

    def offload(self) -> None:
        """Begin to copy to pinned memory."""
        if self._pinned is not None:
            self._used_before = self._pinned.used
            tensors = list(self._on_gpu.values())
            self._offloaded = [self._pinned.allocate(tensor) for tensor in tensors]
            self._copied = _copy(self._pinned.stream, self._offloaded, tensors)

    def release_gpu(self) -> None:
        """Free the GPU's copies; the computation waits until those in pinned memory are whole."""
        if self._pinned is not None:
            self._wait()
            self._on_gpu = {}

    def fetch(self) -> None:
        """Begin to copy back."""
        if self._pinned is not None and not self._on_gpu:
            stream = self._pinned.stream
            tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, device=stream.device) for tensor in self._offloaded]
            self._on_gpu = dict(enumerate(tensors))
            self._copied = _copy(stream, tensors, self._offloaded)

    def arrive(self) -> None:
        """Let the computation wait until everything is on the GPU."""
        self.fetch()
        self._wait()

    def release_pinned(self) -> None:
        """Free the place in pinned memory, of whichever layer was offloaded last."""
        if self._pinned is not None and self._used_before is not None:
            self._pinned.release(self._used_before)

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def _copy(stream: torch.cuda.Stream, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> torch.cuda.Event:
    """Copy once the computation has come here, beside what it does next. Returns the event of the last copy's end."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
    return stream.record_event()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recompute, run, hidden, *rest):
        ctx.recompute, ctx.run, ctx.rest = recompute, run, rest
        ctx.saved = recompute.save(hidden.detach()) if ctx.needs_input_grad[2] else None
        ctx.random = recompute.random_state()
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        with torch.no_grad(), intercepting(ctx.saved.record if ctx.saved else None):
            return run(hidden, *rest)

    @staticmethod
    def backward(ctx, *gradients):
        recompute, saved = ctx.recompute, ctx.saved
        hidden = recompute.restore(saved).requires_grad_()
        ctx.saved = None  # the loss refers to this object until all layers are done, and would keep the input and its gradient alive
        rest = [_without_history(value) for value in ctx.rest]
        enabled, dtype = ctx.autocast
        autocast = torch.autocast(hidden.device.type, dtype, enabled=enabled)
        with torch.enable_grad(), recompute.drawing_from(ctx.random), recompute.skipping(), intercepting(saved.recall), autocast:
            outputs = ctx.run(hidden, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None and output.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, hidden.grad, *(value.grad if isinstance(value, torch.Tensor) else None for value in rest)


def _without_history(value):
    """A tensor that needs gradients as a leaf of its own, so that the gradient stops there; any other value as it is."""
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.requires_grad else value
