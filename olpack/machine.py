"""The memory of a machine: what is there, and what a model may have of it."""

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
        told: False where it was found, True where the user said so.
    """

    ram: int
    gpus: tuple[int, ...] = ()
    told: bool = False

    @property
    def ram_room(self) -> int:
        """What a model may have of the RAM."""
        return max(0, self.ram - RAM_MARGIN)

    @property
    def gpu_room(self) -> int:
        """What a model may have of all GPUs together."""
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
        return ()  # without a driver's device torch finds nothing either, and takes seconds to say so
    import torch

    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def _container_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that a container's processes may have together (cgroup v2); None where there is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
