"""A GGUF in parts holds what the whole file holds, and llama.cpp loads it by its first part."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

import gguf
import pytest
from tiny_models import converter, write_model

from olpack.deploy import Package
from olpack.deploy.bundle import bundle
from olpack.deploy.hub import push_to_hub
from olpack.deploy.register import TagFile, check_request
from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.job import partial_path

LIMIT = 400_000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def test_the_parts_hold_what_the_whole_file_holds(model, tmp_path):
    import llama_cpp

    targets = [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("Q4_K_M", "Q8_0")]
    whole = converter().export(model, targets)
    content = {file.quant: file.path.read_bytes() for file in whole}
    for path in (file.path for file in whole):
        path.unlink()
    split = converter().export(model, targets, split=LIMIT)
    for file in split:
        names = [part.path.name for part in file.parts]
        assert len(names) > 1
        assert names == [f"{file.quant}-{number:05d}-of-{len(names):05d}.gguf" for number in range(1, len(names) + 1)]
        assert file.path == file.parts[0].path
        assert sum(part.size for part in file.parts) == file.size
        readers = []
        for number, part in enumerate(file.parts):
            data = part.path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (part.size, part.sha256)
            assert len(data) <= LIMIT
            readers.append(gguf.GGUFReader(part.path))
            keys = {key: field.contents() for key, field in readers[-1].fields.items() if key.startswith("split.")}
            assert keys["split.no"] == number
            assert keys["split.count"] == len(names)
        (tmp_path / "whole.gguf").write_bytes(content[file.quant])
        expected = gguf.GGUFReader(tmp_path / "whole.gguf")
        assert keys["split.tensors.count"] == len(expected.tensors)
        ours = [(tensor.name, tensor.tensor_type, tensor.data.tobytes()) for reader in readers for tensor in reader.tensors]
        assert ours == [(tensor.name, tensor.tensor_type, tensor.data.tobytes()) for tensor in expected.tensors]
        assert [key for key in readers[0].fields if "split" not in key] == list(expected.fields)

        loaded = llama_cpp.llama_model_load_from_file(os.fsencode(file.path), llama_cpp.llama_model_default_params())
        assert loaded
        assert llama_cpp.llama_model_n_params(loaded) == file.parameters
        llama_cpp.llama_model_free(loaded)
        # llama.cpp's quantizer reads all parts, and copies them into the whole file.
        params = llama_cpp.llama_model_quantize_default_params()
        params.only_copy = True
        copy = tmp_path / "copy.gguf"
        assert llama_cpp.llama_model_quantize(os.fsencode(file.path), os.fsencode(copy), ctypes.byref(params)) == 0
        assert [tensor.data.tobytes() for tensor in gguf.GGUFReader(copy).tensors] == [tensor.data.tobytes() for tensor in expected.tensors]


def test_a_file_that_is_small_enough_stays_whole(model, tmp_path):
    (file,) = converter().export(model, [Target("Q4_0", tmp_path / "model.gguf")], split=1 << 30)
    assert (file.path, file.parts) == (tmp_path / "model.gguf", [])
    assert list(tmp_path.iterdir()) == [file.path]


def test_parts_smaller_than_a_tensor_are_refused(model, tmp_path):
    with pytest.raises(OlpackError, match=r"The F16 file cannot be split into parts of 100.0 kB: 'token_embd.weight' needs"):
        converter().export(model, [Target("F16", tmp_path / "model.gguf")], split=100_000)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_split_export_left_is_removed_by_the_next(model, tmp_path):
    left = partial_path(tmp_path / "model.gguf", 2**22 + 1)  # no process has such a number
    left.mkdir()
    (left / "model-00001-of-00002.gguf").touch()
    converter().export(model, [Target("Q8_0", tmp_path / "model.gguf")], split=LIMIT)
    assert not left.exists()


@pytest.mark.parametrize(
    "give",
    [
        lambda parts, package, folder: check_request("model", parts, package, None),
        lambda parts, package, folder: bundle("model", parts, [], [], folder / "model.zip"),
        lambda parts, package, folder: push_to_hub("me/model", parts, [], package, "# Card\n"),
    ],
    ids=["server", "bundle", "hub"],
)
def test_ollama_is_not_given_a_part(give, tmp_path):
    part = TagFile("q8_0", tmp_path / "model-q8_0-00001-of-00002.gguf")
    with pytest.raises(OlpackError, match=r"one part of a GGUF in several files, and a tag is registered from one\. Export it unsplit"):
        give([part], Package(parameters={"num_ctx": 128}), tmp_path)
    assert list(tmp_path.iterdir()) == []
