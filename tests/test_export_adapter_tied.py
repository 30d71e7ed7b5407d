"""Adapters that change embedding, output layer or vocabulary: the file has the matrices that training computed with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_tensors import tensors
from test_export_adapter import change_config, refused
from tiny_models import converter, write_adapter, write_model

from olpack.export import Target


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    return {tied: write_model(tmp_path_factory.mktemp("bases") / f"tied-{tied}", dtype="float32", tied=tied) for tied in (True, False)}


def trained(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and output layer as the model computes with the adapter on it, not merged. (peft's merge adds both to a shared matrix.)"""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        embedding = model.get_input_embeddings()(torch.arange(512))
        return embedding, model.get_output_embeddings()(torch.eye(256)).T


def exported(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    (file,) = converter().export(base, [Target("F32", out / "model.gguf")], adapter=adapter)
    return tensors(file.path)


V = ["v_proj"]
# settings of the adapter, and whether the output layer is a matrix of its own in the file
TIED = {
    "embedding as a whole": ({"target_modules": V, "modules_to_save": ["embed_tokens"]}, True),
    "head as a whole": ({"target_modules": V, "modules_to_save": ["lm_head"]}, True),
    "both": ({"target_modules": V, "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "both kept tied": ({"target_modules": V, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
    "LoRA on the head": ({"target_modules": [*V, "lm_head"]}, True),
    "LoRA on the embedding": ({"target_modules": [*V, "embed_tokens"]}, True),
    "LoRA on both": ({"target_modules": [*V, "embed_tokens", "lm_head"]}, True),
    "LoRA on both, kept tied": ({"target_modules": [*V, "embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
    "LoRA on the head, embedding as a whole": ({"target_modules": [*V, "lm_head"], "modules_to_save": ["embed_tokens"]}, True),
    "tokens": ({"target_modules": V, "trainable_token_indices": [1, 2]}, False),
    "other tokens of each": ({"target_modules": V, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}, True),
    "tokens of the head": ({"target_modules": V, "trainable_token_indices": {"lm_head": [3]}}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_base_parts_where_training_parted_it(bases, tmp_path, case):
    """huggingface/peft#2864, huggingface/transformers#45127"""
    settings, untied = TIED[case]
    adapter = write_adapter(tmp_path / "adapter", bases[True], **settings)
    embedding, head = trained(bases[True], adapter)
    found = exported(bases[True], adapter, tmp_path)
    assert ("output.weight" in found) == untied
    torch.testing.assert_close(found["token_embd.weight"], embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.get("output.weight", found["token_embd.weight"]), head, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [[1, 2], {"embed_tokens": [4], "lm_head": [3]}])
def test_single_tokens_of_an_untied_base_replace_rows(bases, tmp_path, tokens):
    """huggingface/peft#2399"""
    adapter = write_adapter(tmp_path / "adapter", bases[False], target_modules=V, trainable_token_indices=tokens)
    embedding, head = trained(bases[False], adapter)
    found = exported(bases[False], adapter, tmp_path)
    torch.testing.assert_close(found["token_embd.weight"], embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["output.weight"], head, atol=1e-6, rtol=0)


def test_tokens_that_the_configuration_does_not_name_are_refused(bases, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", bases[True], target_modules=V, trainable_token_indices=[1, 2])
    change_config(adapter, trainable_token_indices=[1])
    assert "contains 2 trained tokens of 'model.embed_tokens', and its configuration does not name as many" in refused(bases[True], adapter)
    change_config(adapter, trainable_token_indices=[1, 512])
    assert "trained token 512, and the base's embedding has 512 rows" in refused(bases[True], adapter)


def test_an_architecture_with_one_matrix_only_is_refused(tmp_path):
    """llama.cpp's Gemma has no output layer of its own."""
    base = write_model(tmp_path / "gemma", "gemma2", query_pre_attn_scalar=64, sliding_window=128)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=V, modules_to_save=["embed_tokens"])
    assert "with one matrix for both only. Train with ensure_weight_tying: true" in refused(base, adapter)


# -- a vocabulary that grew ---------------------------------------------------------------------------------------------------------------------


def add_tokens(base: Path, folder: Path, count: int) -> None:
    """The base's tokenizer with more tokens, beside an adapter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    size = len(tokenizer)
    tokenizer.add_tokens([f"<extra{index}>" for index in range(count)])
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == size + count


def grown(base: Path, folder: Path, rows: int, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter of a resized model; (its embedding, its output layer)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": V, **settings}))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.get_input_embeddings()(torch.arange(rows)), adapted.get_output_embeddings()(torch.eye(256)).T


GROWN = {
    "untied": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "untied, and a layer as a whole": (False, {"modules_to_save": ["embed_tokens", "lm_head", "o_proj"]}),
    "untied, not trained": (False, {}),
    "untied, single tokens": (False, {"trainable_token_indices": [510, 512]}),
    "untied, LoRA on both": (False, {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "tied, both apart": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, embedding alone": (True, {"modules_to_save": ["embed_tokens"]}),
    "tied, not trained": (True, {}),
    "tied, single tokens": (True, {"trainable_token_indices": [510, 512]}),
}


@pytest.mark.parametrize("case", GROWN)
def test_a_vocabulary_that_grew_comes_from_the_adapter(bases, tmp_path, case):
    """huggingface/peft#2415, ggml-org/llama.cpp#8445"""
    import gguf

    tied, settings = GROWN[case]
    base, rows = bases[tied], 515
    embedding, head = grown(base, tmp_path / "adapter", rows, **settings)
    add_tokens(base, tmp_path / "adapter", 3)
    found = exported(base, tmp_path / "adapter", tmp_path)
    torch.testing.assert_close(found["token_embd.weight"], embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.get("output.weight", found["token_embd.weight"]), head, atol=1e-6, rtol=0)
    tokens = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields["tokenizer.ggml.tokens"].contents()
    known = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == rows
    assert [token for token in tokens if token.startswith("<extra")] == ["<extra0>", "<extra1>", "<extra2>"]
    assert all(tokens[index] == text for text, index in known.items())


def test_a_grown_vocabulary_without_its_tokenizer_is_named_as_such(bases, tmp_path):
    grown(bases[False], tmp_path / "adapter", 515, modules_to_save=["embed_tokens", "lm_head"])
    message = refused(bases[False], tmp_path / "adapter")
    assert "grew by 3 tokens to 515, and there is no tokenizer beside it. Put the tokenizer" in message


def test_half_of_a_grown_vocabulary_is_named_as_such(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    grown(bases[False], tmp_path / "adapter", 515, modules_to_save=["embed_tokens", "lm_head"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    assert "has 515 rows for 'model.embed_tokens.weight', because its vocabulary was resized, and 'lm_head.weight' has 512" in refused(
        bases[False], tmp_path / "adapter"
    )


def test_new_tokens_in_spare_rows_come_from_the_adapters_tokenizer(tmp_path):
    import gguf

    base = write_model(tmp_path / "base", dtype="float32", vocab_size=520)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=V)
    add_tokens(base, adapter, 2)
    assert "token_embd.weight" in exported(base, adapter, tmp_path)
    tokens = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 520 and "<extra1>" in tokens


def test_tokens_without_rows_are_a_warning(bases, tmp_path):
    from tokenizers import Tokenizer

    rows, size = 512, Tokenizer.from_file(str(bases[True] / "tokenizer.json")).get_vocab_size()
    adapter = write_adapter(tmp_path / "adapter", bases[True], target_modules=V)
    add_tokens(bases[True], adapter, rows - size + 1)
    plan = converter().check(bases[True], ["Q8_0"], adapter=adapter)
    assert any("tokens that the base's lacks" in warning and "the file gets the base's tokenizer" in warning for warning in plan.warnings)
    shutil.rmtree(adapter)
