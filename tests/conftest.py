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
