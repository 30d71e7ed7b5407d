"""`rounding: search` writes blocks that ggml and gguf read, and none with a larger error than ggml's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from olpack.errors import OlpackError
from olpack.llamacpp import library, rounding

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K")
BLOCK = {name: 256 if name.endswith("K") else 32 for name in TYPES}


def rows_of(kind: str) -> np.ndarray:
    random = np.random.default_rng(11)
    normal = random.standard_normal((33, 768)) * 0.02
    equal = normal.copy()
    equal[:, 32:64] = 0.5
    equal[3] = -1
    zeroed = normal.copy()
    zeroed[:, :64] = 0
    zeroed[5] = 0
    kinds = {
        "normal": normal,
        "heavy tails": random.standard_t(2, normal.shape),
        "one value": equal,
        "zeros": zeroed,
        "above zero": np.abs(normal),
        "far from zero": normal + 100,
        "tiny": normal * 1e-30,
        "subnormal": normal * 1e-40,
        "large": normal * 1e5,
        "an odd number of blocks": normal[:1, :256],
    }
    return np.ascontiguousarray(kinds[kind], np.float32)


KINDS = ("normal", "heavy tails", "one value", "zeros", "above zero", "far from zero", "tiny", "subnormal", "large", "an odd number of blocks")


def importances(columns: int) -> list[np.ndarray | None]:
    random = np.random.default_rng(12)
    uneven = np.exp(2 * random.standard_normal(columns))
    holes = np.where(random.random(columns) < 0.3, 0, uneven)
    return [None, *(one.astype(np.float32) for one in (uneven, holes, np.zeros(columns), uneven * 1e-25))]


def quantized(name: str, rows: np.ndarray, importance: np.ndarray | None, *, search: bool) -> np.ndarray:
    out = np.zeros((len(rows), library.row_size(library.tensor_type(name), rows.shape[1])), np.uint8)
    assert library.quantize_rows(library.tensor_type(name), rows, out, importance, search=search)
    return out


def errors(name: str, rows: np.ndarray, packed: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Weighted squared error of each block."""
    values = np.empty_like(rows)
    library.dequantize_rows(library.tensor_type(name), packed, values)
    blocks = rows.reshape(-1, BLOCK[name])
    if importance is None or name == "q8_0":
        weights = np.sqrt((blocks**2).mean(axis=1, keepdims=True) + blocks**2, dtype=np.float64)
    else:
        weights = np.broadcast_to(importance.astype(np.float64), rows.shape).reshape(blocks.shape)
    return (weights * (blocks.astype(np.float64) - values.reshape(blocks.shape)) ** 2).sum(axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_has_a_larger_error_than_ggmls(kind):
    rows = rows_of(kind)
    for importance in importances(rows.shape[1]):
        for name in TYPES:
            found, ggmls = (errors(name, rows, quantized(name, rows, importance, search=search), importance) for search in (True, False))
            assert (found <= ggmls * (1 + 1e-5)).all(), (name, importance is not None)
            if kind == "normal" and (importance is None or importance.any()):
                assert found.sum() < 0.99 * ggmls.sum(), (name, found.sum() / ggmls.sum())


@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_are_ordinary_and_the_same_each_time(name):
    rows = rows_of("normal")
    first = quantized(name, rows, None, search=True)
    assert np.array_equal(first, quantized(name, rows, None, search=True))
    # A row's bytes do not depend on the rows around it, so threads may cut a tensor anywhere.
    assert np.array_equal(first[7:8], quantized(name, rows[7:8].copy(), None, search=True))
    values = np.empty_like(rows)
    library.dequantize_rows(library.tensor_type(name), first, values)
    assert np.array_equal(values, dequantize(first, GGMLQuantizationType(library.tensor_type(name))))
    assert np.sqrt(np.mean((values - rows) ** 2)) < 0.4 * rows.std()


def least_error(x: np.ndarray, w: np.ndarray, levels: np.ndarray) -> float:
    """Of all scales: between two at which some code changes the codes are the same, and the least-squares scale is the best for them."""
    middles = (levels[1:] + levels[:-1]) / 2
    turns = np.unique(np.concatenate([(x[:, None] / middles[middles != 0]).ravel(), [0]]))
    between = np.concatenate([[2 * turns[0]], (turns[1:] + turns[:-1]) / 2, [2 * turns[-1]]])
    codes = levels[np.abs(x[None, :, None] / between[:, None, None] - levels).argmin(axis=2)]
    qx, qq = (w * x * codes).sum(axis=1), (w * codes**2).sum(axis=1)
    return float(((w * x**2).sum() - qx**2 / np.maximum(qq, 1e-300)).min())


@pytest.mark.parametrize(("name", "low", "high"), [("q4_0", -8, 7), ("q5_0", -16, 15)])
def test_one_scale_is_nearly_the_best_of_all(name, low, high):
    rows = rows_of("normal")[:2, :640].copy()
    importance = importances(640)[1]
    found = errors(name, rows, quantized(name, rows, importance, search=True), importance)
    best = [
        least_error(*pair, np.arange(low, high + 1.0))
        for pair in zip(rows.reshape(-1, 32).astype(float), np.tile(importance, 2).reshape(-1, 32).astype(float), strict=True)
    ]
    assert sum(best) <= found.sum() < 1.01 * sum(best)


def test_types_without_a_search_are_ggmls():
    rows = rows_of("normal")
    importance = importances(rows.shape[1])[1]
    for name in ("iq4_xs", "tq1_0", "f16", "bf16"):
        assert np.array_equal(quantized(name, rows, importance, search=True), quantized(name, rows, importance, search=False))


def test_without_a_compiler_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OlpackError, match="no C\\+\\+ compiler") as refused:
        rounding.searcher(ctypes.CDLL(None))
    assert "set rounding to ggml" in refused.value.remedy
