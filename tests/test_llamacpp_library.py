"""The typed layer over llama.cpp's libraries, and the probe that finds a library that crashes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from olpack.errors import OlpackError
from olpack.llamacpp.library import library_folder, quantize_rows, row_size, tensor_type
from olpack.llamacpp.probe import check_library
from olpack.quants import QUANT_TYPES, quant_type


@pytest.mark.parametrize(
    ("name", "tag", "ftype"),
    [
        ("Q4_0", "q4_0", 2),
        ("Q4_K_M", "q4_K_M", 15),
        ("q5_k_m", "q5_K_M", 17),
        ("q8_0", "q8_0", 7),
        ("Q6_K", "q6_K", 18),
        ("f16", "f16", 1),
        ("BF16", "bf16", 32),
        ("iq4_xs", "iq4_xs", 30),
        ("Q4_K", "q4_K_M", 15),
        ("F32", "f32", 0),
    ],
)
def test_quant_types_have_llama_cpps_number_and_ollamas_tag(name, tag, ftype):
    found = quant_type(name)
    assert (found.tag, found.ftype) == (tag, ftype)
    assert quant_type(found.tag) is found


def test_the_numbers_are_those_of_llama_h():
    import llama_cpp

    for quant in QUANT_TYPES.values():
        name = "LLAMA_FTYPE_ALL_F32" if quant.name == "F32" else f"LLAMA_FTYPE_MOSTLY_{quant.name}"
        assert getattr(llama_cpp, name) == quant.ftype


def test_an_unknown_quant_type_is_answered_with_the_nearest():
    with pytest.raises(OlpackError, match=r"no quant type 'q4km'. Did you mean Q4_K_M\? llama.cpp has: F32, F16, BF16, Q4_0"):
        quant_type("q4km")


@pytest.mark.parametrize(("name", "bits", "error"), [("q4_0", 4.5, 0.1), ("q4_K", 4.5, 0.1), ("q8_0", 8.5, 0.01), ("bf16", 16, 0.01), ("f32", 32, 0)])
def test_rows_are_quantized_as_gguf_reads_them(name, bits, error):
    import gguf

    type_ = tensor_type(name)
    rows = np.random.default_rng(0).standard_normal((8, 512), np.float32)
    out = np.empty((8, row_size(type_, 512)), np.uint8)
    assert out.nbytes * 8 == rows.size * bits
    assert quantize_rows(type_, rows, out)
    back = gguf.quants.dequantize(out.view(np.float32) if name == "f32" else out, gguf.GGMLQuantizationType(type_))
    assert np.sqrt(np.mean((back - rows) ** 2)) <= error


def test_rows_beyond_the_range_of_a_type_are_noticed():
    type_ = tensor_type("q4_0")
    rows = np.full((1, 256), 1e30, np.float32)
    assert not quantize_rows(type_, rows, np.empty((1, row_size(type_, 256)), np.uint8))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "olpack"


def test_a_library_that_runs_is_remembered(empty_cache, monkeypatch):
    check_library()
    (record,) = empty_cache.glob("llama.cpp-runs-*")
    assert record.name.startswith("llama.cpp-runs-")
    monkeypatch.setattr(sys, "executable", "/no/such/python")  # a second probe could not even start
    check_library()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\).*-DGGML_NATIVE=OFF"),
        ("raise OSError('libgomp.so.1: cannot open shared object file')", "libgomp.so.1: cannot open shared object file"),
    ],
)
def test_a_library_that_crashes_is_explained_and_not_remembered(empty_cache, tmp_path, monkeypatch, code, reason):
    """The child that runs the model takes a `llama_cpp` that fails as a wrongly built one does."""
    package = tmp_path / "packages" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    with pytest.raises(OlpackError, match=reason):
        check_library()
    assert not empty_cache.exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(OlpackError, match="library is not installed"):
        library_folder()
