"""The compiled K-quants are ggml's, bit for bit, and where they would not be they are not used."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from olpack.llamacpp import kquants, library

TYPES = ("q4_K", "q5_K", "q6_K")


def by_ggml(type_: int, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    out = np.zeros((len(rows), library.row_size(type_, rows.shape[1])), np.uint8)
    weights = importance.ctypes.data if importance is not None else None
    library.ggml().ggml_quantize_chunk(type_, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    return out


def kinds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    normal = random.standard_normal((63, 1280))
    zeroed = normal.copy()
    zeroed[:, :64] = 0
    zeroed[3] = 0
    equal = normal.copy()
    equal[:, 32:64] = 0.5
    equal[5] = -1
    return {
        "normal": normal * 0.02,
        "large": normal * 1e25,
        "largest": normal * 5e37,
        "tiny": normal * 1e-30,
        "subnormal": normal * 1e-40,
        "heavy tails": random.standard_t(2, normal.shape),
        "blocks of zeros": zeroed,
        "blocks of one value": equal,
        "far from zero": normal * 1e-3 + 1000,
        "far below zero": normal * 1e-3 - 1000,
        "above zero": np.abs(normal),
        "bfloat16": (normal * 0.02).astype(np.float32).view(np.uint32) & 0xFFFF0000,
        "whole numbers": np.round(normal * 4),
        "many scales": normal * np.exp(random.uniform(-30, 30, normal.shape)),
        "an odd number of blocks": normal[:1, :256],
    }


@pytest.mark.parametrize("kind", kinds())
def test_the_bits_are_ggmls(kind):
    rows = kinds()[kind]
    rows = np.ascontiguousarray(rows.view(np.float32) if rows.dtype == np.uint32 else rows.astype(np.float32))
    random = np.random.default_rng(8)
    heavy = (random.standard_normal(rows.shape[1]) ** 4 * (random.random(rows.shape[1]) < 0.9)).astype(np.float32)
    for importance in (None, np.ones(rows.shape[1], np.float32), heavy):
        for name in TYPES:
            type_ = library.tensor_type(name)
            expected = by_ggml(type_, rows, importance)
            out = np.zeros_like(expected)
            library.quantize_rows(type_, rows, out, importance)
            assert np.array_equal(out, expected), (name, importance is not None)


def test_it_is_compiled_once_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kquants.compiled()
    assert first.parent == tmp_path / "olpack"
    made = first.stat().st_mtime_ns
    assert kquants.compiled() == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert kquants.quantizer(library.ggml()) is not None


@pytest.mark.parametrize("change", ["a flipped bit", "writable by others", "a link"])
def test_a_library_that_is_not_as_it_was_compiled_is_compiled_again(tmp_path, monkeypatch, change, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kquants.compiled()
    made = first.read_bytes()
    if change == "a flipped bit":
        first.write_bytes(made[:5000] + bytes([made[5000] ^ 1]) + made[5001:])
    elif change == "writable by others":
        first.chmod(0o666)
    else:
        first.rename(tmp_path / "elsewhere")
        first.symlink_to(tmp_path / "elsewhere")
    again = kquants.compiled()
    assert again.read_bytes() == made and not again.is_symlink() and again.stat().st_mode & 0o777 == 0o600
    assert f"{first} is damaged, or others can write to it: it is compiled again" in capsys.readouterr().err


def test_bits_that_are_not_ggmls_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The very licence that the compiler must not have: sums in any order.
    monkeypatch.setattr(kquants, "_FLAGS", (*kquants._FLAGS, "-ffast-math"))
    assert kquants.compiled() is not None
    assert kquants.quantizer(library.ggml()) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_ggml_does_the_work(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if compiler == "no-such-compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert kquants.quantizer(ctypes.CDLL(None)) is None
    library._compiled_quantizer.cache_clear()
    try:
        rows = np.random.default_rng(0).standard_normal((4, 512), np.float32)
        out = np.empty((4, library.row_size(12, 512)), np.uint8)
        assert library.quantize_rows(12, rows, out)
        assert np.array_equal(out, by_ggml(12, rows, None))
    finally:
        library._compiled_quantizer.cache_clear()
