"""Our files are llama.cpp's files, byte for byte."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, converter, write_adapter, write_model, write_sentencepiece

from olpack.export import Target
from olpack.llamacpp.vocabulary import Vocabulary

QUANTS = ["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0", "F16"]
MODELS = {
    "qwen3-tied": ("qwen3", {"tied": True}),
    "qwen2-untied-sharded": ("qwen2", {"tied": False, "shard": "300KB"}),
    "llama-odd-rows-float32": ("llama", {"tied": False, "dtype": "float32", "hidden_size": 192, "intermediate_size": 288}),
    "qwen3-experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
    "gemma3-sentencepiece": ("gemma3_text", {"bos_token_id": 1, "eos_token_id": 2}),
    "gemma2-sentencepiece": ("gemma2", {"bos_token_id": 1, "eos_token_id": 2}),
    "mistral-untied-sentencepiece": ("mistral", {"tied": False, "bos_token_id": 1, "eos_token_id": 2}),
    "phi-untied-sentencepiece": ("phi3", {"tied": False, "bos_token_id": 1, "eos_token_id": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {name: write_model(root / name, kind, **settings) for name, (kind, settings) in MODELS.items()}
    for name in (name for name in made if name.endswith("sentencepiece")):
        write_sentencepiece(made[name])
    return made


@pytest.fixture(scope="module")
def usual(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("usual")
    script = Path(__file__).with_name("usual_way.py")
    subprocess.run(
        [sys.executable, script, "--out", out, "--quants", ",".join(QUANTS), *models.values()],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )
    return out


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_the_converter_and_the_quantizer(name, models, usual, tmp_path):
    plan = converter().check(models[name], QUANTS)
    files = converter().export(models[name], [Target(quant.lower(), tmp_path / f"{quant}.gguf") for quant in QUANTS], round_to_bf16="float32" in name)
    assert [file.quant for file in files] == QUANTS
    for file in files:
        data = file.path.read_bytes()
        assert data == (usual / name / f"{file.quant}.gguf").read_bytes(), file.quant
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.size == plan.sizes[file.quant]
        assert file.parameters == plan.parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{quant}.gguf" for quant in QUANTS)


@pytest.mark.parametrize("name", ["qwen3-experts", "gemma3-sentencepiece"])
def test_a_gguf_in_16_bits_is_quantized_as_llama_cpp_does(name, usual, tmp_path):
    files = converter().export(usual / name / "BF16-intermediate.gguf", [Target(quant, tmp_path / f"{quant}.gguf") for quant in QUANTS])
    for file in files:
        assert file.path.read_bytes() == (usual / name / f"{file.quant}.gguf").read_bytes(), file.quant


def test_without_rounding_float32_stays_exact(models, tmp_path):
    source = models["llama-odd-rows-float32"]
    (exact,) = converter().export(source, [Target("F32", tmp_path / "exact.gguf")])
    (rounded,) = converter().export(source, [Target("F32", tmp_path / "rounded.gguf")], round_to_bf16=True)
    assert exact.sha256 != rounded.sha256
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(exact.path).tensors}
    assert np.array_equal(written["token_embd.weight"], load_file(source / "model.safetensors")["model.embed_tokens.weight"])


def test_a_model_with_fewer_files_gives_the_same_file(models, tmp_path):
    source = models["qwen3-tied"]
    together = converter().export(source, [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("Q4_K_S", "Q4_K_M")])
    (alone,) = converter().export(source, [Target("Q4_K_M", tmp_path / "alone.gguf")], threads=1)
    assert together[1].sha256 == alone.sha256


def test_rows_that_do_not_fit_are_announced(models):
    plan = converter().check(models["llama-odd-rows-float32"], ["Q4_K_M", "Q8_0"])
    assert len(plan.warnings) == 1
    assert "everywhere: token_embd.weight (192 columns, q4_K needs a multiple of 256) becomes q5_0, and 12 more tensors." in plan.warnings[0]


def test_the_header_says_what_was_asked_and_llama_cpp_would_copy_the_file_as_it_is(models, tmp_path):
    import llama_cpp

    adapter = write_adapter(tmp_path / "adapter", models["qwen3-tied"])
    template = "{# ours #}" + CHAT_TEMPLATE
    (file,) = converter().export(
        models["qwen3-tied"],
        [Target("Q4_K_M", tmp_path / "model.gguf")],
        adapter=adapter,
        name="coding-assistant",
        chat_template=template,
        end_of_turn="<|im_end|>",
        metadata={"olpack.version": "0.1.0", "general.license": "apache-2.0"},
    )
    with Vocabulary(file.path) as header:
        assert header.key("general.name") == "coding-assistant"
        assert header.key("tokenizer.chat_template") == template
        assert header.key("general.file_type") == "15"
        assert header.key("tokenizer.ggml.eos_token_id") == "0"
        assert header.key("tokenizer.ggml.eot_token_id") == "2"
        assert header.key("qwen3.context_length") == "256"
        assert header.key("olpack.version") == "0.1.0"
        assert header.key("general.license") == "apache-2.0"
        assert header.key("no.such.key") is None

    params = llama_cpp.llama_model_quantize_default_params()
    params.only_copy = True
    copy = tmp_path / "copy.gguf"
    assert llama_cpp.llama_model_quantize(str(file.path).encode(), str(copy).encode(), ctypes.byref(params)) == 0
    assert copy.read_bytes() == file.path.read_bytes()
