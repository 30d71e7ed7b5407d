"""The machine that figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

import olpack
from olpack.compare.results import Machine
from olpack.llamacpp.cores import usable_cores

_WATCH_S = 0.5


def describe_machine(server_version: str | None) -> Machine:
    """This machine and the versions in play. Takes half a second, in which it looks how busy the machine is without us."""
    versions = {"olpack": olpack.__version__, "llama-cpp-python": version("llama-cpp-python"), "Python": platform.python_version()}
    if server_version:
        versions["Ollama"] = server_version
    return Machine(
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=_system(),
        busy=psutil.cpu_percent(_WATCH_S) / 100,
        versions=versions,
    )


def cpu_model() -> str:
    """Its name as the maker gives it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()
