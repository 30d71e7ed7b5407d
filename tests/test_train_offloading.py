"""Activation offloading: the places in pinned memory, and gradients that are the same as without.

The copies, which a GPU makes beside the computation, are made at once.
"""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
from test_train_forward import ROWS, same_gradients, with_adapter
from tiny_models import write_model

from olpack.model.base import Base
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train.batches import pack
from olpack.train.forward import Forward
from olpack.train.memory import estimate_training
from olpack.train.ops import pinned_memory
from olpack.train.ops.pinned_memory import PinnedMemory

CPU = torch.device("cpu")


class Stream:
    """A stream whose copies are done when they are asked for."""

    def __init__(self, device: torch.device):
        self.device = device

    def wait_stream(self, _) -> None:
        pass

    def wait_event(self, _) -> None:
        pass

    def record_event(self) -> None:
        return None


class Runtime:
    """The part of CUDA's runtime that locks memory."""

    def __init__(self):
        self.locked: dict[int, int] = {}
        self.by_torch: list[torch.Tensor] = []
        self.answer = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.answer == 0:
            self.locked[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    runtime = Runtime()

    def check(code: int) -> None:
        if code:
            raise RuntimeError("CUDA error: out of memory")

    for name, value in {
        "Stream": Stream,
        "current_stream": lambda *_: Stream(CPU),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "synchronize": lambda _: None,
        "cudart": lambda: runtime,
        "check_error": check,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pinned_memory, "_pinned_by_torch", lambda like: runtime.by_torch.append(torch.empty_like(like)) or runtime.by_torch[-1])
    return runtime


def test_pinned_memory_is_a_stack(runtime):
    memory = PinnedMemory(4096, CPU)
    first, second = memory.allocate(torch.empty(3, 5)), memory.allocate(torch.empty(2, 100, dtype=torch.float16))
    (address,) = runtime.locked
    assert runtime.locked == {address: 4096} and (first.shape, first.dtype) == ((3, 5), torch.float32)
    assert (first.data_ptr(), second.data_ptr()) == (address, address + 512)
    before = memory.used
    third = memory.allocate(torch.empty(1000, dtype=torch.int8))
    memory.release(before)
    assert memory.allocate(torch.empty(7)).data_ptr() == third.data_ptr() == address + before
    large = memory.allocate(torch.empty(4096, dtype=torch.int8))  # no place for it
    assert runtime.by_torch[0] is large and memory.used == before + 512
    del memory
    gc.collect()
    assert not runtime.locked
    assert first.fill_(1.0).sum() == 15  # which is still there


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_where_the_system_locks_no_memory_torch_allocates(runtime, size):
    runtime.answer = 2
    found = PinnedMemory(size, CPU).allocate(torch.empty(10))
    assert found is runtime.by_torch[0] and found.shape == (10,)
    assert not runtime.locked


@pytest.mark.parametrize("offload_attention", [False, True])
def test_offloading_changes_no_gradient_and_stays_within_the_estimate(tmp_path, monkeypatch, runtime, offload_attention):
    base = Base("tiny", write_model(tmp_path / "model", num_hidden_layers=4))
    plain, model = (with_adapter(base, Train(rank=4)) for _ in range(2))
    Forward(plain, CPU, checkpointing=False).loss(pack(ROWS, CPU)).backward()
    most, taken, allocate = [], [], PinnedMemory.allocate
    tokens = sum(len(row.ids) for row in ROWS)
    estimate = estimate_training(MetaModel(base.config, "tiny"), rank=4, tokens=tokens, precision="nf4")
    size = 2 * estimate.pinned(offload_attention=offload_attention)  # for float32
    memory = PinnedMemory(size, CPU)

    def watched(self, like: torch.Tensor) -> torch.Tensor:
        found = allocate(self, like)
        most.append(self.used)
        taken.append(found)
        return found

    monkeypatch.setattr(PinnedMemory, "allocate", watched)
    forward = Forward(model, CPU, checkpointing=True, pinned=memory, offload_attention=offload_attention)
    assert not taken  # the checks do not wait until the memory is locked
    forward.loss(pack(ROWS, CPU))  # a pass that comes to no end
    forward.forget()
    forward.loss(pack(ROWS, CPU)).backward()
    same_gradients(model, plain, 1e-5)
    assert taken and not runtime.by_torch
    assert memory.used == 0 and 0.4 * size < max(most) <= size


def test_an_end_while_the_memory_is_being_locked_leaves_nothing_locked(runtime, monkeypatch):
    go, register = threading.Event(), runtime.cudaHostRegister
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *asked: go.wait(10) and register(*asked))
    memory = PinnedMemory(4096, CPU)
    locking = memory._locking
    del memory
    gc.collect()
    go.set()
    locking.join()
    del locking
    gc.collect()
    assert not runtime.locked
