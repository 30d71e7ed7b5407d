"""Q4_0, Q8_0, Q4_K, Q5_K and Q6_K on an NVIDIA GPU, bit for bit as ggml makes them.

`gpu_blocks.cpp` is compiled when it is needed, by the NVRTC that comes with torch, and compared with ggml on rows of every kind before it is
used. Where there is no GPU, where it lacks the memory, or where the bits differ, the CPU does the work.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack.llamacpp import kquants, library, nvrtc

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 22  # the most weights that one call takes

_SOURCE = Path(__file__).with_name("gpu_blocks.cpp")
_FLAGS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_SMALLEST_PART = 16  # weights of the smallest sub-block
_SMALLEST_BLOCK = 32
_MOST_BYTES = (34, 32)  # the bytes of so many weights in the largest type, Q8_0


@dataclass(frozen=True)
class Recipe:
    """How a type is made.

    Attributes:
        kernels: those of gpu_blocks.cpp, in order, each with the weights that one of its threads takes.
        block: weights of a block.
        top: the largest code, where the first kernel needs to know.
    """

    kernels: tuple[tuple[str, int], ...]
    block: int
    top: int = 0


RECIPES = {  # by ggml's number of the type
    2: Recipe((("encode_q4_0", 32),), 32),
    8: Recipe((("encode_q8_0", 32),), 32),
    12: Recipe((("fit_q45_k", 32), ("pack_q4_k", 256)), 256, 15),
    13: Recipe((("fit_q45_k", 32), ("pack_q5_k", 256)), 256, 31),
    14: Recipe((("fit_q6_k", 16), ("pack_q6_k", 256)), 256),
}
_Q4_0 = 2
MEAN_SQUARES = "mean_squares"  # the kernel of whole rows, before that of Q4_0 where there is an importance


class Job(ctypes.Structure):
    """`encoder_job` of gpu_blocks.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "importance", "scales", "lows", "weights", "squares", "out", "left")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "top")),
    ]


def start() -> GpuEncoder | None:
    """The encoder of this process's GPU; None without one, or where it does not make ggml's bits. Takes some seconds."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        encoder = GpuEncoder()
        agrees = kquants.agrees(encoder.quantize_type, library.ggml(), RECIPES)
    except (RuntimeError, OSError):  # no NVRTC for this CUDA, no memory, a driver that is too old
        return None
    return encoder if agrees else None


class GpuEncoder:
    """Quantizes rows on the GPU; any number of threads may call it at once, each of which has buffers of its own there.

    Attributes:
        name: of the GPU, "NVIDIA H200".
        failure: why the GPU is no longer used, such as a lack of memory; None while it is.

    Raises:
        RuntimeError: the source does not compile, or the GPU fails.
    """

    def __init__(self) -> None:
        import torch

        self._device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self._device)
        self.name: str = properties.name
        self.failure: str | None = None
        torch.zeros(1, device=self._device)  # the driver's functions work in the context that torch makes
        code = nvrtc.compile_cubin(_SOURCE, f"sm_{properties.major}{properties.minor}", torch.version.cuda or "", _FLAGS)
        names = [MEAN_SQUARES, *(name for recipe in RECIPES.values() for name, _ in recipe.kernels)]
        self._kernels = nvrtc.load_kernels(code, names)
        self._of_thread = threading.local()

    @property
    def used(self) -> str:
        """What made the blocks so far, for a record."""
        return self.name if self.failure is None else f"{self.name}, then the CPU: {self.failure.splitlines()[0]}"

    def quantize_rows(self, rows: np.ndarray, outs: Mapping[int, np.ndarray], importance: np.ndarray | None) -> bool:
        """`library.quantize_rows` for several types at once: on the GPU what it can make, on the CPU the rest.

        Args:
            rows: float32 [rows, columns], C-contiguous, finite.
            outs: by type of ggml, what `library.quantize_rows` has as `out`.
            importance: as there.

        Returns:
            Whether all results are sound.
        """
        remaining = dict(outs)
        sound = True
        if self.failure is None and rows.size <= CHUNK and RECIPES.keys() & outs.keys():
            try:
                lane = self._lane()
                lane.upload(rows, importance)
                for type_ in RECIPES.keys() & outs.keys():
                    again = lane.quantize(type_, rows, outs[type_], importance)
                    sound &= not len(again) or library.is_sound(type_, again)
                    del remaining[type_]
            except RuntimeError as error:  # torch's, for a lack of memory too
                self.failure = str(error)
        return all([library.quantize_rows(type_, rows, out, importance) for type_, out in remaining.items()]) and sound

    def quantize_type(self, type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> None:
        """One type on the GPU alone: what cannot be made there raises a RuntimeError."""
        lane = self._lane()
        lane.upload(rows, importance)
        lane.quantize(type_, rows, out, importance)

    def _lane(self) -> _Lane:
        if not hasattr(self._of_thread, "lane"):
            self._of_thread.lane = _Lane(self._device, self._kernels)
        return self._of_thread.lane


class _Lane:
    """One thread's buffers and its stream of work on the GPU."""

    def __init__(self, device: Any, kernels: Mapping[str, nvrtc.Kernel]):
        import torch

        def buffers(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty(count, dtype=dtype, device=device), torch.empty(count, dtype=dtype, pin_memory=True)

        self._kernels = kernels
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
        with torch.cuda.stream(self._stream):
            self._x, self._host_x = buffers(CHUNK, torch.float32)
            self._out, self._host_out = buffers(CHUNK * _MOST_BYTES[0] // _MOST_BYTES[1], torch.uint8)
            self._left, self._host_left = buffers(CHUNK // _SMALLEST_BLOCK, torch.uint8)
            self._scales = torch.empty(CHUNK // _SMALLEST_PART, device=device)
            self._lows, self._weights, self._squares = torch.empty((3, CHUNK // _SMALLEST_BLOCK), device=device)
        self._importance: torch.Tensor | None = None

    def upload(self, rows: np.ndarray, importance: np.ndarray | None) -> None:
        """Begin to copy rows to the GPU."""
        import numpy as np
        import torch

        np.copyto(self._host_x[: rows.size].numpy(), rows.reshape(-1))
        with torch.cuda.stream(self._stream):
            self._x[: rows.size].copy_(self._host_x[: rows.size], non_blocking=True)
            self._importance = None if importance is None else torch.from_numpy(importance).to(self._x.device)

    def quantize(self, type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """One type of the rows that are on the GPU, where they were uploaded with this importance; returns what `finish` returns."""
        import numpy as np
        import torch

        recipe = RECIPES[type_]
        blocks = rows.size // recipe.block
        buffers = (self._x, self._importance, self._scales, self._lows, self._weights, self._squares, self._out, self._left)
        job = Job(*(None if buffer is None else buffer.data_ptr() for buffer in buffers), *rows.shape, recipe.top)
        with torch.cuda.stream(self._stream):
            if type_ == _Q4_0 and importance is not None:
                self._kernels[MEAN_SQUARES].launch(len(rows), job, self._stream.cuda_stream)
            for name, weights in recipe.kernels:
                self._kernels[name].launch(rows.size // weights, job, self._stream.cuda_stream)
            self._host_out[: out.size].copy_(self._out[: out.size], non_blocking=True)
            self._host_left[:blocks].copy_(self._left[:blocks], non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        np.copyto(out.reshape(-1), self._host_out[: out.size].numpy())
        return finish(type_, rows, out, self._host_left[:blocks].numpy(), importance)


def finish(type_: int, rows: np.ndarray, out: np.ndarray, left: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Have ggml make the rows of which gpu_blocks.cpp left a block.

    Args:
        type_, rows, out, importance: as in `library.quantize_rows`; `out` contains what the kernels made.
        left: uint8 [blocks], 1 where a block was left.

    Returns:
        What ggml made, uint8 [rows of those, bytes]: its scales may be infinite, those of the kernels never are.
    """
    import numpy as np

    again = np.unique(left.nonzero()[0] // (rows.shape[1] // RECIPES[type_].block))
    made = np.empty((len(again), out.size // len(rows)), np.uint8)
    if len(again):
        library.encode_rows(type_, np.ascontiguousarray(rows[again]), made, importance)
        out.reshape(len(rows), -1)[again] = made
    return made
