"""Small models of each architecture whose GGUF files are bases, and the logits of such a file in olpack and in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_models import write_fast_sentencepiece, write_model, write_sentencepiece

if TYPE_CHECKING:
    import numpy as np

    from olpack.model.gguf_base import GgufBase

QUANTS = ["F16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.5,
    "short_factor": [1 + n / 10 for n in range(16)],
    "long_factor": [2 + n for n in range(16)],
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"tied": False, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
}
MODELS = {
    "llama": ("llama", {"tied": False, "rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sentencepiece": ("mistral", {"tied": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tied": False, "rope_parameters": YARN}),
    "gemma2-sentencepiece": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 64}),
    "gemma3-sentencepiece": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 64,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma4-sentencepiece": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 16,
            "global_head_dim": 128,
            "hidden_size_per_layer_input": 64,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-experts-sentencepiece": (
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "global_head_dim": 128,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 256,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3-sentencepiece": (
        "phi3",
        {
            "tied": False,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_theta": 10000.0, "original_max_position_embeddings": 512, **LONG},
        },
    ),
    "starcoder2": ("starcoder2", {}),
    "nemotron-sentencepiece": ("nemotron", {"tied": False, "partial_rotary_factor": 0.5}),
    "qwen2moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen3moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen35": ("qwen3_5_text", {**LINEAR, "linear_num_key_heads": 4}),
    "qwen35-values": ("qwen3_5_text", LINEAR),
    "qwen35moe": ("qwen3_5_moe_text", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 256}),
    "gpt-oss": ("gpt_oss", {"tied": False, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "attention_bias": True}),
    "gemma-sentencepiece": ("gemma", {"head_dim": 64}),
    "llama with experts": ("mixtral", {"tied": False, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625}),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
        },
    ),
    "olmo2": ("olmo2", {"tied": False}),
    "olmo2 with windows": (
        "olmo3",
        {
            "tied": False,
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "command-r": ("cohere", {"logit_scale": 0.0625, "model_max_length": 256}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "num_hidden_layers": 4, "sliding_window": 16, "rotary_pct": 1.0}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", {"tied": False, "use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "phi2": (
        "phi",
        {"tied": False, "num_key_value_heads": 4, "intermediate_size": 1024, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "exaone4": ("exaone4", {"tied": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed_oss": ("seed_oss", {"tied": False}),
    "ernie4_5-sentencepiece": ("ernie4_5", {}),
    "mistral3-sentencepiece": ("mistral", {"tied": False}),
    "mistral3 with yarn": (
        "ministral3",
        {
            "tied": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
        },
    ),
    "olmoe": ("olmoe", {**EXPERTS, "num_key_value_heads": 4}),
    "lfm2moe": (
        "lfm2_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
}
ROUTERS = tuple(f"{name}.weight" for name in ("router", "router.proj", "mlp.gate", "block_sparse_moe.gate", "router.layer", "feed_forward.gate"))
IDS = [(7 * place * place + 3 * place) % 340 for place in range(48)]


def make(folder: Path, name: str) -> Path:
    """A model of the table whose vectors differ from their defaults, and whose matrices are large enough for attention to matter."""
    kind, settings = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("sentencepiece"):
        import sentencepiece

        write_sentencepiece(folder / "vocabulary")
        size = sentencepiece.SentencePieceProcessor(str(folder / "vocabulary/tokenizer.model")).get_piece_size()
        if kind == "gemma4_text":  # of which the converter reads tokenizer.json
            size = write_fast_sentencepiece(folder / "vocabulary", [])
            settings = {**settings, "vocab_size_per_layer_input": size}
        settings = {**settings, "vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    source = write_model(folder / "model", kind, dtype="float32", **settings)
    if name.endswith("sentencepiece"):
        write_sentencepiece(source)
        if kind == "gemma4_text":
            write_fast_sentencepiece(source, [])
    if name == "mistral3-sentencepiece":  # of which the text model alone is converted
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["Mistral3ForConditionalGeneration"]}))
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    torch.manual_seed(3)
    for name, weight in weights.items():
        if weight.ndim < 2:
            weight.add_(0.2 * torch.randn_like(weight))
            if kind == "gemma4_text" and name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.mul_(0.35)  # its scores are not scaled otherwise, and large ones make much of a rounded cache
        elif "embed" not in name and ".linear_attn." not in name:  # whose state sums up what rounding changes
            weight.mul_(32 if name.endswith(ROUTERS) else 4)  # scores of experts far apart, so that few tokens change theirs by rounding
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


def has_experts(name: str) -> bool:
    """Whether a model of the table has experts, of which a rounded input can choose another one."""
    return "moe" in name or "experts" in name or name == "gpt-oss"


def ours(base: GgufBase) -> np.ndarray:
    """Logits in training's forward pass, float64 [tokens, vocabulary]."""
    import torch

    from olpack.train.gguf_model import load_frozen

    with torch.no_grad():
        return load_frozen(base, torch.device("cpu"), torch.float32)(torch.tensor([IDS])).logits[0].double().numpy()


def llama_cpps(file: Path) -> np.ndarray:
    """Logits in llama.cpp, float64 [tokens, vocabulary]."""
    import numpy as np

    from olpack.llamacpp.engine import Engine

    with Engine(file, context=len(IDS) + 1, threads=1) as engine:
        return np.stack([logits.copy() for _, logits in engine.scored([*IDS, 0], [True] * (len(IDS) + 1))])
