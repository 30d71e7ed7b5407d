"""Pinned memory for activation offloading: host memory that is locked to its place, so that copies to and from a GPU run beside the computation.

torch locks each tensor by itself when it is asked for, page by page, and rounds it up to a power of two: the first step of an 8B model with 16,384
tokens waited 9 s for its 13 GB. Here they are one piece, of large pages that several threads make, and locked while the model loads: 3.6 s.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch

ALIGNED = 512  # bytes, as an allocation of CUDA is
_PORTABLE = 1  # flag of cudaHostRegister: locked for every GPU


class PinnedMemory:
    """A stack of pinned memory, allocated as layers go forward and released as they go back.

    Args:
        size: bytes. Beyond it torch allocates, and so it does for everything where the system locks no memory.
        device: the GPU.

    Attributes:
        stream: runs the copies to and from this memory, one after the other.
        used: bytes in use, from the beginning.
    """

    def __init__(self, size: int, device: torch.device):
        self.stream, self.used = torch.cuda.Stream(device), 0
        self._device, self._size = device, size
        self._memory: torch.Tensor | None = None
        self._locking = threading.Thread(target=self._lock)
        self._locking.start()

    def _lock(self) -> None:
        self._memory = locked(self, self._size, self._device)

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and dtype, uninitialized."""
        self._locking.join()
        begin, end = self.used, self.used + like.nbytes
        if self._memory is None or end > self._size:
            return _pinned_by_torch(like)
        self.used = -(-end // ALIGNED) * ALIGNED
        return self._memory[begin:end].view(like.dtype).view(like.shape)

    def release(self, used: int) -> None:
        """Free all that was allocated since so many bytes were in use. Copies in flight may end: those that follow wait for them."""
        self.used = used


def locked(owner: object, size: int, device: torch.device) -> torch.Tensor | None:
    """Memory in large pages, uint8 [size], of zeros, pinned as long as its owner exists; None where there is too little, or the system locks none."""
    with contextlib.suppress(Exception):
        pages = mmap.mmap(-1, size)
        with contextlib.suppress(AttributeError, OSError):  # not every system has larger pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        memory.zero_()  # by several threads, while locking would ask the system for one page after the other
        with torch.cuda.device(device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, _PORTABLE))
        weakref.finalize(owner, _unlock, memory, device)
        return memory
    return None


def _pinned_by_torch(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _unlock(memory: torch.Tensor, device: torch.device) -> None:
    with contextlib.suppress(Exception):  # of a GPU that has failed
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
