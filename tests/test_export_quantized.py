"""Quantized bases: exported, they are what the dequantized model is, also with an adapter; what cannot be read is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from quantized_bases import BITSANDBYTES, BY_HAND, write_quantized
from tiny_models import converter, write_adapter, write_model

from olpack.errors import OlpackError
from olpack.export import Target
from olpack.export.lora import export_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base", tied=False, intermediate_size=320)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A quantized base and the model in float32 that it stands for. The folders have one name, because it becomes `general.name`."""
    root = tmp_path_factory.mktemp("quantized")

    def folders(name: str) -> tuple[Path, Path]:
        quantized, plain = root / name / "quantized" / "base", root / name / "plain" / "base"
        if not plain.exists():
            write_quantized(name, base, quantized, plain)
        return quantized, plain

    return folders


@pytest.mark.parametrize("name", [*BY_HAND, *BITSANDBYTES])
def test_the_files_are_those_of_the_dequantized_model(name, pair, adapter, base, tmp_path):
    quantized, plain = pair(name)
    quants = ("F32", "Q8_0")

    def digests(source: Path, merged: Path | None) -> list[str]:
        files = converter().export(source, [Target(quant, tmp_path / quant) for quant in quants], adapter=merged)
        return [file.sha256 for file in files]

    assert digests(quantized, None) == digests(plain, None) != digests(base, None)
    assert digests(quantized, adapter) == digests(plain, adapter) != digests(plain, None)
    assert converter().check(quantized, quants, adapter=adapter).sizes == converter().check(plain, quants, adapter=adapter).sizes


def test_the_adapter_alone_does_without_the_weights_of_the_base(pair, adapter, tmp_path):
    quantized, plain = pair("nf4-double")
    assert export_adapter(quantized, adapter, tmp_path / "a.gguf") == export_adapter(plain, adapter, tmp_path / "b.gguf")


def test_an_adapter_for_a_wider_base_is_refused_by_the_dequantized_shape(pair, tmp_path):
    wider = write_adapter(tmp_path / "adapter", write_model(tmp_path / "wider", hidden_size=512), target_modules=["q_proj"])
    for name in ("gptq-4", "compressed-4", "nf4"):
        assert (
            "is for another base: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' makes [256, 512], and the base has "
            "[256, 256] there" in refused(pair(name)[0], wider)
        )


def refused(source: Path, adapter: Path | None = None) -> str:
    with pytest.raises(OlpackError) as error:
        converter().check(source, ["Q8_0"], adapter=adapter)
    assert error.value.remedy
    return str(error.value)


def settle(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {**config.get("quantization_config", {}), **settings}}))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("vptq", "is quantized by VPTQ, vectors from codebooks"),
        (
            "auto-round",
            "which has several packings of its own, and cannot be dequantized here. Export it from AutoRound again in the format auto_gptq.",
        ),
        ("of-tomorrow", "is quantized by 'of-tomorrow', which llama.cpp's converter does not know. Take the original model in 16 bits"),
    ],
)
def test_what_nobody_here_can_read_is_refused(method, reason, base, tmp_path):
    source = Path(shutil.copytree(base, tmp_path / "base"))
    settle(source, quant_method=method)
    assert reason in refused(source)


def weights(**settings: object) -> dict:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, **settings}}}}


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gptq-4", {"bits": 3}, "is GPTQ in 3 bits, and llama.cpp's converter dequantizes 2, 4 and 8 bits. Take the original model"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "is GPTQ in the layout 'marlin'"),
        ("awq", {"version": "gemv"}, "is AWQ in 4 bits and the layout 'gemv'; 4 bits in the layout gemm are read."),
        ("gptq-4", {"bits": 8}, "packs 'model.layers.0.mlp.down_proj.qweight' otherwise than 8 bits into int32"),
        ("compressed-4", weights(strategy="channel", group_size=None), "as pack-quantized with one scale per channel, which"),
        ("compressed-4", weights(type="float"), "as pack-quantized with group_size 64 and type float"),
        ("compressed-4", {"config_groups": {"a": {}, "b": {}}}, "as pack-quantized with 2 groups of settings"),
        ("compressed-4", {"transform_config": {"config_groups": {"u": {}}}}, "as pack-quantized with rotated weights (transform_config)"),
        ("compressed-int8", weights(num_bits=8, strategy="tensor", group_size=None), "as int-quantized with one scale per tensor"),
    ],
)
def test_a_form_that_the_converter_does_not_take_is_refused(name, settings, reason, pair, tmp_path):
    source = Path(shutil.copytree(pair(name)[0], tmp_path / "base"))
    settle(source, **settings)
    assert reason in refused(source)


@pytest.mark.parametrize(
    ("name", "lost", "reason"),
    [
        ("gptq-4", "mlp.down_proj.g_idx", "has 'model.layers.0.mlp.down_proj.qweight' and no 'model.layers.0.mlp.down_proj.g_idx'"),
        ("compressed-4", "mlp.down_proj.weight_scale", "has 'model.layers.0.mlp.down_proj.weight_packed' without its scale or its shape"),
        ("nf4", "mlp.down_proj.weight.absmax", "bitsandbytes__nf4' without its weight or its scales"),
    ],
)
def test_a_quantized_weight_that_is_not_whole_is_named(name, lost, reason, pair, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(pair(name)[0], tmp_path / "base"))
    tensors = load_file(source / "model.safetensors")
    del tensors[f"model.layers.0.{lost}"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert reason in refused(source)
