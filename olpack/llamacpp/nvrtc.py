"""CUDA C++ compiled and started through the driver and the NVRTC library that torch brings: no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_GROUP = 64  # threads of a group, which share registers
_LIBRARIES = ("libnvrtc.so.{major}", "libnvrtc.so", "nvrtc64_{major}0_0.dll")

# What a GPU's compiler has no headers for.
_HEADERS = {
    "cmath": "",
    "cstring": "",
    "cstdint": "typedef signed char int8_t; typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef int int32_t;"
    "typedef unsigned int uint32_t; typedef long long int64_t;",
}


class CudaError(RuntimeError):
    """A function of the driver or of NVRTC failed."""


@cache
def _nvrtc(major: str) -> ctypes.CDLL:
    """NVRTC of a major version of CUDA: beside torch's other libraries, else as the system's loader finds it."""
    names = [name.format(major=major) for name in _LIBRARIES]
    bundled = [path for folder in filter(None, sys.path) for name in names for path in sorted(Path(folder).glob(f"nvidia/*/*/{name}"))]
    for name in [*bundled, *names]:
        with suppress(OSError):
            if isinstance(name, Path):
                for part in sorted(name.parent.glob("*nvrtc-builtins*[0-9]*")):  # which NVRTC opens by its bare name
                    ctypes.CDLL(str(part))
            return ctypes.CDLL(str(name))
    raise CudaError("NVRTC was not found")


def compile_cubin(source: Path, architecture: str, cuda: str, options: Sequence[str] = ()) -> bytes:
    """The machine code of a source, whose functions are all for the GPU.

    Args:
        source: CUDA C++; it may include headers that stand beside it.
        architecture: "sm_90".
        cuda: the version of CUDA, "13.0".
        options: further ones of NVRTC.

    Raises:
        CudaError: there is no NVRTC, or the source does not compile; with the compiler's words.
    """
    library = _nvrtc(cuda.partition(".")[0])
    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def do(name: str, *arguments: Any) -> int:
        code = getattr(library, name)(*arguments)
        if code and name != "nvrtcCompileProgram":
            raise CudaError(f"{name}: {library.nvrtcGetErrorString(code).decode()}")
        return code

    def text_of(kind: str) -> bytes:
        size = ctypes.c_size_t()
        do(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        do(f"nvrtcGet{kind}", program, found)
        return found.raw

    headers = {**_HEADERS, **{path.name: path.read_text(encoding="utf-8") for path in source.parent.glob("*.h")}}
    program = ctypes.c_void_p()
    strings = ctypes.c_char_p * len(headers)
    texts, names = strings(*(text.encode() for text in headers.values())), strings(*(name.encode() for name in headers))
    code = source.read_text(encoding="utf-8").encode()
    do("nvrtcCreateProgram", ctypes.byref(program), code, source.name.encode(), len(headers), texts, names)
    try:
        wanted = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space", *options]
        if do("nvrtcCompileProgram", program, len(wanted), (ctypes.c_char_p * len(wanted))(*(option.encode() for option in wanted))):
            raise CudaError(f"{source.name} does not compile: {text_of('ProgramLog').rstrip(bytes(1)).decode(errors='replace')}")
        return text_of("CUBIN")
    finally:
        do("nvrtcDestroyProgram", ctypes.byref(program))


class Kernel:
    """A kernel whose one parameter is a struct, and whose threads each take one of a number of items."""

    def __init__(self, driver: ctypes.CDLL, function: ctypes.c_void_p):
        self._driver, self._function = driver, function

    def launch(self, count: int, parameter: ctypes.Structure, stream: int) -> None:
        """Start it for so many items, on a stream of the current context. Raises CudaError."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        groups = -(-count // _GROUP)
        _check(self._driver, "cuLaunchKernel", self._function, groups, 1, 1, _GROUP, 1, 1, 0, ctypes.c_void_p(stream), pointers, None)


def load_kernels(code: bytes, names: Sequence[str]) -> dict[str, Kernel]:
    """Kernels of machine code, loaded into the current context of the driver, for as long as the process lives. Raises CudaError."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    module = ctypes.c_void_p()
    _check(driver, "cuModuleLoadData", ctypes.byref(module), code)
    kernels = {}
    for name in names:
        function = ctypes.c_void_p()
        _check(driver, "cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        kernels[name] = Kernel(driver, function)
    return kernels


def _check(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if code := getattr(driver, name)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown').decode()}")
