"""Fixtures that several tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ollama_double import OllamaDouble

if TYPE_CHECKING:
    from olpack.deploy.client import OllamaClient

if shutil.which("nvidia-smi") is None:  # Triton reads this when it is imported, which may be by any test
    os.environ["TRITON_INTERPRET"] = "1"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each of pytest-xdist's workers, and what it starts, computes on its share of the processors
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[int(worker.removeprefix("gw")) % len(usable) :: count])
    else:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))

# Modules that import torch, or train, export or measure a model, or fetch the converter: `make test-fast` leaves them out.
SLOW = (
    "adapter_package", "bad_inputs", "compare_[dfhmt]*", "compare_scores", "compare_server_*", "deploy_elsewhere", "deploy_identity",
    "deploy_stage", "deploy_store", "docs_commands", "examples", "export_*", "finished_adapter", "four_bits", "gguf_*", "kills", "llamacpp_engine",
    "llamacpp_source", "memory", "package", "pipeline", "plan_*", "publish", "quantize", "readme_*", "sandbox", "secrets", "side_by_side",
    "tiny_coder", "tokenizer_trial", "train*",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the modules that import torch, or train or export a model")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.stem.removeprefix("test_")
    return True if config.getoption("fast") and any(fnmatch(name, pattern) for pattern in SLOW) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    loaded = "torch" in sys.modules
    report = yield
    if collector.config.getoption("fast") and not loaded and "torch" in sys.modules:
        report.outcome, report.longrepr = "failed", f"{collector.nodeid} imports torch: SLOW in tests/conftest.py must name it."
    return report


@pytest.fixture(scope="session", autouse=True)
def one_export_worker() -> Iterator[None]:
    """Exports of all tests in this process share a worker, whose start takes some seconds. Tests that end a worker start one of their own."""
    from olpack.export import client

    with pytest.MonkeyPatch.context() as patch, client.one_worker():
        patch.setattr(client, "end_worker", lambda: None)  # as before each training on the CPU
        yield


@pytest.fixture
def ollama_double(tmp_path: Path) -> Iterator[OllamaDouble]:
    """A double of an Ollama server, empty, on a port of its own."""
    with OllamaDouble(tmp_path) as double:
        yield double


@pytest.fixture
def client(ollama_double: OllamaDouble, tmp_path: Path) -> OllamaClient:
    """A client of a server with two models: mine:q8_0 and theirs:latest."""
    import served_gguf
    from ollama_double_store import CHATML

    from olpack.deploy.client import OllamaClient, blob_digest
    from olpack.model.chat_template import protect

    client = OllamaClient(ollama_double.url)
    for filling, model in enumerate(("mine:q8_0", "theirs:latest")):
        served_gguf.write(path := tmp_path / f"{filling}.gguf", protect(CHATML.jinja, {}), filling=filling)
        client.upload(path, digest := blob_digest(path))
        client.create({"model": model, "files": {"m.gguf": digest}, "parameters": {"num_ctx": 512}})
    return client
