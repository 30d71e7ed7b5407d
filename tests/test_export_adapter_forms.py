"""Adapters as people have them: other names, other tools, settings that cannot be. Each is merged exactly, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_tensors import tensors
from safetensors.torch import load_file, save_file
from test_export_adapter import change_config, refused
from tiny_models import converter, write_adapter, write_model

from olpack.export import Target

V = "model.layers.0.self_attn.v_proj"
KEY = f"base_model.model.{V}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base", dtype="float32")


def write(folder: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    """An adapter's files, without peft."""
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def pair(key: str = KEY, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(key) + rank)
    return {f"{key}.lora_{side}.weight": torch.randn(size, generator=generator) * 0.1 for side, size in (("A", (rank, 256)), ("B", (128, rank)))}


def change(base: Path, adapter: Path, out: Path, layer: int = 0) -> torch.Tensor:
    """What the file adds to v_proj."""
    (file,) = converter().export(base, [Target("F32", out / "model.gguf")], adapter=adapter)
    return tensors(file.path)[f"blk.{layer}.attn_v.weight"] - load_file(base / "model.safetensors")[V.replace(".0.", f".{layer}.") + ".weight"]


def product(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = (next(value for key, value in weights.items() if f"lora_{side}" in key) for side in "AB")
    return b @ a


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        "base_model.model.layers.0.self_attn.v_proj",  # huggingface/peft#1579: trained on AutoModel
        "base_model.model.model.language_model.layers.0.self_attn.v_proj",  # unslothai/unsloth-zoo#1234: names of a model that sees
        "base_model.model.language_model.model.layers.0.self_attn.v_proj",
        f"base_model.model.{KEY}",  # ggml-org/llama.cpp#5610: wrapped twice
    ],
)
def test_other_names_of_the_same_module_are_merged(base, tmp_path, key):
    weights = pair(key)
    torch.testing.assert_close(change(base, write(tmp_path / "adapter", weights), tmp_path), 2 * product(weights), atol=1e-6, rtol=0)


def test_patterns_of_rank_and_alpha_are_expressions(base, tmp_path):
    """axolotl-ai-cloud/axolotl#3673"""
    first, second = pair(), pair(KEY.replace(".0.", ".1."), rank=8)
    adapter = write(
        tmp_path / "adapter", first | second, rank_pattern={r".*layers\.1\..*v_proj": 8}, alpha_pattern={r"^model\.layers\.1\.self_attn\.v_proj": 64}
    )
    torch.testing.assert_close(change(base, adapter, tmp_path, 1), 8 * product(second), atol=1e-5, rtol=0)
    torch.testing.assert_close(change(base, adapter, tmp_path, 0), 2 * product(first), atol=1e-6, rtol=0)


def test_rank_stabilized_scales_are_by_the_root(base, tmp_path):
    """sgl-project/sglang#40835"""
    weights = pair()
    found = change(base, write(tmp_path / "adapter", weights, use_rslora=True), tmp_path)
    torch.testing.assert_close(found, 4 * product(weights), atol=1e-6, rtol=0)


def test_dora_gives_rows_their_trained_norm(base, tmp_path):
    """huggingface/peft#3608"""
    weights = pair() | {f"{KEY}.lora_magnitude_vector": torch.rand(128) + 0.5}
    plain = load_file(base / "model.safetensors")[f"{V}.weight"]
    moved = plain + 2 * product(weights)
    wanted = weights[f"{KEY}.lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(change(base, write(tmp_path / "adapter", weights, use_dora=True), tmp_path), wanted - plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (pair(f"_orig_mod.{KEY}"), "it was saved from a model that torch.compile had wrapped"),  # huggingface/peft#2957
        (pair(f"base_model.model._orig_mod.{V}"), "it was saved from a model that torch.compile had wrapped"),
        (pair() | {f"{KEY}.lora_B.bias": torch.zeros(128)}, "lora_B.bias', which a plain LoRA merge would lose"),  # huggingface/peft#2486
        (pair() | {f"{KEY}.bias": torch.zeros(128)}, f"trained the bias '{V}.bias' (bias: all or lora_only), and the base has none there"),
        (pair() | {f"{KEY}.base_layer.bias": torch.zeros(128)}, f"trained the bias '{V}.bias'"),
    ],
)
def test_the_reason_is_the_right_one(base, tmp_path, weights, reason):
    assert reason in refused(base, write(tmp_path / "adapter", weights, bias="all"))


def test_an_adapter_without_numbers_is_refused(base, tmp_path):
    """getainode/ainode#186"""
    weights = pair()
    weights[f"{KEY}.lora_B.weight"].fill_(float("nan"))
    from olpack.errors import OlpackError

    with pytest.raises(OlpackError, match=r"'model\.layers\.0\.self_attn\.v_proj\.weight' has an infinite or undefined value"):
        converter().export(base, [Target("F32", tmp_path / "model.gguf")], adapter=write(tmp_path / "adapter", weights))
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapter_of_mlx_is_named_as_one(base, tmp_path, name):
    """ggml-org/llama.cpp#10551"""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{V}.lora_a": torch.zeros(256, 4), f"{V}.lora_b": torch.zeros(4, 128)}, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}))
    assert "is one of MLX" in refused(base, folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_alpha": "sixteen"}, 'its lora_alpha is "sixteen" and no number.'),
        ({"lora_alpha": None}, "its lora_alpha is null and no number."),
        ({"lora_alpha": True}, "its lora_alpha is true and no number."),
        ({"r": "4"}, 'its rank r is "4".'),
        ({"r": 0}, "its rank r is 0."),
        ({"rank_pattern": ["q_proj"]}, "its rank_pattern is no table of patterns and numbers."),
        ({"alpha_pattern": {"q_proj": "8"}}, "its alpha_pattern is no table of patterns and numbers."),
        ({"rank_pattern": {"q_proj(": 4}}, "'q_proj(' in its rank_pattern is no regular expression"),
        ({"alpha_pattern": {r"(.|..|...)+[!?]": 4}}, "Write it without nested repetitions."),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(base, tmp_path, settings, reason):
    message = refused(base, write(tmp_path / "adapter", pair(), **settings))
    assert reason in message and "\n" not in message


def test_a_configuration_without_alpha_or_nested_without_end_is_refused(base, tmp_path):
    adapter = write(tmp_path / "adapter", pair())
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "is no valid adapter configuration: it has no lora_alpha." in refused(base, adapter)
    (adapter / "adapter_config.json").write_text('{"a":' * 100_000)
    assert "cannot be read as JSON: it is nested too deep." in refused(base, adapter)


def test_tokens_that_were_not_saved_are_missed(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
    change_config(adapter, trainable_token_indices=[1, 2])
    assert "names single trained tokens, and its file contains none" in refused(base, adapter)
