"""What transformers calls the architectures, the settings and the tensors of a GGUF.

    config = config_of(base)       # the fields of a config.json
    weights_of(base, model)        # parameter of transformers' model -> the tensors of the file that it is made of

llama.cpp's converter renames tensors, and changes some: it permutes the rows of Llama's queries and keys for the other order of rotary pairs, adds
the 1 of Gemma's and Nemotron's norms, and splits stacks of experts. Here is the way back. Only architectures whose logits the tests compare with
llama.cpp's are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from olpack.errors import OlpackError
from olpack.model.checkpoint import TensorHeader
from olpack.model.gguf_base import GgufBase
from olpack.model.settings import check_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZED_AS = "gguf"  # the `quant_method` of its config
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_FOLDER = "Take the model's folder as base."
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp as transformers has it.

    Attributes:
        models: families that have it, in words.
        model_type, class_name: of transformers.
        settings: what its config has besides that of `_common`.
        permuted: whether the rows of queries and keys are.
        norm_offset: what the converter adds to the weights of norms.
    """

    models: str
    model_type: str
    class_name: str
    settings: Callable[[GgufBase], dict[str, Any]]
    permuted: bool = False
    norm_offset: float = 0


@dataclass(frozen=True)
class Weight:
    """A parameter of transformers' model, made of tensors of the file.

    Attributes:
        tensors: their names in the GGUF; two for the gates and the up projections of stacked experts, one else.
        heads: of the attention whose rows are permuted; 0: they are not.
        regrouped: (rows before them, heads of keys, rows of a head of values) of a linear attention whose heads of values stand in another order:
            the file has the first of each head of keys, then the second of each; transformers has all of the first head of keys first.
        offset: what the file's values have more.
        form: "plain"; "gate_up": two stacks, one after the other along the rows; "interleaved": two transposed stacks, column by column;
            "transposed": a stack of transposed matrices; "convolution": with an axis of one channel; "row": a matrix of one row; "columns": its
            columns are regrouped, not its rows; "logarithm": of the file's negative values.
    """

    tensors: tuple[str, ...]
    heads: int = 0
    regrouped: tuple[int, int, int] | None = None
    offset: float = 0
    form: Literal["plain", "gate_up", "interleaved", "transposed", "convolution", "row", "columns", "logarithm"] = "plain"

    @property
    def in_blocks(self) -> bool:
        """Whether the rows of the file are those of the parameter, in whatever order, so that it can stay in blocks."""
        return self.form == "plain" and not self.offset

    def shape(self, base: GgufBase) -> tuple[int, ...]:
        """Of the parameter."""
        first = base.tensors[self.tensors[0]].shape
        if self.form == "gate_up":
            return (first[0], 2 * first[1], *first[2:])
        if self.form == "interleaved":
            return (first[0], *first[2:], 2 * first[1])
        if self.form == "transposed":
            return (first[0], first[2], first[1])
        if self.form == "row":
            return (1, *first)
        return (first[0], 1, *first[1:]) if self.form == "convolution" else first

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of the file's weights or blocks, in the order of transformers."""
        import torch

        if self.heads:
            return values.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if not self.regrouped:
            return values
        before, heads, rows = self.regrouped
        return torch.cat((values[:before], values[before:].unflatten(0, (-1, heads, rows)).transpose(0, 1).flatten(0, 2)))

    def _rows_of_the_file(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        if self.heads:
            return values.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if not self.regrouped:
            return values
        before, heads, rows = self.regrouped
        return torch.cat((values[:before], values[before:].unflatten(0, (heads, -1, rows)).transpose(0, 1).flatten(0, 2)))

    def read(self, base: GgufBase, dtype: torch.dtype) -> torch.Tensor:
        """Its values in transformers' shape and order."""
        import torch

        exact = self.offset or self.form == "logarithm"
        first, *rest = (base.dequantized(tensor, torch.float32 if exact else dtype) for tensor in self.tensors)
        if self.form == "gate_up":
            return torch.cat((first, *rest), dim=1)
        if self.form == "interleaved":
            return torch.stack((first, *rest), dim=2).flatten(1, 2).transpose(1, -1).contiguous()
        if self.form == "transposed":
            return first.transpose(1, 2).contiguous()
        if self.form == "columns":
            return self.rows(first.T).T.contiguous()
        if self.form == "logarithm":
            return self.rows((-first).log()).to(dtype)
        if self.form in ("convolution", "row"):
            return self.rows(first).unsqueeze(int(self.form == "convolution"))
        return (first - self.offset).to(dtype) if self.offset else self.rows(first)

    def restore(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of the file, from values in transformers' shape and order."""
        if self.form == "gate_up":
            return dict(zip(self.tensors, values.chunk(2, dim=1), strict=True))
        if self.form == "interleaved":
            return dict(zip(self.tensors, values.transpose(1, -1).unflatten(1, (-1, 2)).unbind(2), strict=True))
        (name,) = self.tensors
        if self.form == "transposed":
            return {name: values.transpose(1, 2)}
        if self.form == "columns":
            return {name: self._rows_of_the_file(values.T).T}
        if self.form == "logarithm":
            return {name: -self._rows_of_the_file(values).exp()}
        if self.form in ("convolution", "row"):
            return {name: self._rows_of_the_file(values.squeeze(int(self.form == "convolution")))}
        return {name: values + self.offset if self.offset else self._rows_of_the_file(values)}


def config_of(base: GgufBase) -> dict[str, Any]:
    """The fields of a config.json. `quantization_config` has the `quant_method` "gguf" and the types of the matrices.

    Raises:
        OlpackError: an architecture that olpack does not train on from a GGUF, or a setting that is missing or no model has.
    """
    found = _architecture(base)
    config = {
        "architectures": [found.class_name],
        "model_type": found.model_type,
        **_common(base),
        **found.settings(base),
        "quantization_config": {"quant_method": QUANTIZED_AS, "types": list(base.types)},
    }
    check_config(config, str(base.paths[0]))
    return config


def _architecture(base: GgufBase) -> Architecture:
    name = _variant(base)
    if name not in ARCHITECTURES:
        raise OlpackError(
            f"'{base.paths[0]}' is of the architecture '{base.architecture}', on whose GGUF files olpack does not train.",
            f"Those that are verified are {', '.join(ARCHITECTURES)}; or take the model's folder as base.",
        )
    return ARCHITECTURES[name]


def _variant(base: GgufBase) -> str:
    """A key of ARCHITECTURES: llama.cpp has one architecture for some that are two in transformers."""
    if base.architecture == "llama" and base.integer("expert_count"):
        return "llama with experts"
    if base.architecture == "olmo2" and base.integer("attention.sliding_window"):
        return "olmo2 with windows"
    if base.architecture == "mistral3" and base.number("attention.temperature_scale"):
        return "mistral3 with yarn"
    return base.architecture


def _needed(base: GgufBase, key: str) -> int:
    """A positive integer among the keys of the architecture."""
    value = base.integer(key)
    if value is None or value < 1:
        raise OlpackError(
            f"'{base.paths[0]}' has {'no' if value is None else f'{value} as'} '{base.architecture}.{key}'.", "Download or make it again."
        )
    return value


def _tensor_shape(base: GgufBase, name: str) -> tuple[int, ...]:
    if name not in base.tensors:
        raise OlpackError(f"'{base.paths[0]}' lacks the tensor '{name}'.", "Download it again, or take the GGUF of a language model.")
    return base.tensors[name].shape


def _common(base: GgufBase) -> dict[str, Any]:
    heads = _needed(base, "attention.head_count")
    return {
        "vocab_size": _tensor_shape(base, _EMBEDDING)[0],
        "hidden_size": _needed(base, "embedding_length"),
        "intermediate_size": _most(base, "feed_forward_length"),
        "num_hidden_layers": _needed(base, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(base),
        "head_dim": head_dim(base),
        "max_position_embeddings": _needed(base, "context_length"),
        "tie_word_embeddings": _HEAD not in base.tensors,
        "rope_parameters": _rope(base),
        "bos_token_id": base.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": base.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": base.metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _kv_heads(base: GgufBase) -> int:
    return _most(base, "attention.head_count_kv") or _needed(base, "attention.head_count")


def _most(base: GgufBase, key: str) -> int | None:
    """An integer among the keys of the architecture; where each layer has its own, the largest."""
    of_layers = base.lists.get(f"{base.architecture}.{key}")
    return int(max(of_layers)) if of_layers else base.integer(key)


def head_dim(base: GgufBase) -> int:
    """Columns of a head's keys."""
    return base.integer("attention.key_length") or _needed(base, "embedding_length") // _needed(base, "attention.head_count")


def _rope(base: GgufBase) -> dict[str, Any]:
    """The rotary settings. Factors for single frequencies (Llama 3) are a tensor, which `rope_factors` reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base.number("rope.freq_base") or 10_000.0}
    rotated = base.integer("rope.dimension_count")
    if rotated and rotated != head_dim(base):
        rope["partial_rotary_factor"] = rotated / head_dim(base)
    kind, factor = base.metadata.get(f"{base.architecture}.rope.scaling.type"), base.number("rope.scaling.factor")
    if kind in (None, "none", "longrope") or not factor:
        return rope
    if kind not in ("linear", "yarn"):
        raise OlpackError(f"'{base.paths[0]}' scales rotary embeddings by '{kind}', which olpack does not read.", _FOLDER)
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": base.integer("rope.scaling.original_context_length"),
            "beta_fast": base.number("rope.scaling.yarn_beta_fast"),
            "beta_slow": base.number("rope.scaling.yarn_beta_slow"),
        }
    return {key: value for key, value in rope.items() if value is not None}


def rope_factors(base: GgufBase) -> torch.Tensor | None:
    """By what each inverse frequency of the rotary embedding is divided, float32 [pairs]; None where the file has no such factors, or its config
    has them."""
    if base.architecture == "gemma4":
        return None
    return base.dequantized(_ROPE_FACTORS[0]) if _ROPE_FACTORS[0] in base.tensors else None


# -- architectures --------------------------------------------------------------------------------------------------------------------------


def _epsilon(base: GgufBase, key: str = "layer_norm_rms_epsilon") -> float:
    value = base.number(f"attention.{key}")
    if value is None:
        raise OlpackError(f"'{base.paths[0]}' has no '{base.architecture}.attention.{key}'.", "Download or make it again.")
    return value


def _has(base: GgufBase, name: str) -> bool:
    return f"blk.0.{name}" in base.tensors


def _rms(base: GgufBase) -> dict[str, Any]:
    return {"rms_norm_eps": _epsilon(base)}


def _llama(base: GgufBase) -> dict[str, Any]:
    return {"rms_norm_eps": _epsilon(base), "attention_bias": _has(base, "attn_q.bias"), "mlp_bias": _has(base, "ffn_down.bias")}


def _qwen(base: GgufBase) -> dict[str, Any]:
    return {"rms_norm_eps": _epsilon(base), "attention_bias": _has(base, "attn_q.bias")}


def _gemma(base: GgufBase, pattern: int, scaled_by_width: int) -> dict[str, Any]:
    """Of Gemma 2 and 3: each `pattern`-th layer attends to the whole context. The largest of each generation, with so many layers, scales queries
    by the model's width instead of the head's."""
    layers, heads = _needed(base, "block_count"), _needed(base, "attention.head_count")
    window = base.integer("attention.sliding_window")
    kinds = ["sliding_attention" if window and (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    return {
        "rms_norm_eps": _epsilon(base),
        "query_pre_attn_scalar": _needed(base, "embedding_length") // heads if layers == scaled_by_width else head_dim(base),
        "sliding_window": window or None,
        "layer_types": kinds,
        "attn_logit_softcapping": base.number("attn_logit_softcapping"),
        "final_logit_softcapping": base.number("final_logit_softcapping"),
    }


def _chosen(base: GgufBase, name: str = "num_local_experts") -> dict[str, Any]:
    """The number of experts, and how many of them a token takes."""
    return {name: _needed(base, "expert_count"), "num_experts_per_tok": _needed(base, "expert_used_count")}


def _mixtral(base: GgufBase) -> dict[str, Any]:
    """llama.cpp attends to the whole context."""
    return {**_rms(base), **_chosen(base), "sliding_window": None}


def _granite(base: GgufBase) -> dict[str, Any]:
    """A scale that the file does not have, or has as 0, is llama.cpp's default."""
    return {
        **_llama(base),
        "attention_multiplier": base.number("attention.scale") or head_dim(base) ** -0.5,
        "embedding_multiplier": base.number("embedding_scale") or 1.0,
        "residual_multiplier": base.number("residual_scale") or 1.0,
        "logits_scaling": base.number("logit_scale") or 1.0,
    }


def _granite_moe(base: GgufBase) -> dict[str, Any]:
    return {**_granite(base), **_chosen(base)}


def _olmo2(base: GgufBase) -> dict[str, Any]:
    return {**_rms(base), "attention_bias": False}


def _windows(base: GgufBase, pattern: int) -> dict[str, Any]:
    """Layers with a window of the context, and each `pattern`-th with the whole, where the file does not name those of each kind."""
    layers, window = _needed(base, "block_count"), base.integer("attention.sliding_window")
    sliding = base.lists.get(f"{base.architecture}.attention.sliding_window_pattern") or [bool((layer + 1) % pattern) for layer in range(layers)]
    return {"sliding_window": window, "layer_types": ["sliding_attention" if window and one else "full_attention" for one in sliding]}


def _olmo3(base: GgufBase) -> dict[str, Any]:
    """Only the layers with the whole context scale their rotary embedding."""
    plain = {"rope_type": "default", "rope_theta": base.number("rope.freq_base") or 10_000.0}
    return {**_olmo2(base), **_windows(base, 4), "rope_parameters": {"full_attention": _rope(base), "sliding_attention": plain}}


def _cohere(base: GgufBase) -> dict[str, Any]:
    return {"layer_norm_eps": _epsilon(base, "layer_norm_epsilon"), "logit_scale": base.number("logit_scale") or 1.0}


def _cohere2(base: GgufBase) -> dict[str, Any]:
    return {**_cohere(base), **_windows(base, 4)}


def _smollm3(base: GgufBase) -> dict[str, Any]:
    """Each fourth layer has no rotary embedding, as llama.cpp's."""
    layers = _needed(base, "block_count")
    return {**_llama(base), "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)], "use_sliding_window": False}


def _stablelm(base: GgufBase) -> dict[str, Any]:
    return {
        "layer_norm_eps": _epsilon(base, "layer_norm_epsilon"),
        "use_qkv_bias": _has(base, "attn_q.bias"),
        "use_parallel_residual": not _has(base, "ffn_norm.weight"),
    }


def _phi2(base: GgufBase) -> dict[str, Any]:
    return {"layer_norm_eps": _epsilon(base, "layer_norm_epsilon")}


def _exaone4(base: GgufBase) -> dict[str, Any]:
    """llama.cpp attends to a window only in the 32B, by its number of layers."""
    layers = _needed(base, "block_count")
    if layers == 64:
        raise OlpackError(f"'{base.paths[0]}' is the EXAONE 4 of 64 layers, on whose GGUF files olpack does not train.", _FOLDER)
    return {**_rms(base), "sliding_window": None, "layer_types": ["full_attention"] * layers}


def _seed_oss(base: GgufBase) -> dict[str, Any]:
    biases = {"attention_bias": _has(base, "attn_q.bias"), "attention_out_bias": _has(base, "attn_output.bias"), "mlp_bias": False}
    return {**_rms(base), **biases, "attention_dropout": 0.0, "residual_dropout": 0.0}


def _ernie(base: GgufBase) -> dict[str, Any]:
    return {**_rms(base), "use_bias": _has(base, "attn_q.bias")}


def _mistral3(base: GgufBase) -> dict[str, Any]:
    return {**_rms(base), "sliding_window": None}


def _ministral3(base: GgufBase) -> dict[str, Any]:
    """Queries grow with the logarithm of their position beyond the original context."""
    even = {"mscale": base.number("rope.scaling.yarn_log_multiplier"), "mscale_all_dim": base.number("rope.scaling.yarn_log_multiplier")}
    return {**_mistral3(base), "rope_parameters": {**_rope(base), **even, "llama_4_scaling_beta": base.number("attention.temperature_scale")}}


def _olmoe(base: GgufBase) -> dict[str, Any]:
    return {**_olmo2(base), **_chosen(base, "num_experts"), "norm_topk_prob": False}


def _lfm2moe(base: GgufBase) -> dict[str, Any]:
    return {**_lfm2(base), **_experts(base), "num_dense_layers": base.integer("leading_dense_block_count") or 0, "norm_topk_prob": True}


def _gemma2(base: GgufBase) -> dict[str, Any]:
    return _gemma(base, 2, 46)


def _gemma3(base: GgufBase) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": base.number("rope.freq_base_swa") or 10_000.0}
    return {**_gemma(base, 6, 62), "rope_parameters": {"full_attention": _rope(base), "sliding_attention": local}}


def _gemma4(base: GgufBase) -> dict[str, Any]:
    """Its layers differ: those with the whole context have heads of their own size, of which the rotary embedding turns a part; the last ones use the
    keys and values of earlier ones; the feed-forward layers of these may be twice as wide."""
    layers, name = _needed(base, "block_count"), base.architecture
    pattern = base.lists.get(f"{name}.attention.sliding_window_pattern", ())
    kv_heads = base.lists.get(f"{name}.attention.head_count_kv") or (_kv_heads(base),) * layers
    widths = base.lists.get(f"{name}.feed_forward_length") or (_needed(base, "feed_forward_length"),)
    full = [layer for layer, sliding in enumerate(pattern) if not sliding]
    if len(pattern) != layers or len(kv_heads) != layers or not 0 < len(full) < layers or _ROPE_FACTORS[0] not in base.tensors:
        raise OlpackError(f"'{base.paths[0]}' does not describe the attention of each of its {layers} layers.", "Download or make it again.")
    turned = int((base.dequantized(_ROPE_FACTORS[0]) == 1).sum())
    theta = {"rope_theta": base.number("rope.freq_base") or 1e6}
    return {
        "rms_norm_eps": _epsilon(base),
        "intermediate_size": int(widths[0]),
        "use_double_wide_mlp": len(set(widths)) > 1,
        "num_key_value_heads": int(next(heads for heads, sliding in zip(kv_heads, pattern, strict=True) if sliding)),
        "num_global_key_value_heads": int(kv_heads[full[0]]),
        "head_dim": _needed(base, "attention.key_length_swa"),
        "global_head_dim": head_dim(base),
        "attention_k_eq_v": f"blk.{full[0]}.attn_v.weight" not in base.tensors,
        "num_kv_shared_layers": base.integer("attention.shared_kv_layers") or 0,
        "hidden_size_per_layer_input": base.integer("embedding_length_per_layer_input") or 0,
        "vocab_size_per_layer_input": _tensor_shape(base, _EMBEDDING)[0],
        "sliding_window": _needed(base, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
        "final_logit_softcapping": base.number("final_logit_softcapping"),
        **(_gemma4_experts(base) if base.integer("expert_count") else {}),
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 2 * turned / head_dim(base), **theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": base.number("rope.freq_base_swa") or 10_000.0},
        },
    }


def _gemma4_experts(base: GgufBase) -> dict[str, Any]:
    found = _experts(base)
    return {
        "enable_moe_block": True,
        "num_experts": found["num_experts"],
        "top_k_experts": found["num_experts_per_tok"],
        "moe_intermediate_size": found["moe_intermediate_size"],
    }


def _phi3(base: GgufBase) -> dict[str, Any]:
    """llama.cpp attends to the whole context whatever window the file names, and so does training."""
    config: dict[str, Any] = {"rms_norm_eps": _epsilon(base), "sliding_window": None}
    original = base.integer("rope.scaling.original_context_length") or _needed(base, "context_length")
    config["original_max_position_embeddings"] = original
    if all(name in base.tensors for name in _ROPE_FACTORS[1:]):
        long, short = (base.dequantized(name).tolist() for name in _ROPE_FACTORS[1:])
        scaled = {"rope_type": "longrope", "long_factor": long, "short_factor": short, "original_max_position_embeddings": original}
        factor = base.number("rope.scaling.attn_factor")
        config["rope_parameters"] = _rope(base) | scaled | ({} if factor is None else {"attention_factor": factor})
    return config


def _starcoder2(base: GgufBase) -> dict[str, Any]:
    return {"norm_epsilon": _epsilon(base, "layer_norm_epsilon"), "use_bias": _has(base, "attn_q.bias"), "sliding_window": None}


def _nemotron(base: GgufBase) -> dict[str, Any]:
    biases = {"attention_bias": _has(base, "attn_q.bias"), "mlp_bias": _has(base, "ffn_down.bias")}
    return {"norm_eps": _epsilon(base, "layer_norm_epsilon"), **biases}


def _experts(base: GgufBase) -> dict[str, Any]:
    return {**_chosen(base, "num_experts"), "moe_intermediate_size": _needed(base, "expert_feed_forward_length")}


def _qwen2moe(base: GgufBase) -> dict[str, Any]:
    shared = _tensor_shape(base, "blk.0.ffn_up_shexp.weight")[0]
    return {
        **_experts(base),
        "rms_norm_eps": _epsilon(base),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
        "qkv_bias": _has(base, "attn_q.bias"),
    }


def _qwen3moe(base: GgufBase) -> dict[str, Any]:
    return {**_experts(base), **_qwen(base), "norm_topk_prob": True}


def _qwen35(base: GgufBase) -> dict[str, Any]:
    """Most layers are a linear attention; layers that predict further tokens come after the others, and are not read."""
    layers = _needed(base, "block_count") - (base.integer("nextn_predict_layers") or 0)
    interval = base.integer("full_attention_interval") or 4
    linear = base.lists.get(f"{base.architecture}.attention.recurrent_layers") or [(layer + 1) % interval for layer in range(layers)]
    heads = _needed(base, "ssm.time_step_rank")
    return {
        **_rms(base),
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if one else "full_attention" for one in linear[:layers]],
        "linear_conv_kernel_dim": _needed(base, "ssm.conv_kernel"),
        "linear_key_head_dim": _needed(base, "ssm.state_size"),
        "linear_num_key_heads": _needed(base, "ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": _needed(base, "ssm.inner_size") // heads,
        "rope_parameters": {**_rope(base), "mrope_section": list(base.lists.get(f"{base.architecture}.rope.dimension_sections", ()))[:3]},
    }


def _qwen35moe(base: GgufBase) -> dict[str, Any]:
    return {**_qwen35(base), **_experts(base), "shared_expert_intermediate_size": _tensor_shape(base, "blk.0.ffn_up_shexp.weight")[0]}


def _linear_attention(base: GgufBase, tensor: str) -> Weight | None:
    """A weight of Qwen3.5's linear attention that is not as in the file; None for another."""
    part = tensor.split(".")[2]
    keys, values = _needed(base, "ssm.group_count"), _needed(base, "ssm.time_step_rank")
    size = _needed(base, "ssm.inner_size") // values
    before = 2 * keys * _needed(base, "ssm.state_size")
    orders = {"attn_qkv": (before, size), "ssm_conv1d": (before, size), "attn_gate": (0, size), "ssm_out": (0, size)}
    orders |= dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), (0, 1))
    if part not in orders:
        return None
    first, rows = orders[part]
    forms: dict[str, Literal["convolution", "logarithm", "columns"]] = {"ssm_conv1d": "convolution", "ssm_a": "logarithm"}
    if keys == values:
        return Weight((tensor,), form=forms.get(part, "plain"))
    return Weight((tensor,), regrouped=(first, keys, rows), form="columns" if part == "ssm_out" else forms.get(part, "plain"))


def _gpt_oss(base: GgufBase) -> dict[str, Any]:
    found = _experts(base)
    return {
        "num_local_experts": found["num_experts"],
        "num_experts_per_tok": found["num_experts_per_tok"],
        "intermediate_size": found["moe_intermediate_size"],
        "rms_norm_eps": _epsilon(base),
        "sliding_window": _needed(base, "attention.sliding_window"),
        "attention_bias": _has(base, "attn_q.bias"),
    }


def _lfm2(base: GgufBase) -> dict[str, Any]:
    """A layer without heads for keys is a convolution."""
    kv_heads = base.lists.get(f"{base.architecture}.attention.head_count_kv") or (_kv_heads(base),) * _needed(base, "block_count")
    return {
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "conv_L_cache": _needed(base, "shortconv.l_cache"),
        "norm_eps": _epsilon(base),
        "block_auto_adjust_ff_dim": False,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("Llama 2 to 3.3, Mistral, SmolLM2", "llama", "LlamaForCausalLM", _llama, permuted=True),
    "llama with experts": Architecture("Mixtral", "mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "mistral3": Architecture("Mistral Small 3.1 and 3.2 (text)", "mistral", "MistralForCausalLM", _mistral3, permuted=True),
    "mistral3 with yarn": Architecture("Ministral 3, Devstral 2 (text)", "ministral3", "Ministral3ForCausalLM", _ministral3, permuted=True),
    "qwen2": Architecture("Qwen2, Qwen2.5", "qwen2", "Qwen2ForCausalLM", _rms),
    "qwen3": Architecture("Qwen3", "qwen3", "Qwen3ForCausalLM", _qwen),
    "qwen2moe": Architecture("Qwen2 MoE", "qwen2_moe", "Qwen2MoeForCausalLM", _qwen2moe),
    "qwen3moe": Architecture("Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3moe),
    "qwen35": Architecture("Qwen3.5, Qwen3.6 (text)", "qwen3_5_text", "Qwen3_5ForCausalLM", _qwen35, norm_offset=1),
    "qwen35moe": Architecture("Qwen3.5 MoE, Qwen3.6 MoE (text)", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _qwen35moe, norm_offset=1),
    "gemma": Architecture("Gemma, CodeGemma", "gemma", "GemmaForCausalLM", _rms, norm_offset=1),
    "gemma2": Architecture("Gemma 2", "gemma2", "Gemma2ForCausalLM", _gemma2, norm_offset=1),
    "gemma3": Architecture("Gemma 3 (text)", "gemma3_text", "Gemma3ForCausalLM", _gemma3, norm_offset=1),
    "gemma4": Architecture("Gemma 4 (text)", "gemma4_text", "Gemma4ForCausalLM", _gemma4),
    "phi2": Architecture("Phi-1, Phi-2", "phi", "PhiForCausalLM", _phi2),
    "phi3": Architecture("Phi-3, Phi-4", "phi3", "Phi3ForCausalLM", _phi3),
    "gpt-oss": Architecture("gpt-oss", "gpt_oss", "GptOssForCausalLM", _gpt_oss),
    "granite": Architecture("Granite 3", "granite", "GraniteForCausalLM", _granite, permuted=True),
    "granitemoe": Architecture("Granite 3 MoE", "granitemoe", "GraniteMoeForCausalLM", _granite_moe, permuted=True),
    "command-r": Architecture("Command R, Aya 23, Aya Expanse", "cohere", "CohereForCausalLM", _cohere),
    "cohere2": Architecture("Command R7B, Command A", "cohere2", "Cohere2ForCausalLM", _cohere2),
    "olmo2": Architecture("OLMo 2", "olmo2", "Olmo2ForCausalLM", _olmo2),
    "olmo2 with windows": Architecture("OLMo 3", "olmo3", "Olmo3ForCausalLM", _olmo3),
    "olmoe": Architecture("OLMoE", "olmoe", "OlmoeForCausalLM", _olmoe),
    "lfm2": Architecture("LFM2", "lfm2", "Lfm2ForCausalLM", _lfm2),
    "lfm2moe": Architecture("LFM2 MoE", "lfm2_moe", "Lfm2MoeForCausalLM", _lfm2moe),
    "smollm3": Architecture("SmolLM3", "smollm3", "SmolLM3ForCausalLM", _smollm3, permuted=True),
    "exaone4": Architecture("EXAONE 4 1.2B", "exaone4", "Exaone4ForCausalLM", _exaone4),
    "ernie4_5": Architecture("ERNIE 4.5 without experts", "ernie4_5", "Ernie4_5ForCausalLM", _ernie),
    "seed_oss": Architecture("Seed-OSS", "seed_oss", "SeedOssForCausalLM", _seed_oss),
    "nemotron": Architecture("Nemotron, Minitron", "nemotron", "NemotronForCausalLM", _nemotron, norm_offset=1),
    "starcoder2": Architecture("StarCoder2", "starcoder2", "Starcoder2ForCausalLM", _starcoder2),
    "stablelm": Architecture("StableLM 2 1.6B, StableLM 3B", "stablelm", "StableLmForCausalLM", _stablelm),
}
"""By llama.cpp's name, and by what tells one model of transformers from another where it has one for both: `_variant`."""


def architecture_table() -> str:
    """Markdown: the architectures whose GGUF files can be a base."""
    lines = ["| in the GGUF | models | in transformers |", "| --- | --- | --- |"]
    for name, found in ARCHITECTURES.items():
        architecture, _, variant = name.partition(" ")
        lines.append(f"| `{architecture}`{variant and f' {variant}'} | {found.models} | `{found.class_name}` |")
    return "\n".join(lines) + "\n"


# -- tensors --------------------------------------------------------------------------------------------------------------------------------


def weights_of(base: GgufBase, model: PreTrainedModel) -> dict[str, Weight]:
    """What each parameter of a model is made of.

    Args:
        model: of the class and the config that `config_of` names; its parameters may be on the meta device.

    Raises:
        OlpackError: the file lacks one of them, has it in another shape, or has a tensor that the model does not.
    """
    import gguf

    found = _architecture(base)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture)
    names = gguf.get_tensor_name_map(number, _needed(base, "block_count"))
    weights: dict[str, Weight] = {}
    for name, parameter in _tensors(model).items():
        weight = weights[name] = _weight(base, found, name, names)
        for tensor in weight.tensors:
            if tensor not in base.tensors:
                raise OlpackError(f"'{base.paths[0]}' has no tensor '{tensor}', which is '{name}' in transformers.", "Download or make it again.")
        stored = weight.shape(base)
        if stored != tuple(parameter.shape):
            raise OlpackError(
                f"'{base.paths[0]}' has '{weight.tensors[0]}' for {list(stored)}, and {found.class_name} needs {list(parameter.shape)}.",
                _FOLDER,
            )
    used = {tensor for weight in weights.values() for tensor in weight.tensors}
    shared = getattr(model.config, "num_kv_shared_layers", 0)  # published files have keys and values of these layers, which nothing reads
    first = model.config.num_hidden_layers - shared
    unread = {f"blk.{layer}.attn_{one}.weight" for layer in range(first, first + shared) for one in ("k", "v", "k_norm")}
    ahead = tuple(f"blk.{layer}." for layer in range(model.config.num_hidden_layers, _needed(base, "block_count")))
    unread |= {tensor for tensor in base.tensors if tensor.startswith(ahead)}
    if unused := base.tensors.keys() - used - set(_ROPE_FACTORS) - unread:
        raise OlpackError(f"'{base.paths[0]}' has '{min(unused)}', which {found.class_name} of transformers has not.", _FOLDER)
    return weights


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters, shared ones once, and the buffers that a checkpoint has."""
    stored = model.state_dict()
    return {**dict(model.named_parameters()), **{name: buffer for name, buffer in model.named_buffers() if name in stored}}


def tensor_headers(base: GgufBase) -> dict[str, TensorHeader]:
    """Its tensors by transformers' names, in transformers' shapes. The dtype is a float one, "F32", or ggml's type of the blocks, "Q4_K"."""
    from olpack.model.shape import MetaModel

    model = MetaModel(config_of(base), str(base.paths[0])).module
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    found = {name: base.tensors[weight.tensors[0]] for name, weight in weights_of(base, model).items()}
    return {name: TensorHeader(tensor.type.name, shapes[name], tensor.path) for name, tensor in found.items()}


_STACKS = re.compile(r"model\.layers\.(\d+)\.(?:(?:mlp|block_sparse_moe|feed_forward)\.)?experts\.(gate_up_proj|down_proj)(_bias)?")
_SCALES = {".router.scale": "ffn_gate_inp.scale", ".router.per_expert_scale": "ffn_down_exps.scale"}  # of Gemma 4


def _weight(base: GgufBase, architecture: Architecture, name: str, names: Any) -> Weight:
    """What a parameter is made of; `names` is llama.cpp's map of names."""
    if match := _STACKS.fullmatch(name):
        layer, which, bias = match.groups()
        end = "bias" if bias else "weight"
        oss = architecture.model_type == "gpt_oss"
        if which == "down_proj":
            return Weight((f"blk.{layer}.ffn_down_exps.{end}",), form="transposed" if oss and not bias else "plain")
        if (stack := f"blk.{layer}.ffn_gate_up_exps.{end}") in base.tensors:
            return Weight((stack,))
        both = (f"blk.{layer}.ffn_gate_exps.{end}", f"blk.{layer}.ffn_up_exps.{end}")
        return Weight(both, form="interleaved" if oss else "gate_up")
    if scale := next((tensor for end, tensor in _SCALES.items() if name.endswith(end)), None):
        return Weight((f"blk.{name.split('.')[2]}.{scale}",))
    named = _as_converted(name)
    tensor = names.get_name(named, try_suffixes=(".weight", ".bias"))
    if tensor is None:
        raise OlpackError(f"'{base.paths[0]}' has no tensor for '{name}' of {architecture.class_name}.", _FOLDER)
    if architecture.permuted and ".attn_q." in tensor:
        return Weight((tensor,), heads=_needed(base, "attention.head_count"))
    if architecture.permuted and ".attn_k." in tensor:
        return Weight((tensor,), heads=_kv_heads(base))
    if base.architecture.startswith("qwen35") and name.startswith("model.layers.") and (weight := _linear_attention(base, tensor)):
        return weight
    if architecture.norm_offset and tensor.endswith("norm.weight") and not tensor.endswith(".ssm_norm.weight"):
        return Weight((tensor,), offset=architecture.norm_offset)
    if tensor.endswith(".ffn_gate_inp_shexp.weight"):
        return Weight((tensor,), form="row")
    return Weight((tensor,), form="convolution" if ".shortconv.conv." in tensor else "plain")


def _as_converted(name: str) -> str:
    """A parameter as llama.cpp's converter names it."""
    if name.endswith((".sinks", ".layer_scalar")):
        return f"{name}.weight"
    if name.endswith(".expert_bias"):
        return f"{name}.bias"
    return name.replace(".dt_bias", ".dt_proj.bias").replace(".block_sparse_moe.router.", ".block_sparse_moe.router.layer.")


if __name__ == "__main__":
    print(architecture_table(), end="")
