"""Fixtures that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ollama_double import OllamaDouble


@pytest.fixture
def ollama_double(tmp_path: Path) -> Iterator[OllamaDouble]:
    """A double of an Ollama server, empty, on a port of its own."""
    with OllamaDouble(tmp_path) as double:
        yield double
