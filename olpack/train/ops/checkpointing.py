"""Gradient checkpointing: a layer's activations are computed again in the backward pass, from its input, which waits in the host's memory.

What takes more work than room can wait there too, so that it is not computed again (`once`): attention's result and the product after it. The
copies to the host and back run beside the computation: a layer of an 8B model takes longer than they do over PCIe. Which memory may be used
again is settled by events between the two streams. (`record_stream` would leave that to the allocator, which then sees nothing free while the
host runs ahead of the GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from olpack.train.ops.pinned import HostMemory

output_unneeded: ContextVar[bool] = ContextVar("output_unneeded", default=False)
"""Whether a layer is computed for its backward pass only, so that the product which it ends with need not be made."""


_note: ContextVar[Callable | None] = ContextVar("note", default=None)

Tensors = tuple[torch.Tensor, ...]


def once(compute: Callable[[], Tensors], *, small: bool = False) -> Tensors:
    """What `compute` gives, without history; in a layer that is computed again, what it gave the first time, where that is kept. What is `small`
    always is, on the GPU."""
    note = _note.get()
    return compute() if note is None else note(compute, small)


class Recompute:
    """What transformers calls in place of torch's `checkpoint`: `recompute(run, hidden, *rest)`.

    Args:
        device: of the model.
        keep: keep what `once` computes, too.
        random: the layers draw random numbers (dropout), which must be the same ones again.

    Attributes:
        host: where the inputs wait, and what is kept; None: on the GPU.
        skips: whether `output_unneeded` is set when a layer is computed again. Only for layers whose gradients are the same then.
    """

    def __init__(self, device: torch.device, *, keep: bool = False, random: bool = False):
        self._devices = [device] if device.type == "cuda" else []
        self._random = random
        self._keep = keep
        self._waiting: list[_Kept] = []
        self.host: HostMemory | None = None
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
        self._drop(len(self._waiting))

    def _drop(self, count: int) -> None:
        """The last of those that wait; a copy on its way must not find its memory used for something else."""
        if count and self.host is not None:
            torch.cuda.current_stream().wait_stream(self.host.stream)
        for _ in range(count):
            self._waiting.pop().give_back()

    def put(self, hidden: torch.Tensor) -> _Kept:
        """What a layer that begins keeps. What the one before it keeps goes to the host meanwhile, and that of the one before leaves the GPU."""
        for kept in self._waiting[-2:-1]:
            kept.release()
        for kept in self._waiting[-1:]:
            kept.leave()
        self._waiting.append(_Kept(hidden, self.host, self._keep))
        return self._waiting[-1]

    def take(self, wanted: _Kept) -> torch.Tensor:
        """The input of a layer, on the GPU again; what the layer before it keeps begins to come back too."""
        self._drop(len(self._waiting) - 1 - self._waiting.index(wanted))  # of a forward pass that had no backward pass
        self._waiting.pop()
        wanted.arrive()
        wanted.give_back()
        if self._waiting:
            self._waiting[-1].fetch()
        return wanted.input()


@contextmanager
def noting(note: Callable[[Callable[[], Tensors], bool], Tensors] | None) -> Iterator[None]:
    """With what `once` does meanwhile."""
    before = _note.set(note)
    try:
        yield
    finally:
        _note.reset(before)


class _Kept:
    """What waits for a layer's backward pass: its input, and what is computed once; all of that with `keep`, otherwise what is small. What is
    not small may go to the host and come back."""

    def __init__(self, hidden: torch.Tensor, host: HostMemory | None, keep: bool):
        self._host, self._keep = host, keep
        self._here: list[torch.Tensor | None] = [hidden]
        self._there: list[torch.Tensor] = []
        self._given: int | None = None  # of the host's memory, before this went there
        self._copied: torch.cuda.Event | None = None
        self._found: list[Tensors | range] = []  # what is small, or places of the other

    def note(self, compute: Callable[[], Tensors], small: bool) -> Tensors:
        """Compute, and keep that."""
        found = compute()
        if small:
            self._found.append(found)
        elif self._keep:
            self._found.append(range(len(self._here), len(self._here) + len(found)))
            self._here += found
        return found

    def recall(self, compute: Callable[[], Tensors], small: bool) -> Tensors:
        """What was kept, in the same order."""
        if not small and not self._keep:
            return compute()
        found = self._found.pop(0)
        return found if small else tuple(map(self._take, found))

    def input(self) -> torch.Tensor:
        return self._take(0)

    def _take(self, place: int) -> torch.Tensor:
        tensor, self._here[place] = self._here[place], None
        return tensor

    def leave(self) -> None:
        """Begin to copy to the host."""
        if self._host is not None:
            self._given = self._host.given
            self._there = [self._host.take(tensor) for tensor in self._here]
            self._copied = self._copy(self._there, self._here)

    def release(self) -> None:
        """Give the memory on the GPU free; the computation waits until the copy in the host's is whole."""
        if self._host is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._here = []

    def fetch(self) -> None:
        """Begin to copy back."""
        if not self._here:
            self._here = [torch.empty(tensor.shape, dtype=tensor.dtype, device=self._host.stream.device) for tensor in self._there]
            self._copied = self._copy(self._here, self._there)

    def arrive(self) -> None:
        """Be back, for what the computation does next."""
        self.fetch()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def give_back(self) -> None:
        """The place in the host's memory, of whichever went there last."""
        if self._given is not None:
            self._host.give_back(self._given)

    def _copy(self, to: list[torch.Tensor], of: list[torch.Tensor]) -> torch.cuda.Event:
        """Once the computation has come here, beside what it does next."""
        stream = self._host.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for target, source in zip(to, of, strict=True):
                target.copy_(source, non_blocking=True)
        return stream.record_event()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, place, run, hidden, *rest):
        ctx.place, ctx.run, ctx.rest = place, run, rest
        ctx.kept = place.put(hidden.detach()) if ctx.needs_input_grad[2] else None
        ctx.random = place.random_state()
        ctx.mixed = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        with torch.no_grad(), noting(ctx.kept.note if ctx.kept else None):
            return run(hidden, *rest)

    @staticmethod
    def backward(ctx, *gradients):
        kept = ctx.kept
        hidden = ctx.place.take(kept).requires_grad_()
        ctx.kept = None  # the loss holds on to this object until all layers are done, and it would hold the input and its gradient
        rest = [_alone(value) for value in ctx.rest]
        mixed, dtype = ctx.mixed
        precision = torch.autocast(hidden.device.type, dtype, enabled=mixed)
        with torch.enable_grad(), ctx.place.drawing_from(ctx.random), ctx.place.skipping(), noting(kept.recall), precision:
            outputs = ctx.run(hidden, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        learned = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None and output.requires_grad]
        torch.autograd.backward(*zip(*learned, strict=True))
        return None, None, hidden.grad, *(value.grad if isinstance(value, torch.Tensor) else None for value in rest)


def _alone(value):
    """A tensor that needs gradients without its history, so that the gradient stops there."""
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.requires_grad else value
