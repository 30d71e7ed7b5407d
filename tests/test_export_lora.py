"""The adapter by itself: llama.cpp's own bytes, scaled as peft scales, and the same model with it as with the merge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import converter, write_adapter, write_model

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.lora import check_adapter, export_adapter
from olpack.llamacpp.engine import Engine
from olpack.llamacpp.source import converter_source


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", dtype="float32")


def logits(gguf: Path, adapter: Path | None = None) -> np.ndarray:
    ids = list(range(20, 60))
    with Engine(gguf, 64, 1, adapter=adapter) as engine:
        return engine.logprobs(ids, [True] * len(ids))


def test_it_is_the_converters(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model)
    size, digest = export_adapter(model, adapter, tmp_path / "ours.gguf")
    command = [
        sys.executable,
        converter_source() / "convert_lora_to_gguf.py",
        "--base",
        model,
        "--outtype",
        "f16",
        "--outfile",
        tmp_path / "theirs.gguf",
        adapter,
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert size == (tmp_path / "ours.gguf").stat().st_size and len(digest) == 64
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}],
    ids=["lora", "rslora", "patterns"],
)
def test_applied_it_is_the_merge(model, tmp_path, settings):
    adapter = write_adapter(tmp_path / "adapter", model, **settings)
    converter().export(model, [Target("F32", tmp_path / "base.gguf")])
    converter().export(model, [Target("F32", tmp_path / "merged.gguf")], adapter=adapter)
    export_adapter(model, adapter, tmp_path / "adapter.gguf")
    base, merged = logits(tmp_path / "base.gguf"), logits(tmp_path / "merged.gguf")
    assert np.abs(merged - base).max() > 0.1
    assert np.abs(merged - logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf")).max() < 5e-3


def test_tensors_trained_as_a_whole_are_refused(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model, modules_to_save=["input_layernorm"])
    with pytest.raises(OlpackError, match="replaces 'model.layers.0.input_layernorm.weight' as a whole.*package: merged"):
        export_adapter(model, adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_dora_is_refused(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", model, use_dora=True)
    with pytest.raises(OlpackError, match="is a DoRA, which scales the base's weights.*package: merged"):
        export_adapter(model, adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_for_another_base_is_refused_by_the_engine(model, tmp_path):
    export_adapter(model, write_adapter(tmp_path / "adapter", model), tmp_path / "adapter.gguf")
    other = write_model(tmp_path / "other", hidden_size=128, num_attention_heads=2)
    converter().export(other, [Target("Q8_0", tmp_path / "other.gguf")])
    with pytest.raises(OlpackError, match="cannot apply .*adapter.gguf"):
        Engine(tmp_path / "other.gguf", 64, 1, adapter=tmp_path / "adapter.gguf")


def test_the_check_before_training(tmp_path, model):
    shapes = {"model.layers.0.self_attn.q_proj": (256, 256), "model.layers.1.mlp.down_proj": (256, 512)}
    check_adapter(model, shapes)
    with pytest.raises(OlpackError, match="is for another base"):
        check_adapter(model, {"model.layers.0.self_attn.q_proj": (64, 64)})
