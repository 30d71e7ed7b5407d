"""LoRA on stacked experts (peft's target_parameters) is merged as peft merges it, whichever version of peft made it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gguf_tensors import tensors
from safetensors.torch import load_file, save_file
from test_export_adapter import change_config, refused
from tiny_models import converter, write_model

from olpack.export import Target

EXPERTS = {"tied": False, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write_base(folder: Path, middle: int) -> Path:
    return write_model(folder, "qwen3_moe", dtype="float32", moe_intermediate_size=middle, **EXPERTS)


def write_expert_adapter(base: Path, folder: Path, targets: list[str], **settings: object) -> dict[str, torch.Tensor]:
    """An adapter on experts; the weights that peft merges it to."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "target_parameters": targets, **settings})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def assert_merged(base: Path, adapter: Path, merged: dict[str, torch.Tensor], out: Path) -> None:
    (file,) = converter().export(base, [Target("F32", out / "model.gguf")], adapter=adapter)
    found = tensors(file.path)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up = merged[f"{experts}.gate_up_proj"].chunk(2, dim=1)
        wanted = {"gate": gate, "up": up, "down": merged[f"{experts}.down_proj"]}
        for name, value in wanted.items():
            torch.testing.assert_close(found[f"blk.{layer}.ffn_{name}_exps.weight"], value, atol=1e-6, rtol=0)
        value = merged[f"model.layers.{layer}.self_attn.v_proj.weight"]
        torch.testing.assert_close(found[f"blk.{layer}.attn_v.weight"], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("middle", [256, 128])  # with 128 the side of gate_up is 256 both ways, with 256 that of down
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": BOTH},
        {"targets": BOTH[:1]},
        {"targets": BOTH[1:], "use_rslora": True},
        {"targets": BOTH, "rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    ],
)
def test_experts_are_merged_as_peft_merges_them(tmp_path, middle, settings):
    """huggingface/peft#3009, vllm-project/vllm#41384"""
    base = write_base(tmp_path / "base", middle)
    merged = write_expert_adapter(base, tmp_path / "adapter", **settings)
    assert_merged(base, tmp_path / "adapter", merged, tmp_path)


def turned(adapter: Path) -> None:
    """The same change as peft wrote it up to 0.18, where A has the side that is B's now: B @ A is transposed."""
    file, rank = adapter / "adapter_model.safetensors", 4
    weights = load_file(file)
    for a in [key for key in weights if re.search(r"experts\.(base_layer\.)?lora_A", key)]:
        b = a.replace("lora_A", "lora_B")
        # (experts, rank, in) and (out, rank, experts)
        of_a = weights[a].reshape(-1, rank, weights[a].shape[-1])
        of_b = weights[b].reshape(weights[b].shape[0], rank, -1)
        weights[a] = of_b.permute(2, 1, 0).reshape(-1, of_b.shape[0]).contiguous()
        weights[b] = of_a.permute(2, 1, 0).reshape(of_a.shape[2], -1).contiguous()
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("middle", [256, 128, 512])
def test_the_sides_of_older_versions_are_turned(tmp_path, middle):
    """NVIDIA-NeMo/Automodel#3592"""
    base = write_base(tmp_path / "base", middle)
    merged = write_expert_adapter(base, tmp_path / "adapter", BOTH)
    turned(tmp_path / "adapter")
    change_config(tmp_path / "adapter", peft_version="0.18.1")
    assert_merged(base, tmp_path / "adapter", merged, tmp_path)
    change_config(tmp_path / "adapter", peft_version=None)
    if middle == 512:  # the shapes tell
        assert_merged(base, tmp_path / "adapter", merged, tmp_path)
    else:
        assert "does not name the version of peft that made it (peft_version)" in refused(base, tmp_path / "adapter")


def test_experts_that_are_stored_the_other_way_round_are_merged(tmp_path):
    """gpt-oss holds [experts, in, out], and its second matrix is square."""
    base = write_model(
        tmp_path / "base",
        "gpt_oss",
        dtype="float32",
        tied=False,
        intermediate_size=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=128,
    )
    merged = write_expert_adapter(base, tmp_path / "adapter", BOTH)
    (file,) = converter().export(base, [Target("F32", tmp_path / "model.gguf")], adapter=tmp_path / "adapter")
    found = tensors(file.path)
    down = merged["model.layers.0.mlp.experts.down_proj"].transpose(1, 2)
    torch.testing.assert_close(found["blk.0.ffn_down_exps.weight"], down, atol=1e-6, rtol=0)
    gate = merged["model.layers.0.mlp.experts.gate_up_proj"].transpose(1, 2)[:, ::2]
    torch.testing.assert_close(found["blk.0.ffn_gate_exps.weight"], gate, atol=1e-6, rtol=0)


def test_experts_of_another_base_are_refused(tmp_path):
    base, wider = write_base(tmp_path / "base", 256), write_base(tmp_path / "wider", 512)
    write_expert_adapter(wider, tmp_path / "adapter", BOTH)
    assert "is for another base: its experts' matrices" in refused(base, tmp_path / "adapter")
    dense = write_model(tmp_path / "dense", dtype="float32")
    assert "is for another base" in refused(dense, tmp_path / "adapter")
