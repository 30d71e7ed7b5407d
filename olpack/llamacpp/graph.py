"""The nodes of llama.cpp's graph as its evaluation callback shows them, and the weights that they use."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache

import numpy as np

from olpack.errors import OlpackError
from olpack.llamacpp.library import INSTALL, ggml


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of the installed llama.cpp (ggml.h)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


def check_layout(address: int) -> None:
    """Raise OlpackError where a tensor of the loaded library is not laid out as `Tensor`."""
    expected = (address + Tensor.name.offset, Tensor.from_address(address).data)
    if (ggml().ggml_get_name(address), ggml().ggml_get_data(address)) != expected:
        raise OlpackError(
            "The installed llama.cpp is not the one that olpack was made for: its tensors have another memory layout.", f"Install that one: {INSTALL}"
        )


@cache
def operation(name: str) -> int:
    """The number of an operation in `enum ggml_op`."""
    return next(number for number in itertools.count() if ggml().ggml_op_name(number).decode() == name)


def plain_name(name: bytes) -> str:
    """A tensor's name without what the scheduler puts around that of a copy: CUDA0#blk.0.attn_k.weight#0."""
    parts = name.decode().split("#")
    return parts[1] if len(parts) > 1 else parts[0]


class LoadedWeights:
    """The addresses of a loaded model's matrices, so that they can be overwritten. Give it to `Engine` as `watch`, with `writable`.

    A matrix is known once a pass has used it. The same one may be in two places: a tied embedding is on the CPU as the input layer, and on
    a GPU as the output layer.
    """

    def __init__(self) -> None:
        self._found: dict[str, set[int]] = {}
        self._uses = {operation(name) for name in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")}
        self._failure: BaseException | None = None
        self._checked = False

    def __call__(self, address: int, ask: bool) -> bool:
        try:
            node = Tensor.from_address(address)
            if node.op in self._uses:
                if not self._checked:
                    check_layout(address)
                    self._checked = True
                place = node.src[0]
                while view_of := Tensor.from_address(place).view_src:
                    place = view_of
                name = Tensor.from_address(place).name
                if b"#" not in name:  # what the scheduler copies from one device to another is made again in each pass
                    self._found.setdefault(name.decode(), set()).add(place)
        except BaseException as error:  # nothing can be raised through C
            self._failure = error
        return False

    def check(self) -> None:
        """Raise what went wrong in the callback."""
        if self._failure is not None:
            raise self._failure

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def write(self, name: str, data: np.ndarray) -> None:
        """Overwrite a matrix, on whatever device it is.

        Args:
            name: of the tensor in the GGUF.
            data: C-contiguous, all its bytes in the type that it has there.
        """
        for place in self._found[name]:
            assert data.flags.c_contiguous and data.nbytes == ggml().ggml_nbytes(place)
            ggml().ggml_backend_tensor_set(place, data.ctypes.data, 0, data.nbytes)
