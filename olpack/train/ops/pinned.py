"""Host memory in which waits what a GPU does not need for a while, locked to its place so that copies run beside the computation.

torch locks each tensor by itself when it is asked for, page by page, and rounds it up to a power of two: the first step of an 8B model with 16,384
tokens waited 9 s for its 13 GB. Here they are one piece, of large pages that several threads make, and locked while the model loads: 3.6 s.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch

_ALIGNED = 512  # bytes, as an allocation of CUDA is
_PORTABLE = 1  # of cudaHostRegister: locked for every GPU


class HostMemory:
    """Is given out and taken back like a stack, as layers go forward and backward.

    Args:
        size: bytes. What finds no place gets memory from torch, and so does all where the system locks none.
        device: the GPU.

    Attributes:
        stream: on which the copies from there and back run, one after the other.
        given: bytes that are in use, from the beginning.
    """

    def __init__(self, size: int, device: torch.device):
        self.stream, self.given = torch.cuda.Stream(device), 0
        self._device, self._size, self._memory = device, size, None
        self._locking = threading.Thread(target=self._lock)
        self._locking.start()

    def _lock(self) -> None:
        with contextlib.suppress(Exception):  # too little memory, or none may be locked
            pages = mmap.mmap(-1, self._size)
            with contextlib.suppress(AttributeError, OSError):  # not every system has larger pages
                pages.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(pages, dtype=torch.uint8)
            memory.zero_()  # by several threads, while locking would ask the system for one page after the other
            with torch.cuda.device(self._device):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), self._size, _PORTABLE))
            self._memory = memory
            weakref.finalize(self, _unlock, memory, self._device)

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and dtype, with any numbers."""
        self._locking.join()
        begin, end = self.given, self.given + like.nbytes
        if self._memory is None or end > self._size:
            return _locked_by_torch(like)
        self.given = -(-end // _ALIGNED) * _ALIGNED
        return self._memory[begin:end].view(like.dtype).view(like.shape)

    def give_back(self, given: int) -> None:
        """What was taken since so many bytes were given. Copies that are on their way may end: those that follow wait for them."""
        self.given = given


def _locked_by_torch(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _unlock(memory: torch.Tensor, device: torch.device) -> None:
    with contextlib.suppress(Exception):  # of a GPU that has failed
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
