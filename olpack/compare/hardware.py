"""The machine that figures are measured on: its CPU and versions, the energy of its GPUs, memory and reads of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil

import olpack
from olpack.compare.results import MachineInfo
from olpack.llamacpp.cores import usable_cores

_WATCH_S = 0.5


def describe_machine(server_version: str | None) -> MachineInfo:
    """This machine and the versions of what runs. It takes half a second, to measure how busy the machine is without us."""
    versions = {"olpack": olpack.__version__, "llama-cpp-python": version("llama-cpp-python"), "Python": platform.python_version()}
    if server_version:
        versions["Ollama"] = server_version
    return MachineInfo(
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=_system(),
        busy=psutil.cpu_percent(_WATCH_S) / 100,
        versions=versions,
    )


def cpu_model() -> str:
    """The name of the CPU as its maker gives it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        answer = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return answer.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()


def joules() -> float | None:
    """Energy used by all cards since the driver was loaded, in joules; None where there is no card, or one that does not report it.

    Cards from Volta on count it themselves (nvmlDeviceGetTotalEnergyConsumption, in millijoules); the rest of the machine is not counted.
    """
    library, cards = _cards()
    if library is None:
        return None
    total = 0
    for card in cards:
        used = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(used)) != 0:
            return None
        total += used.value
    return total / 1000 if cards else None


@cache
def _cards() -> tuple[ctypes.CDLL | None, list[ctypes.c_void_p]]:
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None, []
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None, []
    cards = [ctypes.c_void_p() for _ in range(count.value)]
    usable = [card for index, card in enumerate(cards) if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(card)) == 0]
    return library, usable


def drop_from_cache(path: Path) -> bool:
    """Ask the system to forget the file's pages; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise") or not path.is_file():
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages not yet written cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def bytes_read() -> int:
    """Bytes that this process has read from storage, page faults included; 0 where the system does not count them."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, psutil.Error, OSError):
        return 0


def peak_resident() -> int:
    """Largest resident set of this process so far, in bytes; where the system records no peak, the present one.

    getrusage's ru_maxrss is wrong on Linux: across exec it contains the peak of the parent, which may have trained a model.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)
