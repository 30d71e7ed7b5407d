"""`train.target_modules`: names, `all-linear`, or a regular expression for full names."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_model

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train.adapter import adapter_config, experts_left_out, target_names
from olpack.train.checks import check_training


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base("tiny", write_model(tmp_path_factory.mktemp("targets") / "base", num_hidden_layers=3))


@pytest.mark.parametrize(
    "expression",
    [
        r"model\.layers\.[01]\.self_attn\.(q|v)_proj",
        r".*\.(q|v)_proj",
        r".*self_attn\.\w_proj",
        r"model\.layers\.2\.mlp\..*_proj",
        ".*_proj",
    ],
)
def test_an_expression_takes_what_peft_takes_by_it(base, expression):
    """unslothai/unsloth-zoo#807, huggingface/peft#3129"""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def layers(targets: str | list[str]) -> list[str]:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        return sorted(name for name, module in adapted.named_modules() if hasattr(module, "lora_A"))

    settings = Train(target_modules=expression)
    check_training(base, settings, on_gpu=False)
    assert layers(list(adapter_config(base, settings).target_modules)) == layers(expression) != []


@pytest.mark.parametrize("asked", ["q_proj", "self_attn.q_proj", ["q_proj"]])
def test_a_name_is_still_a_name(base, asked):
    assert target_names(MetaModel(base.config, base.label), asked) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            r"model\.layers\.9\..*",
            "is the expression 'model\\.layers\\.9\\..*', which matches the full name of no linear layer of tiny. Full names are "
            "like 'model.layers.0.self_attn.q_proj', and all of one must match",
        ),
        (r"(q|v)_proj", "matches the full name of no linear layer of tiny"),  # matches an end, which peft does not take
        (r"model.layers.(q_proj", "which is neither the name of a layer nor a regular expression"),
        ("q_porj", "`train.target_modules` names 'q_porj', which is no linear layer"),
    ],
)
def test_what_matches_nothing_is_refused(base, asked, reason):
    with pytest.raises(OlpackError) as error:
        check_training(base, Train(target_modules=asked), on_gpu=False)
    assert reason in str(error.value)


def test_experts_that_get_no_adapter_are_named(base, tmp_path):
    """huggingface/peft#3232"""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    moe = Base("moe", write_model(tmp_path / "moe", "qwen3_moe", tied=False, moe_intermediate_size=256, **experts))
    said = experts_left_out(moe, Train())
    assert "The adapter is on" in said and "q_proj" in said and "The experts of moe" in said and "stay as they are" in said
    assert experts_left_out(base, Train()) is None
