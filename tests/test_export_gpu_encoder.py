"""The GPU encoder's kernels make ggml's bits, compiled for a CPU here; the export uses them, and goes on without them when they fail."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulated_gpu import Encoder, Kernels
from test_llamacpp_kquants import by_ggml, kinds
from tiny_models import write_model

from olpack.export import run
from olpack.llamacpp import gpu_encoder, kquants, library, nvrtc
from olpack.workspace import file_digest

TINY_CODER = Path(__file__).parents[1] / "olpack" / "assets" / "tiny-coder"

# Exports as the worker does, with the kernels compiled for the CPU in place of a GPU's, and prints what it was by.
EXPORT = """
import sys
from pathlib import Path
from olpack.export.converter import use_converter
from olpack.llamacpp.source import converter_source
use_converter(converter_source())
from emulated_gpu import Encoder
from olpack.export import run
from olpack.llamacpp import gpu_encoder
source, out, failing, *quants = sys.argv[1:]
gpu_encoder.start = lambda: Encoder(fail_after=3 if failing == "failing" else None) if failing != "without" else None
run.GPU_FROM = 0
gpu = run.begin_gpu_encoder(source, {})
files = run.export(source, [(quant, str(Path(out, quant))) for quant in quants], {"threads": 3}, lambda count, total: None, gpu)
print(files[0].encoder)
"""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def as_floats(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.view(np.float32) if rows.dtype == np.uint32 else rows.astype(np.float32))


@pytest.mark.parametrize("kind", [*kinds(), "all kinds of one file"])
def test_the_bits_are_ggmls(kernels, kind):
    rows = kquants.sample_rows() if kind == "all kinds of one file" else as_floats(kinds()[kind])
    random = np.random.default_rng(8)
    heavy = (random.standard_normal(rows.shape[1]) ** 4 * (random.random(rows.shape[1]) < 0.9)).astype(np.float32)
    for importance in (None, np.ones(rows.shape[1], np.float32), heavy):
        for type_ in gpu_encoder.RECIPES:
            expected = by_ggml(type_, rows, importance)
            out = np.zeros_like(expected)
            left = kernels.run(type_, rows, out, importance)
            made = left == 0  # the blocks that the kernels made themselves
            assert np.array_equal(out.reshape(len(left), -1)[made], expected.reshape(len(left), -1)[made]), (type_, importance is not None)
            assert made.all() or kind not in ("normal", "bfloat16", "heavy tails", "an odd number of blocks")
            gpu_encoder.finish(type_, rows, out, left, importance)
            assert np.array_equal(out, expected), (type_, importance is not None)


def test_the_bits_of_a_models_weights_are_ggmls(kernels):
    from safetensors.torch import load_file

    compared = 0
    for name, tensor in load_file(TINY_CODER / "model.safetensors").items():
        if tensor.ndim == 2 and tensor.shape[1] % 256 == 0:
            rows = tensor[:256].float().numpy()
            for type_ in gpu_encoder.RECIPES:
                out = np.zeros_like(expected := by_ggml(type_, rows, None))
                gpu_encoder.finish(type_, rows, out, kernels.run(type_, rows, out, None), None)
                assert np.array_equal(out, expected), (name, type_)
                compared += 1
    assert compared


def test_the_export_makes_the_same_files(tmp_path):
    quants = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q8_0", "BF16")  # Q3_K stays with the CPU
    model = write_model(tmp_path / "model", num_hidden_layers=4)
    found = {}
    for way in ("without", "with", "failing"):
        out = tmp_path / way
        out.mkdir()
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        child = subprocess.run(
            [sys.executable, "-c", EXPORT, model, out, way, *quants],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        found[way] = [file_digest(out / quant) for quant in quants], child.stdout.strip()
    files, used = zip(*found.values(), strict=True)
    assert files[0] == files[1] == files[2]
    assert used == ("CPU", "a GPU", "a GPU, then the CPU: out of memory")


def test_a_gpu_starts_for_large_models_by_ggmls_rounding_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_encoder, "start", lambda: "an encoder")
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    (tmp_path / "of a download that ended early.safetensors").symlink_to(tmp_path / "gone")
    assert run.begin_gpu_encoder(str(tmp_path), {}) is None
    monkeypatch.setattr(run, "GPU_FROM", 64)
    for options in ({}, {"rounding": "ggml"}):
        assert run.begin_gpu_encoder(str(tmp_path), options).result() == "an encoder"
    for rounding in ("search", "learned"):
        assert run.begin_gpu_encoder(str(tmp_path), {"rounding": rounding}) is None


def test_without_a_gpu_there_is_no_encoder(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_encoder.start() is None


def test_a_gpu_that_fails_is_not_used(monkeypatch):
    import torch

    def fail() -> None:
        raise nvrtc.CudaError("NVRTC was not found")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_encoder, "GpuEncoder", fail)
    assert gpu_encoder.start() is None


def test_other_bits_than_ggmls_are_not_used(monkeypatch):
    import torch

    class Wrong:
        def quantize_type(self, type_, rows, out, importance):
            library.quantize_rows(type_, rows, out, importance)
            out.reshape(-1)[-1] ^= type_ == 14

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_encoder, "GpuEncoder", Wrong)
    assert gpu_encoder.start() is None
    monkeypatch.setattr(Wrong, "quantize_type", lambda self, *arguments: library.quantize_rows(*arguments))
    assert isinstance(gpu_encoder.start(), Wrong)


def test_the_comparison_with_ggml_prints_nothing(kernels, capfd):
    assert kquants.agrees(Encoder().quantize_type, library.ggml(), gpu_encoder.RECIPES)
    assert capfd.readouterr() == ("", "")


def test_without_nvrtc_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(nvrtc.CudaError, match="NVRTC was not found"):
        nvrtc.compile_cubin(Path(gpu_encoder.__file__).with_name("gpu_blocks.cpp"), "sm_90", "0.0")
