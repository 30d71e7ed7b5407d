"""An adapter is merged as peft merges it, and one that cannot be merged so is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import converter, write_adapter, write_model

from olpack.errors import OlpackError
from olpack.export import Target

ADAPTERS = {
    "plain": ("qwen3", "float32", {}),
    "scaled-by-pattern": (
        "qwen3",
        "float32",
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 32}},
    ),
    "whole-modules": ("llama", "float32", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "embedding": ("llama", "float32", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "bfloat16": ("qwen2", "bfloat16", {}),
    "dora": ("qwen3", "float32", {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 8}}),
    "vera": ("qwen3", "float32", {"vera": True, "r": 16}),
    "vera-with-a-norm": ("qwen2", "float32", {"vera": True, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}),
    "dora-embedding": ("llama", "float32", {"use_dora": True, "target_modules": ["embed_tokens", "o_proj"]}),
}


def merge_with_peft(base: Path, adapter: Path, out: Path, dtype: str) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_files_are_those_of_the_checkpoint_that_peft_merges(name, tmp_path):
    kind, dtype, settings = ADAPTERS[name]
    base = write_model(tmp_path / "base", kind, dtype=dtype, tied=kind == "qwen3")
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    merged = merge_with_peft(base, adapter, tmp_path / "merged" / "base", dtype)  # the same folder name, because it becomes general.name
    quants = ["F32", "Q4_K_M"]
    rounded = dtype == "bfloat16"  # as the merged checkpoint was, when it was stored
    ours = converter().export(base, [Target(quant, tmp_path / "ours" / quant) for quant in quants], adapter=adapter, round_to_bf16=rounded)
    theirs = converter().export(merged, [Target(quant, tmp_path / "theirs" / quant) for quant in quants])
    plain = converter().export(base, [Target(quant, tmp_path / "plain" / quant) for quant in quants])
    assert [file.sha256 for file in ours] == [file.sha256 for file in theirs]
    assert ours[1].sha256 != plain[1].sha256


def test_the_merge_that_is_not_rounded_is_nearer_to_the_exact_weights(tmp_path):
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    base = write_model(tmp_path / "base", dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", base)
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    change = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    exact = weight + 2.0 * (change[name.format("B")].astype(np.float64) @ change[name.format("A")].astype(np.float64))

    def error(round_to_bf16: bool) -> float:
        (file,) = converter().export(base, [Target("F32", tmp_path / "model.gguf")], adapter=adapter, round_to_bf16=round_to_bf16)
        written = next(tensor.data for tensor in gguf.GGUFReader(file.path).tensors if tensor.name == "blk.0.ffn_up.weight")
        return float(np.abs(written - exact).max())

    assert error(round_to_bf16=False) < 1e-6 < error(round_to_bf16=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def adapter(base, tmp_path, request) -> Path:
    return write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])


def change_config(adapter: Path, **settings: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(base: Path, adapter: Path) -> str:
    with pytest.raises(OlpackError) as error:
        converter().check(base, ["Q8_0"], adapter=adapter)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3, and only LoRA and VeRA can be merged"),
        ({"use_dora": True}, "lacks the norms of DoRA for 'model.layers.0.self_attn.q_proj', and its configuration has use_dora: true"),
        ({"init_lora_weights": "olora"}, "began as 'olora', which also changes the base's weights. Merge it with peft where it was trained"),
        ({"lora_bias": True}, "uses biases in its B matrices (lora_bias)"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4', which also changes the base's weights"),
        ({"r": 16}, "has rank 4, and its configuration gives 16"),
        ({"trainable_token_indices": [1, 2]}, "names single trained tokens, and its file contains none"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused(base, adapter, settings, reason):
    change_config(adapter, **settings)
    assert reason in refused(base, adapter)


def test_an_adapter_for_another_base_is_refused(base, tmp_path):
    wider = write_model(tmp_path / "wider", hidden_size=512)
    message = refused(base, write_adapter(tmp_path / "adapter", wider, target_modules=["q_proj"]))
    assert "is for another base: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' makes [256, 512]" in message
    deeper = write_model(tmp_path / "deeper", num_hidden_layers=3)
    message = refused(base, write_adapter(tmp_path / "deep", deeper, target_modules=["q_proj"]))
    assert "it changes 'model.layers.2.self_attn.q_proj.weight', which the base does not have" in message


def test_a_vera_without_its_shared_matrices_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, vera=True, save_projection=False)
    assert "and no 'base_model.vera_A'. Save it with save_projection: true" in refused(base, adapter)


def test_half_an_adapter_is_refused(base, adapter):
    from safetensors.numpy import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    lone = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lone.replace("lora_B", "lora_A")}, file)
    assert f"has '{lone}' without its A matrix" in refused(base, adapter)


def test_a_folder_without_an_adapter_is_refused(base, tmp_path):
    assert "is no adapter: it has no adapter_config.json" in refused(base, tmp_path)
