"""Forward and backward passes over small micro-batches as CUDA graphs.

The host launches thousands of kernels for a pass, which takes it longer than the GPU computes where tokens are few. A graph launches them all at
once, so that such a step does not wait for the host. A graph is of one form (`olpack.train.batches.Form`), to which batches are padded.

All small micro-batches are padded, those that no graph computes, too: the first of a form (which compiles kernels), those of forms beyond the first
`_MOST`, and all where no graph can be made. A matrix product rounds otherwise for another number of rows. So kernels and sizes, and with them the
losses, follow from the rows alone, and a run that resumes elsewhere in the schedule computes what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from olpack import progress
from olpack.data import TokenRow
from olpack.errors import first_line
from olpack.train.batches import Form, PackedBatch, pack, pad

_MOST = 32  # graphs of a run; each takes some megabytes
_WORK = 1 << 40  # tokens times weights of a layer, from which on a GPU computes a layer for longer than the host launches it


class PassGraphs:
    """The passes of a model over micro-batches.

    Args:
        loss: the loss of a batch, with a history. Gradients of the parameters have their place in memory for good.
        layer_weights: of a layer, on average.
    """

    def __init__(self, loss: Callable[[PackedBatch], torch.Tensor], device: torch.device, layer_weights: int):
        self._loss, self._device, self._layer_weights = loss, device, layer_weights
        self._seen: dict[Form, _Graph | None] = {}
        self._pool: Any = None  # memory that all graphs have together, because only one runs at a time
        self._works = True

    def backward(self, rows: list[TokenRow]) -> torch.Tensor | None:
        """Add the gradients of the summed loss of a micro-batch; returns that loss. None, and nothing is done, where a graph gains nothing."""
        form = Form.of(rows)
        if form.tokens * self._layer_weights > _WORK:
            return None
        batch = pad(pack(rows, self._device), form)
        if (graph := self._graph(batch, form)) is not None:
            return graph.run(batch)
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def free(self) -> bool:
        """Free the graphs' memory, for good. Returns whether there were graphs."""
        found = any(self._seen.values())
        self._seen, self._pool, self._works = {}, None, False
        return found

    def _graph(self, batch: PackedBatch, form: Form) -> _Graph | None:
        """The graph of a form, which is recorded when the form comes for the second time; None before, and where there is none."""
        if form in self._seen:
            return self._seen[form] or (self._record(batch, form) if self._works else None)
        if len(self._seen) < _MOST:
            self._seen[form] = None
        return None

    def _record(self, batch: PackedBatch, form: Form) -> _Graph | None:
        """None where memory is short or the model does something that no graph can."""
        before = torch.cuda.memory_reserved(self._device)
        torch.cuda.empty_cache()
        passing = before - torch.cuda.memory_reserved(self._device)  # bytes that a pass needs beside the model
        if torch.cuda.mem_get_info(self._device)[0] < 2 * passing:
            self._works = False
            return None
        try:
            graph = self._seen[form] = _Graph(self._loss, batch, self._pool)
        except Exception as error:  # a library that waits for the GPU, or allocates in its own way: whatever it is, the plain way works
            self._works = False
            progress.detail(f"Small steps wait for the host: no CUDA graph can be made ({first_line(error)})")
            return None
        self._pool = graph.pool
        return graph


class _Graph:
    """A recorded pass.

    Args:
        batch: of the graph's form.
        pool: of the other graphs; None: there are none.
    """

    def __init__(self, loss: Callable[[PackedBatch], torch.Tensor], batch: PackedBatch, pool: Any):
        own: dict[str, Any] = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        self._batch = replace(batch, **own)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            total = loss(self._batch)
            total.backward()
            self._total = total.detach()
        self.pool = self._graph.pool()

    def run(self, batch: PackedBatch) -> torch.Tensor:
        """The summed loss of a batch of this form; gradients are added to those that are there."""
        for field in fields(batch):
            if isinstance(place := getattr(self._batch, field.name), torch.Tensor):
                place.copy_(getattr(batch, field.name), non_blocking=True)
        self._graph.replay()
        return self._total.clone()
