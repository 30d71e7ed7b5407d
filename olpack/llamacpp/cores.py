"""How many threads do the work."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def usable_processors() -> int:
    """Logical processors that this process may use: its affinity and a container's CPU limit are respected."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _container_limit() or allowed))


def usable_cores() -> int:
    """Physical cores among the `usable_processors`, for llama.cpp's inference.

    A second thread on one core makes llama.cpp slower, and more threads than the limit grants make it many times slower: each step waits
    for the last of them.
    """
    allowed = usable_processors()
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def _container_limit(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole CPUs of a container's quota (cgroup v2: "200000 100000" grants two); None where there is none."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max 100000"
        return None
