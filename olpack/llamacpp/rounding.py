"""Blocks of ggml's types with a smaller error than ggml gives them: `rounding.cpp`, compiled once on each machine for its processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.errors import OlpackError
from olpack.llamacpp import kquants

if TYPE_CHECKING:
    import numpy as np

# ggml's numbers of the types that it knows: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL.
TYPES = frozenset({2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20})

_UNWEIGHTED = 8  # Q8_0: an importance matrix may be collected on it, and it is the same with and without one

_SOURCE = Path(__file__).with_suffix(".cpp")

# (type, rows, out, importance) as in `library.quantize_rows`, where `out` contains what ggml made; returns how many blocks it made better.
Search = Callable[[int, "np.ndarray", "np.ndarray", "np.ndarray | None"], int]


class _Functions(ctypes.Structure):
    """`rounding_functions` of rounding.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("to_half", "from_half", "to_float")]


def searcher(ggml: ctypes.CDLL) -> Search:
    """The compiled search. Takes some seconds on a machine's first call.

    Args:
        ggml: ggml's base library, with the type of `ggml_get_type_traits` declared.

    Raises:
        OlpackError: it cannot be compiled.
    """
    library = kquants.compiled(_SOURCE)
    if library is None:
        raise OlpackError(
            "The search for scales is compiled on the machine that uses it, and no C++ compiler could do that.",
            "Install one (Debian and Ubuntu: `apt install g++`; macOS: `xcode-select --install`), or set rounding to ggml.",
        )
    function = ctypes.CDLL(str(library)).olpack_search_rows
    function.restype = ctypes.c_int64
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    halves = [ctypes.cast(one, ctypes.c_void_p) for one in (ggml.ggml_fp32_to_fp16, ggml.ggml_fp16_to_fp32)]
    functions = {type_: _Functions(*halves, ctypes.cast(ggml.ggml_get_type_traits(type_).contents.to_float, ctypes.c_void_p)) for type_ in TYPES}

    def search(type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> int:
        weights = importance.ctypes.data if importance is not None and type_ != _UNWEIGHTED else None
        return function(type_, rows.ctypes.data, out.ctypes.data, *rows.shape, weights, ctypes.addressof(functions[type_]))

    return search
