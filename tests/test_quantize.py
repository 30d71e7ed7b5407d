"""`olpack quantize`: a folder or a GGUF to quants without a recipe, through the command line."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import oracle
import pytest
from tiny_models import converter, write_adapter, write_model

from olpack import progress
from olpack.errors import OlpackError
from olpack.export import Target
from olpack.quants import bytes_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "parrot")


def olpack(folder: Path, *words: object) -> tuple[int, str, str]:
    """`olpack quantize` in this process; (exit code, stdout, stderr)."""
    return oracle.olpack(folder, "quantize", *map(str, words))


def test_a_folder_becomes_a_file_for_each_quant(model, tmp_path):
    code, printed, message = olpack(tmp_path, model, "--quant", "q4_k_m", "--quant", "Q8_0", "--quant", "Q8_0")
    assert code == 0, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parrot-Q4_K_M.gguf", "parrot-Q8_0.gguf"]
    (expected,) = converter().export(model, [Target("Q4_K_M", tmp_path / "expected.gguf")])
    assert (tmp_path / "parrot-Q4_K_M.gguf").read_bytes() == expected.path.read_bytes()
    row = next(line for line in printed.splitlines() if "Q4_K_M" in line)
    assert row.split() == ["Q4_K_M", *progress.quantity(expected.size, "B").split(), f"{expected.bits_per_weight:.2f}", "parrot-Q4_K_M.gguf"]


def test_a_gguf_and_the_folder_it_came_from_become_the_same_file(model, tmp_path):
    assert olpack(tmp_path, model, "--quant", "BF16", "--name", "bird")[0] == 0
    code, printed, message = olpack(tmp_path, "bird-BF16.gguf", "--quant", "Q5_K_M", "--out", "made", "--json")
    assert code == 0, message
    (row,) = json.loads(printed)
    assert row["path"] == str(tmp_path / "made/bird-BF16-Q5_K_M.gguf")
    assert olpack(tmp_path, model, "--quant", "Q5_K_M", "--name", "bird")[0] == 0
    assert (tmp_path / "bird-Q5_K_M.gguf").read_bytes() == (tmp_path / "made/bird-BF16-Q5_K_M.gguf").read_bytes()
    assert row["quant"] == "Q5_K_M" and row["size"] == (tmp_path / "bird-Q5_K_M.gguf").stat().st_size and row["parts"] == []


def test_an_adapter_is_merged_on_the_way(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    assert olpack(tmp_path, model, "--quant", "Q8_0", "--adapter", adapter)[0] == 0
    (expected,) = converter().export(model, [Target("Q8_0", tmp_path / "expected.gguf")], adapter=adapter)
    assert (tmp_path / "parrot-Q8_0.gguf").read_bytes() == expected.path.read_bytes()


def test_searched_scales_change_weights_only(model, tmp_path):
    import gguf
    import llama_cpp
    import numpy as np

    written = {}
    for words in (["--quant", "F32"], ["--quant", "Q4_K_M", "--quant", "Q4_0"], ["--quant", "Q4_K_M", "--quant", "Q4_0", "--rounding", "search"]):
        folder = tmp_path / words[-1]
        code, _, message = olpack(tmp_path, model, *words, "--out", folder)
        assert code == 0, message
        written |= {(words[-1] == "search", path.stem.removeprefix("parrot-")): path for path in folder.iterdir()}
    exact = {one.name: one.data for one in gguf.GGUFReader(written[False, "F32"]).tensors}
    for quant in ("Q4_K_M", "Q4_0"):
        ggmls, found = (gguf.GGUFReader(written[search, quant]) for search in (False, True))
        start = ggmls.tensors[0].data_offset
        ggmls_bytes, found_bytes = (written[search, quant].read_bytes() for search in (False, True))
        assert ggmls_bytes[:start] == found_bytes[:start] and len(ggmls_bytes) == len(found_bytes)
        for theirs, ours in zip(ggmls.tensors, found.tensors, strict=True):
            if theirs.tensor_type == gguf.GGMLQuantizationType.F32:
                assert np.array_equal(theirs.data, ours.data)
                continue
            errors = [np.square(gguf.dequantize(one.data, one.tensor_type) - exact[one.name]).sum() for one in (theirs, ours)]
            assert errors[1] < errors[0], ours.name
        # llama.cpp reads the blocks, and leaves them as they are.
        params = llama_cpp.llama_model_quantize_default_params()
        params.only_copy = True
        copy = tmp_path / f"copy-{quant}.gguf"
        assert llama_cpp.llama_model_quantize(str(written[True, quant]).encode(), str(copy).encode(), ctypes.byref(params)) == 0
        assert copy.read_bytes() == found_bytes


def test_a_split_file_is_listed_part_by_part(model, tmp_path):
    code, printed, message = olpack(tmp_path, model, "--quant", "F16", "--split", "0.7MB")
    assert code == 0, message
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert len(parts) > 1 and all("-of-" in name for name in parts)
    assert [line.split()[-1] for line in printed.splitlines() if "-of-" in line] == [*parts]


def test_a_package_that_ships_is_a_source(tmp_path):
    assert olpack(tmp_path, "builtin/tiny-coder", "--quant", "Q4_0")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-coder-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{model}", "--quant", "Q4_KM"], "There is no quant type 'Q4_KM'. Did you mean Q4_K_M?"),
        (["{model}/nowhere", "--quant", "Q4_0"], "There is no folder"),
        (["{quantized}", "--quant", "Q4_0"], "is quantized already: 'token_embd.weight' is Q6_K"),
        (["{toothless}", "--quant", "Q4_0"], "has no tokenizer"),
        (["{whole}", "--quant", "Q4_0", "--adapter", "{model}"], "is no adapter: it has no adapter_config.json"),
        (["{model}", "--quant", "Q4_0", "--adapter", "{model}"], "is no adapter: it has no adapter_config.json"),
        (["{model}", "--quant", "Q4_0", "--split", "big"], "'big' is no size. Write it like 4GB or 500MB."),
        (["{model}", "--quant", "Q4_0", "--name", "a/b"], "'a/b' cannot be a file's name."),
        (["{whole}", "--quant", "F16", "--name", "whole", "--out", "{sources}"], "would be replaced by what is made from it"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(model, sources, tmp_path, words, reason):
    folder = tmp_path / "work"
    folder.mkdir()
    before = {path: path.read_bytes() for path in sources.glob("*.gguf")}
    places = {
        "model": model,
        "sources": sources,
        "quantized": sources / "quantized.gguf",
        "whole": sources / "whole-F16.gguf",
        "toothless": sources / "toothless",
    }
    code, printed, message = olpack(folder, *(word.format(**places) for word in words))
    assert code == 1
    assert reason in message
    assert printed == ""
    assert list(folder.iterdir()) == []
    assert before == {path: path.read_bytes() for path in sources.glob("*.gguf")}


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    converter().export(model, [Target("Q4_0", folder / "quantized.gguf"), Target("F16", folder / "whole-F16.gguf")])
    toothless = write_model(folder / "toothless")
    for file in toothless.glob("tokenizer*"):
        file.unlink()
    return folder


def test_without_a_quant_the_words_are_off(model, tmp_path):
    assert olpack(tmp_path, model)[0] == 2


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("1.5G", 15 * 10**8), ("123456", 123456)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 XB", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OlpackError, match="is no size"):
        bytes_of(text)


def test_quants_that_fall_back_or_agree_are_named(tmp_path):
    """ggml-org/llama.cpp#28474: rows of 64 fit no K-quant."""
    narrow = write_model(tmp_path / "narrow", hidden_size=64, intermediate_size=160, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    code, printed, message = olpack(tmp_path, narrow, "--quant", "Q4_K_M", "--quant", "Q6_K", "--quant", "Q8_0", "--json")
    assert code == 0, message
    assert "Q4_K_M does not fit this model's shapes everywhere:" in " ".join(message.split())
    assert "Q6_K and Q8_0 have the same type for every tensor of this model: one of them is enough." in " ".join(message.split())
    by_quant = {row["quant"]: row for row in json.loads(printed)}
    assert by_quant["Q6_K"]["types"] == by_quant["Q8_0"]["types"] != by_quant["Q4_K_M"]["types"]
    assert not any(warning.startswith("Q8_0") for warning in by_quant["Q8_0"]["warnings"])


def test_nothing_is_said_where_every_type_fits(model, tmp_path):
    code, _, message = olpack(tmp_path, model, "--quant", "Q4_K_M", "--quant", "Q8_0")
    assert code == 0 and "does not fit" not in message and "same type" not in message
