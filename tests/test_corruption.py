"""A bit that a disk flips in what a build keeps is found before the file is used, with the file's time and size as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from olpack.compare.cache import Cache
from olpack.stages import records
from olpack.stages.records import Step
from olpack.workspace import BuildPaths


def flip(path: Path, place: int) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "importance.gguf", "sensitivity.json", "compare/results.json"])
def test_a_flipped_bit_in_an_output_makes_its_step_stale_and_names_the_file(tmp_path, name):
    paths, output = BuildPaths("a", tmp_path), tmp_path / name
    output.parent.mkdir(exist_ok=True)
    output.write_bytes(bytes(5000))
    records.finish(paths, Step("train", "train", {"a": 1}, "new"), [output], {"adapter_digest": "0" * 64})
    assert records.damage(paths, "train", records.read(paths, "train")) == ""
    flip(output, 3000)
    assert records.damage(paths, "train", records.read(paths, "train")) == f"{output} was changed"


def test_a_flipped_bit_in_a_measured_figure_has_it_measured_again(tmp_path, capsys):
    cache, key, figures = Cache(tmp_path), {"a": 1}, {"losses": (1.25, 2.5), "text": "é"}
    cache.store("q4_K_M", "perplexity", key, figures)
    assert cache.load("q4_K_M", "perplexity", key) == {"losses": [1.25, 2.5], "text": "é"}
    (file,) = tmp_path.iterdir()
    flip(file, file.read_bytes().index(b"1.25"))
    assert cache.load("q4_K_M", "perplexity", key) is None
    assert f"{file} is damaged: perplexity is measured again" in capsys.readouterr().err
    cache.store("q4_K_M", "perplexity", key, figures)
    flip(file, file.read_bytes().index(b"digest"))
    assert cache.load("q4_K_M", "perplexity", key) is None
    assert f"{file} is damaged: perplexity is measured again" in capsys.readouterr().err


def test_a_figure_of_an_earlier_version_has_no_digest_and_is_used(tmp_path):
    cache, key = Cache(tmp_path), {"a": 1}
    cache.store("q4_K_M", "perplexity", key, {"losses": [1.25]})
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    begin, end = text.index('"digest"'), text.index('"data"')
    file.write_text(text[:begin] + text[end:])
    assert cache.load("q4_K_M", "perplexity", key) == {"losses": [1.25]}
