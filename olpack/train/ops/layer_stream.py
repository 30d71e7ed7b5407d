"""Streamed layers: the frozen weights of a model's layers are in pinned memory, and each layer's are on the GPU while it computes.

A layer's frozen tensors are one piece of pinned memory. The GPU has a few slots of the size of the largest layer; when a layer begins, those of
the next ones are copied beside its computation, one copy a layer. In the backward pass gradient checkpointing computes a layer again and then its
gradients, in reverse order, from the same copy. The last layers of a forward pass are the first of the backward pass, and are still in their slots.

The tensors keep their places in the modules and their packing; only the memory that they point to changes. So the model computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from olpack import progress
from olpack.train.ops.limits import SLOTS
from olpack.train.ops.pinned_memory import ALIGNED, locked


class _Place(NamedTuple):
    """Where a tensor is in the piece of its layer: its first byte, its dtype, its shape."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, piece: torch.Tensor) -> torch.Tensor:
        return piece[self.start : self.start + self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)


class _Slot:
    """Memory of the GPU for the tensors of one layer at a time.

    Attributes:
        piece: uint8, as large as the largest layer.
        position: of the layer that it has once `copied` has come; None: of none.
    """

    def __init__(self, size: int, device: torch.device, copied: torch.cuda.Event):
        self.piece = torch.empty(size, dtype=torch.uint8, device=device)
        self.position: int | None = None
        self.copied = copied
        self._tensors: dict[tuple[_Place, ...], list[torch.Tensor]] = {}

    def tensors(self, places: tuple[_Place, ...]) -> list[torch.Tensor]:
        if places not in self._tensors:  # mostly those of all layers
            self._tensors[places] = [place.of(self.piece) for place in places]
        return self._tensors[places]


class LayerStream:
    """Moves the frozen weights of layers to pinned memory, and has each on the GPU while its layer computes.

    Where they are trained they must be checkpointed: without a forward pass of the same layer just before it, a backward pass would see the
    weights of another.

    Args:
        layers: in the order of the forward pass. Their other tensors (adapters, norms) go to the GPU.
        device: the GPU.

    Attributes:
        nbytes: of pinned memory.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device):
        self._device, self._copies, self._locks = device, torch.cuda.Stream(device), True
        # Of its parts, and begun by them: a hook of the layer itself may run outside of its checkpoint, and so not when it is computed again.
        parts = [[part for part in layer.children() if _weights(part)] for layer in layers]
        self._layers = [[weight for part in each for weight in _weights(part)] for each in parts]
        self._places = [_places(weights) for weights in self._layers]
        sizes = [places[-1].start + weights[-1].nbytes for places, weights in zip(self._places, self._layers, strict=True)]
        self.nbytes = sum(sizes)
        self._pieces = [self._move(weights, places, size) for weights, places, size in zip(self._layers, self._places, sizes, strict=True)]
        if not self._locks:
            progress.warn("The system locks no memory for the streamed layers, so the GPU waits for each copy of one")
        self._slots = [_Slot(max(sizes), device, self._copies.record_event()) for _ in range(min(SLOTS, len(layers)))]
        self._computing: tuple[int, bool] | None = None
        for position, layer in enumerate(layers):
            move(layer, device, but=self._layers[position])
            for part in parts[position]:
                part.register_forward_pre_hook(partial(self._begin, position))

    def _move(self, weights: list[torch.Tensor], places: tuple[_Place, ...], size: int) -> torch.Tensor:
        """Copy the tensors of a layer to pinned memory, one piece, and let them be there. Returns the piece."""
        piece = locked(self, size, self._device)
        if piece is None:
            self._locks, piece = False, torch.empty(size, dtype=torch.uint8)
        for weight, place in zip(weights, places, strict=True):
            weight.data = place.of(piece).copy_(weight.data)
        return piece

    def _begin(self, position: int, *_: object) -> None:
        """A layer computes next: its weights are there, and those of the next layers are on their way."""
        backward = torch.is_grad_enabled()  # which it is only where a layer is computed again
        if (position, backward) == self._computing:
            return
        self._computing, wanted = (position, backward), self._next(position, backward=backward)
        computation = torch.cuda.current_stream(self._device)
        for other in wanted:
            if all(slot.position != other for slot in self._slots):
                slot = next(slot for slot in self._slots if slot.position not in wanted)
                self._copies.wait_stream(computation)  # which is done with the layer that the slot has
                with torch.cuda.stream(self._copies):
                    slot.piece[: self._pieces[other].nbytes].copy_(self._pieces[other], non_blocking=True)
                slot.position, slot.copied = other, self._copies.record_event()
        slot = next(slot for slot in self._slots if slot.position == position)
        computation.wait_event(slot.copied)
        for weight, tensor in zip(self._layers[position], slot.tensors(self._places[position]), strict=True):
            weight.data = tensor

    def _next(self, position: int, *, backward: bool) -> list[int]:
        """This layer and those that follow, as many as there are slots. The backward pass follows on the forward pass, and a forward pass on that."""
        count, last = len(self._slots), len(self._layers) - 1
        if backward:
            return [ahead if ahead >= 0 else -ahead - 1 for ahead in range(position, position - count, -1)]
        return [ahead if ahead <= last else 2 * last + 1 - ahead for ahead in range(position, position + count)]


def move(module: torch.nn.Module, device: torch.device, but: Iterable[torch.Tensor]) -> None:
    """Move the tensors of a module to a device, in place, but for these."""
    staying = set(map(id, but))
    for tensor in tensors_of(module):
        if id(tensor) not in staying and tensor.device != device:
            tensor.data = tensor.data.to(device)


def _weights(part: torch.nn.Module) -> list[torch.Tensor]:
    """The frozen tensors of a part of a layer that are streamed: matrices and packed numbers. Norms, biases, and scales of scales are small."""
    frozen = {id(tensor): tensor for tensor in tensors_of(part) if not tensor.requires_grad and tensor.numel()}
    return [tensor for tensor in frozen.values() if tensor.dim() > 1 or not tensor.is_floating_point()]


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All tensors of a module, with those of bitsandbytes' states of its weights."""
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                yield tensor
                state = getattr(tensor, "quant_state", None)
                while state is not None:
                    yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
                    state = state.state2


def _places(weights: list[torch.Tensor]) -> tuple[_Place, ...]:
    places, start = [], 0
    for weight in weights:
        places.append(_Place(start, weight.dtype, weight.shape))
        start += -(-weight.nbytes // ALIGNED) * ALIGNED
    return tuple(places)
