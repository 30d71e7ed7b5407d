"""Fixtures that several tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ollama_double import OllamaDouble

if shutil.which("nvidia-smi") is None:  # Triton reads this when it is imported, which may be by any test
    os.environ["TRITON_INTERPRET"] = "1"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each of pytest-xdist's workers, and what it starts, computes on its share of the processors
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[int(worker.removeprefix("gw")) % len(usable) :: count])
    else:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))


@pytest.fixture(scope="session", autouse=True)
def one_export_worker() -> Iterator[None]:
    """Exports of all tests in this process share a worker, whose start takes some seconds. Tests that end a worker start one of their own."""
    from olpack.export.client import one_worker

    with one_worker():
        yield


@pytest.fixture
def ollama_double(tmp_path: Path) -> Iterator[OllamaDouble]:
    """A double of an Ollama server, empty, on a port of its own."""
    with OllamaDouble(tmp_path) as double:
        yield double
