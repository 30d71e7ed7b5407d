"""Q4_K, Q5_K and Q6_K several times faster than ggml makes them, and bit for bit the same.

`kquants.cpp` is compiled once on each machine, for its processor, and compared with ggml on rows of every kind before it is used. Where
there is no compiler, or where the bits differ (on some processors compilers fuse ggml's multiplications and additions), ggml's own
function does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.workspace import file_digest, is_private, make_user_cache, scratch, user_cache, write_atomically

if TYPE_CHECKING:
    import numpy as np

BITS = {12: 4, 13: 5, 14: 6}  # ggml's number of Q4_K, Q5_K and Q6_K, and how many bits they have

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC")

# (type, rows, out, importance) as in `library.quantize_rows`; the types are those of BITS.
Quantize = Callable[[int, "np.ndarray", "np.ndarray", "np.ndarray | None"], None]


class _Functions(ctypes.Structure):
    """`ggml_functions` of kquants.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("quantize_chunk", "to_half", "from_half")]


def quantizer(ggml: ctypes.CDLL) -> Quantize | None:
    """The compiled function, None where it cannot be had or makes other bits than ggml. Takes some seconds on a machine's first call.

    Args:
        ggml: ggml's base library, with the types of `ggml_quantize_chunk` and `ggml_row_size` declared.
    """
    library = compiled()
    if library is None:
        return None
    function = ctypes.CDLL(str(library)).olpack_quantize_rows
    function.restype = None
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    used = (ggml.ggml_quantize_chunk, ggml.ggml_fp32_to_fp16, ggml.ggml_fp16_to_fp32)
    functions = _Functions(*(ctypes.cast(one, ctypes.c_void_p) for one in used))

    def quantize(type_: int, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> None:
        weights = importance.ctypes.data if importance is not None else None
        function(BITS[type_], type_, rows.ctypes.data, out.ctypes.data, *rows.shape, weights, ctypes.addressof(functions))

    return quantize if agrees(quantize, ggml, BITS) else None


def agrees(quantize: Quantize, ggml: ctypes.CDLL, types: Iterable[int]) -> bool:
    """Whether a function makes ggml's bits of `sample_rows` in all types, with and without an importance."""
    import numpy as np

    rows = sample_rows()
    for importance in (None, np.abs(rows[0]), rows[1] ** 2):
        for type_ in types:
            expected, found = np.zeros((2, len(rows), ggml.ggml_row_size(type_, rows.shape[1])), np.uint8)
            weights = importance.ctypes.data if importance is not None else None
            ggml.ggml_quantize_chunk(type_, rows.ctypes.data, expected.ctypes.data, 0, *rows.shape, weights)
            quantize(type_, rows, found, importance)
            if not np.array_equal(expected, found):
                return False
    return True


def sample_rows() -> np.ndarray:
    """Rows like those of models, and rows that no model should have: float32 [96, 768]."""
    import numpy as np

    random = np.random.default_rng(0)
    normal = random.standard_normal((6, 768))
    wide = normal * np.exp(random.uniform(-20, 20, normal.shape))
    uneven = normal * np.repeat(np.exp(random.uniform(-9, 9, (6, 24))), 32, axis=1)
    holes = np.where(random.random(normal.shape) < 0.1, normal, 0)
    steps = np.repeat(normal[:, :24], 32, axis=1)
    kinds = [
        normal,
        normal * 0.02,
        normal * 1e-6,
        normal * 1e-20,
        normal * 1e20,
        normal**5,
        np.abs(normal),
        -np.abs(normal),
        normal + 300,
        normal / 300 - 1,
        wide,
        uneven,
        holes,
        steps,
        np.round(normal * 3),
        np.zeros_like(normal),
    ]
    return np.concatenate(kinds).astype(np.float32)


def compiled(source: Path = _SOURCE) -> Path | None:
    """A source as shared object for this machine, from the user's cache or compiled now; None where that cannot be done."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None or os.name == "nt":
        return None
    try:
        cached = sorted(user_cache().glob(f"{_name(source, compiler)}-*.so"))
        if sound := next(filter(_is_sound, cached), None):
            return sound
        for broken in cached:
            progress.warn(f"{broken} is damaged, or others can write to it: it is compiled again")
            broken.unlink()
        folder = make_user_cache()
        with scratch() as place:
            made = place / f"{source.stem}.so"
            command = workers.program(compiler, *_FLAGS, *_processor()[0], str(source), "-o", str(made))
            subprocess.run(command, env=workers.environment(), check=True, capture_output=True, timeout=120)
            path = folder / f"{_name(source, compiler)}-{file_digest(made)}.so"
            write_atomically(path, made.read_bytes())
            path.chmod(0o600)
    except (OSError, OlpackError, subprocess.SubprocessError):
        return None
    return path if _is_sound(path) else None


def _name(source: Path, compiler: str) -> str:
    """Named after all that decides its content, so that a home folder may be shared by machines of several kinds. The content's digest follows."""
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    seen = "\n".join([compiler, *_FLAGS, *_processor()[0], _processor()[1], *texts])
    return f"{source.stem}-{hashlib.sha256(seen.encode()).hexdigest()[:16]}"


def _is_sound(path: Path) -> bool:
    """Whether a library is as the compiler made it, and nobody else can write to it."""
    return is_private(path) and path.stem.rpartition("-")[2] == file_digest(path)


@functools.cache
def _processor() -> tuple[list[str], str]:
    """(flags for the compiler, what the processor can do). Only Linux lists the features in a file; elsewhere the common instructions serve."""
    machine = platform.machine()
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return [], machine
    return ["-march=native"], f"{machine} {features}"
