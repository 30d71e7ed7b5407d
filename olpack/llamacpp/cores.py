"""How many threads llama.cpp gets."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity and a container's CPU limit are respected.

    A second thread on one core makes llama.cpp slower, and more threads than the limit grants make it many times slower: each step waits
    for the last of them.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed, _container_limit() or allowed))


def _container_limit(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole CPUs of a container's quota (cgroup v2: "200000 100000" grants two); None where there is none."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max 100000"
        return None
