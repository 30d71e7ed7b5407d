"""What the export's worker imports, and the arrays of a header that it packs at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextvars import ContextVar
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFValueType
from tiny_models import write_model

from olpack.errors import OlpackError
from olpack.export import Target, check_export, client, export
from olpack.export.client import end_worker
from olpack.export.gguf_writer import packed_array
from olpack.export.worker import _has_gpu
from olpack.llamacpp import engine

# Plans an export as the worker does, then looks up activations as configurations do.
PLAN = """
import sys
from olpack.export.converter import use_converter
from olpack.llamacpp.source import converter_source
use_converter(converter_source())
from olpack.export import run
plan = run.check(sys.argv[1], ["Q8_0"], None, [], {}, lambda count, total: None)
assert plan.architecture == "qwen3"
assert not {"torch._dynamo", "transformers.activations"} & sys.modules.keys()
from transformers.utils import type_validators
names = type_validators.ACT2FN
assert "silu" in names and "transformers.activations" not in sys.modules
assert "laplace" in names and "no such activation" not in names
from transformers.activations import ACT2FN
assert set(names.keys()) == set(ACT2FN) and names._KNOWN <= set(ACT2FN)
"""


def test_a_plan_imports_no_models_of_transformers(tmp_path):
    model = write_model(tmp_path / "model")
    path = str(Path(__file__).parents[1])
    child = subprocess.run([sys.executable, "-c", PLAN, model], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert child.returncode == 0, child.stderr


@pytest.fixture
def no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the block that all tests share."""
    monkeypatch.setattr(client, "_shared", ContextVar("_shared", default=None))


def test_one_worker_imports_early_and_does_the_jobs_of_a_block(tmp_path, no_block):
    model, gguf_file = write_model(tmp_path / "model"), tmp_path / "model.gguf"
    with client.one_worker(with_gpu=False):
        client.begin_worker()
        with client.worker() as worker:
            assert check_export(model, ["Q8_0"]).architecture == "qwen3"
            assert export(model, [Target("Q8_0", gguf_file)])[0].size == gguf_file.stat().st_size and not worker.has_gpu
        with client.worker() as again:
            assert again is worker and worker.alive
        worker.close()  # as after a crash
        with client.worker() as other:
            assert other is not worker and other.alive
        end_worker()
        assert not other.alive
        with client.worker() as last:
            assert last.alive
    assert not last.alive


def test_a_worker_with_a_gpu_ends_with_its_job_or_with_the_block_that_lets_it(no_block):
    with client.one_worker(with_gpu=False):
        with client.one_worker():
            with client.worker() as first:
                first.has_gpu = True
            with client.worker() as second:
                assert second is first and first.alive
        assert not first.alive
        with client.worker() as third:
            third.has_gpu = True
        assert not third.alive


@pytest.mark.parametrize(
    ("values", "item_type"),
    [
        (["a", "é", b"\xff", bytearray(b"x"), ""], None),
        ([1, -2, gguf.TokenType.CONTROL], None),
        ([-1000.0, 0.1, 3.0], None),
        ([True, False], None),
        ([1, 2], GGUFValueType.UINT32),
        ([1, 2], GGUFValueType.FLOAT32),
        ((7, 8, 9), None),
    ],
)
def test_an_array_is_packed_as_the_writer_packs_it(values, item_type):
    expected = gguf.GGUFWriter(None, "llama")._pack_val(values, GGUFValueType.ARRAY, add_vtype=True, sub_type=item_type)
    assert packed_array(values, item_type) == expected


@pytest.mark.parametrize("values", [[True, 2], [1, 2.0], [[1], [2]], b"abc", []])
def test_other_arrays_are_left_to_the_writer(values):
    assert packed_array(values, None) is None


def test_threads_get_workers_of_their_own(no_block):
    others = []

    def work() -> None:
        with client.worker() as other:
            others.append(other)

    with client.worker() as mine:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert mine.alive and others[0] is not mine and not others[0].alive


def test_what_fails_early_fails_again_in_the_first_job_alone(tmp_path, no_block, monkeypatch):
    broken = tmp_path / "converter"
    broken.mkdir()
    monkeypatch.setattr(client, "converter_source", lambda: broken)
    monkeypatch.setattr(client, "cached_source", lambda: broken)
    with client.one_worker():
        client.begin_worker()
        for quants in (["Q8_0"], ["F16"]):
            with pytest.raises((OlpackError, RuntimeError), match="conver"):
                check_export(write_model(tmp_path / quants[0]), quants)


def test_a_llama_cpp_that_computes_on_a_gpu_has_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not _has_gpu()
    monkeypatch.setattr(engine.llama_cpp, "llama_supports_gpu_offload", lambda: True)
    assert _has_gpu()
