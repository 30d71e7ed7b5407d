"""The memory of a machine, and how much of it is available to a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1 << 30
GPU_MARGIN = GIB  # left free on each GPU for its driver's context and the screen, as llama.cpp's own --fit leaves it
RAM_MARGIN = 2 * GIB  # left free for the system


@dataclass(frozen=True)
class Machine:
    """Memory in bytes.

    Attributes:
        ram: of the machine, or of the container that this process runs in.
        gpus: of each GPU; empty without one.
        given: whether the user gave these sizes; False where they were detected.
    """

    ram: int
    gpus: tuple[int, ...] = ()
    given: bool = False

    @property
    def available_ram(self) -> int:
        """Bytes of RAM that a model may use."""
        return max(0, self.ram - RAM_MARGIN)

    @property
    def available_gpu(self) -> int:
        """Bytes that a model may use on all GPUs together."""
        return sum(max(0, size - GPU_MARGIN) for size in self.gpus)


def this_machine() -> Machine:
    """RAM and GPUs of this machine: NVIDIA's through nvidia-smi, any that torch can use otherwise."""
    limit = _container_limit()
    total = psutil.virtual_memory().total
    return Machine(min(total, limit or total), _from_driver() or _from_torch())


def _from_driver() -> tuple[int, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    asked = subprocess.run([command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    sizes = [line.strip() for line in asked.stdout.splitlines()]
    return tuple(int(size) << 20 for size in sizes if size.isdecimal()) if asked.returncode == 0 else ()


def _from_torch() -> tuple[int, ...]:
    if sys.platform == "linux" and not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")):
        return ()  # without a driver's device torch finds nothing either, and takes seconds for that
    import torch

    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def _container_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that a container's processes may have together (cgroup v2); None where there is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
