"""Triton kernels compiled for a GPU that is not here, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DRIVER = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of a GPU that is not here
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")

driver.set_active(Driver())
"""


def compile_kernels(program: str, capability: int, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that compiles kernels for a GPU of this capability (86 is 8.6); its `sys.argv[2:]` are the arguments."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", DRIVER + program, str(capability), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
