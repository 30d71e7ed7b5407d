"""llama.cpp's shared libraries through ctypes: quantized rows, and the types that a quant mix gives to a model's tensors."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.errors import OlpackError
from olpack.installed import install_command
from olpack.llamacpp import kquants, rounding
from olpack.llamacpp.source import VERSION

if TYPE_CHECKING:
    import numpy as np

# Over what is there, into the Python that runs olpack, and never from a wheel that pip built and cached without the option.
INSTALL = install_command("--force-reinstall", "--no-deps", "--no-cache-dir", "-C", "cmake.args=-DGGML_NATIVE=OFF", f"llama-cpp-python=={VERSION}")


def load_llama_cpp():
    """The module `llama_cpp`.

    Raises:
        OlpackError: it is not installed, or its shared library does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise OlpackError(f"llama.cpp's library could not be loaded: {error}.", f"Install it: {INSTALL}") from error
    return llama_cpp


def library_folder() -> Path:
    """Where llama-cpp-python keeps its shared libraries, found without loading them.

    Raises:
        OlpackError: it is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.origin is not None:
        folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(spec.origin).parent / "lib")
        if folder.is_dir():
            return folder
    raise OlpackError("llama.cpp's library is not installed.", f"Install it: {INSTALL}")


@functools.cache
def ggml() -> ctypes.CDLL:
    """ggml's base library, with the signatures of the functions that olpack calls."""
    load_llama_cpp()
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    library = ctypes.CDLL(str(library_folder() / name))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    for name in ("ggml_type_name", "ggml_op_name"):
        getattr(library, name).restype = ctypes.c_char_p
        getattr(library, name).argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    for name, result in (("ggml_get_name", ctypes.c_void_p), ("ggml_get_data", ctypes.c_void_p), ("ggml_nbytes", ctypes.c_size_t)):
        getattr(library, name).restype = result
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
        getattr(library, name).restype = None
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_blck_size.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    ]


_first_use = threading.Lock()  # so that of many threads that begin at once only one compiles


def _k_quantizer() -> kquants.Quantize | None:
    with _first_use:
        return _compiled_quantizer()


@functools.cache
def _compiled_quantizer() -> kquants.Quantize | None:
    return kquants.quantizer(ggml())


@functools.cache
def _types_by_name() -> dict[str, int]:
    names = {number: ggml().ggml_type_name(number) for number in range(load_llama_cpp().GGML_TYPE_COUNT)}
    return {name.decode().lower(): number for number, name in names.items() if name}


def searcher() -> rounding.Search:
    """The search for scales of `rounding: search`.

    Raises:
        OlpackError: there is no compiler.
    """
    with _first_use:
        return _compiled_search()


@functools.cache
def _compiled_search() -> rounding.Search:
    return rounding.searcher(ggml())


def k_quants_are_compiled() -> bool:
    """Whether Q4_K, Q5_K and Q6_K are made by `kquants`, several times faster than by ggml itself."""
    return _k_quantizer() is not None


def tensor_type(name: str) -> int:
    """The number of a tensor type in ggml, by its name in any case: "q4_K", "F32"."""
    return _types_by_name()[name.lower()]


def type_name(type_: int) -> str:
    """The name of a tensor type in ggml, "q4_K" or "f32"."""
    return ggml().ggml_type_name(type_).decode()


def row_size(type_: int, columns: int) -> int:
    """Bytes of a row of `columns` weights in a tensor type."""
    return ggml().ggml_row_size(type_, columns)


def quantize_rows(type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None, *, search: bool = False) -> bool:
    """Convert rows of weights to a tensor type, to ggml's bits. Releases the GIL; rows are independent of each other.

    Args:
        type_: a tensor type of ggml, also f32, f16 or bf16.
        rows: float32 [rows, columns], C-contiguous.
        out: uint8, C-contiguous, `rows * row_size(type_, columns)` bytes.
        importance: float32 [columns], C-contiguous, the weight of each column's error; None: llama.cpp weighs by the values themselves.
        search: replace each block by one with a smaller squared error, weighted with `importance`, or by size where there is none.

    Returns:
        Whether the result is sound, by llama.cpp's own test (no infinite or undefined scale).
    """
    encode_rows(type_, rows, out, importance, search=search)
    return is_sound(type_, out)


def encode_rows(type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None, *, search: bool = False) -> None:
    """`quantize_rows` without the test, which prints what it finds to stderr."""
    count, columns = rows.shape
    assert rows.flags.c_contiguous and out.flags.c_contiguous and out.nbytes == count * row_size(type_, columns)
    if type_ in kquants.BITS and (faster := _k_quantizer()):
        faster(type_, rows, out, importance)
    else:
        weights = importance.ctypes.data if importance is not None else None
        written = ggml().ggml_quantize_chunk(type_, rows.ctypes.data, out.ctypes.data, 0, count, columns, weights)
        assert written == out.nbytes
    if search and type_ in rounding.TYPES:
        searcher()(type_, rows, out, importance)


def is_sound(type_: int, data: np.ndarray) -> bool:
    """llama.cpp's own test of a tensor type's bytes, uint8, C-contiguous: whether no scale is infinite or undefined."""
    return ggml().ggml_validate_row_data(type_, data.ctypes.data, data.nbytes)


def dequantize_rows(type_: int, data: np.ndarray, out: np.ndarray) -> None:
    """Convert rows of a quantized type to the weights that they stand for. Releases the GIL.

    Args:
        type_: a quantized tensor type of ggml.
        data: uint8, C-contiguous, as `quantize_rows` makes it.
        out: float32 [rows, columns], C-contiguous.
    """
    assert data.flags.c_contiguous and out.flags.c_contiguous and data.nbytes == len(out) * row_size(type_, out.shape[1])
    ggml().ggml_get_type_traits(type_).contents.to_float(data.ctypes.data, out.ctypes.data, out.size)


def fits(type_: int, columns: int) -> bool:
    """Whether rows of so many weights are whole blocks of a tensor type."""
    return columns % ggml().ggml_blck_size(type_) == 0


@dataclass(frozen=True)
class TypePlan:
    """What llama.cpp would write for a file type.

    Attributes:
        tensors: (tensor name, tensor type of ggml), in the order in which it writes them.
        fallbacks: one line for each tensor whose rows do not fit the blocks of its type: what llama.cpp takes instead.
        needs_importance: some tensor's type is useless without an importance matrix.
    """

    tensors: list[tuple[str, int]]
    fallbacks: list[str]
    needs_importance: bool


_TENSOR_LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[.*?\], type =\s+(\w+), size =(?:.*-> .*\((\w+)\))?")
_FALLBACK_LINE = re.compile(r"^warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\).*falling back to\s+(\w+)")


def type_plan(header: Path, ftype: int, *, overrides: Sequence[tuple[str, int]] = (), with_importance: bool = False) -> TypePlan:
    """Ask llama.cpp which type each tensor of a model gets in a file type.

    Args:
        header: a GGUF whose data may be a hole; only its header is read.
        ftype: a value of `enum llama_ftype`.
        overrides: (regular expression, tensor type) pairs. The first that is found in a tensor's name decides its type.
        with_importance: whether there will be an importance matrix. llama.cpp then chooses some other types, and `needs_importance`
            is False.

    Raises:
        OlpackError: llama.cpp refuses the model; with its own words.
    """
    llama_cpp = load_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = ftype, 1, True
    if overrides:
        pairs = [(pattern.encode(), type_) for pattern, type_ in overrides]
        params.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))(*pairs, (None, 0))
    if with_importance:  # that there is one is all that counts in a dry run
        one = (ctypes.c_float * 1)(1)
        params.imatrix = (llama_cpp.llama_model_imatrix_data * 2)((b"any", one, 1), (None, None, 0))
    with captured_log() as log:
        failed = llama_cpp.llama_model_quantize(str(header).encode(), b"", ctypes.byref(params))
    lines = "".join(log).splitlines()
    if failed:
        reason = next((line for line in reversed(lines) if "failed to quantize" in line), "no reason given")
        raise OlpackError(
            f"llama.cpp cannot quantize this model: {reason.rpartition('failed to quantize: ')[2].rstrip('.')}.",
            "The types for single tensors (tensor_types) may hold a regular expression that C++ does not know."
            if overrides
            else "The converter and the library may be of different versions: unset OLPACK_LLAMA_CPP.",
        )
    tensors = [(match[1], tensor_type(match[3] or match[2])) for match in map(_TENSOR_LINE.match, lines) if match]
    fallbacks = [f"{m[1]} ({m[2]} columns, {m[4]} needs a multiple of {m[3]}) becomes {m[5]}" for m in map(_FALLBACK_LINE.match, lines) if m]
    return TypePlan(tensors, fallbacks, needs_importance=any("will require an imatrix" in line for line in lines))


def requires_importance(type_: int) -> bool:
    """Whether ggml's quantizer aborts where it is to make this tensor type without an importance matrix."""
    return ggml().ggml_quantize_requires_imatrix(type_)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect what llama.cpp logs, in pieces as it logs them, instead of letting it print."""
    llama_cpp = load_llama_cpp()
    pieces: list[str] = []
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pieces.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p())
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(before, user_data)
