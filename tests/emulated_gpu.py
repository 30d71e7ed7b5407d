"""The kernels of gpu_blocks.cpp compiled for a CPU, where each is a loop, and an encoder that runs them in place of a GPU's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from olpack.llamacpp import gpu_encoder, kquants


class Kernels:
    """The compiled kernels."""

    def __init__(self) -> None:
        library = kquants.compiled(Path(gpu_encoder.__file__).with_name("gpu_blocks.cpp"))
        assert library is not None
        self._library = ctypes.CDLL(str(library))

    def run(self, type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """Fill `out` as `library.quantize_rows` does, but for the blocks that are left to ggml: uint8 [blocks], 1 for those."""
        recipe = gpu_encoder.RECIPES[type_]
        scales, lows, weights, squares = np.zeros((4, rows.size // 16), np.float32)
        left = np.full(rows.size // recipe.block, 2, np.uint8)
        buffers = (rows, importance, scales, lows, weights, squares, out, left)
        job = gpu_encoder.Job(*(None if buffer is None else buffer.ctypes.data for buffer in buffers), *rows.shape, recipe.top)
        for name in (gpu_encoder.MEAN_SQUARES, *(name for name, _ in recipe.kernels)):
            getattr(self._library, name)(job)
        assert left.max() <= 1
        return left


class _Lane:
    def __init__(self, encoder: Encoder):
        self._encoder = encoder

    def upload(self, rows: np.ndarray, importance: np.ndarray | None) -> None:
        if self._encoder.fail_after is not None:
            self._encoder.fail_after -= 1
            if self._encoder.fail_after < 0:
                raise RuntimeError("out of memory\nand a second line")

    def quantize(self, type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        return gpu_encoder.finish(type_, rows, out, self._encoder.kernels.run(type_, rows, out, importance), importance)


class Encoder(gpu_encoder.GpuEncoder):
    """As the GPU's, with the kernels on the CPU. `fail_after`: how many chunks it takes before the GPU fails; None: all."""

    def __init__(self, fail_after: int | None = None):
        self.name, self.failure, self.fail_after, self.kernels = "a GPU", None, fail_after, Kernels()

    def _lane(self) -> _Lane:
        return _Lane(self)
