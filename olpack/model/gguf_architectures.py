"""What transformers calls the architectures, the settings and the tensors of a GGUF.

    config = config_of(base)       # the fields of a config.json
    weights_of(base, model)        # parameter of transformers' model -> the tensors of the file that it is made of

llama.cpp's converter renames tensors, and changes some: it permutes the rows of Llama's queries and keys for the other order of rotary pairs, adds
the 1 of Gemma's and Nemotron's norms, and splits stacks of experts. Here is the way back. Only architectures whose logits the tests compare with
llama.cpp's are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olpack.errors import OlpackError
from olpack.model.checkpoint import TensorHeader
from olpack.model.gguf_base import GgufBase
from olpack.model.settings import check_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZED_AS = "gguf"  # the `quant_method` of its config
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp as transformers has it.

    Attributes:
        model_type, class_name: of transformers.
        settings: what its config has besides that of `_common`.
        permuted: whether the rows of queries and keys are.
        norm_offset: what the converter adds to the weights of norms.
    """

    model_type: str
    class_name: str
    settings: Callable[[GgufBase], dict[str, Any]]
    permuted: bool = False
    norm_offset: float = 0


@dataclass(frozen=True)
class Weight:
    """A parameter of transformers' model, made of tensors of the file.

    Attributes:
        tensor: its name in the GGUF.
        heads: of the attention whose rows are permuted; 0: they are not.
        offset: what the file's values have more.
    """

    tensor: str
    heads: int = 0
    offset: float = 0

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of the file's weights or blocks, in the order of transformers."""
        if not self.heads:
            return values
        return values.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """What `read` gives, as the file has it."""
        if self.heads:
            values = values.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return values + self.offset if self.offset else values

    def read(self, base: GgufBase, dtype: torch.dtype) -> torch.Tensor:
        """Its values in transformers' order, [rows, columns] or [rows]."""
        import torch

        values = self.rows(base.dequantized(self.tensor, torch.float32 if self.offset else dtype))
        return (values - self.offset).to(dtype) if self.offset else values


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
    config = {key: value for key, value in config.items() if value is not None}
    check_config(config, str(base.paths[0]))
    return config


def _architecture(base: GgufBase) -> Architecture:
    if base.architecture not in ARCHITECTURES:
        raise OlpackError(
            f"'{base.paths[0]}' is of the architecture '{base.architecture}', on whose GGUF files olpack does not train.",
            f"Those that are verified are {', '.join(ARCHITECTURES)}; or take the model's folder as base.",
        )
    found = ARCHITECTURES[base.architecture]
    if found.model_type == "llama" and base.integer("expert_count"):
        raise OlpackError(f"'{base.paths[0]}' is a Mixtral, on whose GGUF files olpack does not train.", "Take the model's folder as base.")
    return found


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
        "intermediate_size": base.integer("feed_forward_length"),
        "num_hidden_layers": _needed(base, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": base.integer("attention.head_count_kv") or heads,
        "head_dim": head_dim(base),
        "max_position_embeddings": _needed(base, "context_length"),
        "tie_word_embeddings": _HEAD not in base.tensors,
        "rope_parameters": _rope(base),
        "bos_token_id": base.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": base.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": base.metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


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
        raise OlpackError(f"'{base.paths[0]}' scales rotary embeddings by '{kind}', which olpack does not read.", "Take the model's folder as base.")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": base.integer("rope.scaling.original_context_length"),
            "beta_fast": base.number("rope.scaling.yarn_beta_fast"),
            "beta_slow": base.number("rope.scaling.yarn_beta_slow"),
        }
    return {key: value for key, value in rope.items() if value is not None}


def rope_factors(base: GgufBase) -> torch.Tensor | None:
    """By what each inverse frequency of the rotary embedding is divided, float32 [pairs]; None where the file has no such factors."""
    return base.dequantized(_ROPE_FACTORS[0]) if _ROPE_FACTORS[0] in base.tensors else None


# -- architectures --------------------------------------------------------------------------------------------------------------------------


def _rms(base: GgufBase) -> dict[str, Any]:
    return {"rms_norm_eps": base.number("attention.layer_norm_rms_epsilon")}


def _has(base: GgufBase, name: str) -> bool:
    return f"blk.0.{name}" in base.tensors


def _llama(base: GgufBase) -> dict[str, Any]:
    return {**_rms(base), "attention_bias": _has(base, "attn_q.bias"), "mlp_bias": _has(base, "ffn_down.bias")}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, permuted=True),
}
"""By llama.cpp's name."""


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
    for name, parameter in model.named_parameters():
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor is None or tensor not in base.tensors:
            raise OlpackError(
                f"'{base.paths[0]}' has no tensor for '{name}' of {found.class_name}.", "Download it again, or take the model's folder as base."
            )
        weights[name] = weight = _weight(base, found, tensor)
        if (stored := base.tensors[tensor].shape) != tuple(parameter.shape):
            raise OlpackError(
                f"'{base.paths[0]}' has '{weight.tensor}' as {list(stored)}, and {found.class_name} needs {list(parameter.shape)}.",
                "Take the model's folder as base.",
            )
    unused = base.tensors.keys() - {weight.tensor for weight in weights.values()} - set(_ROPE_FACTORS)
    if unused:
        raise OlpackError(
            f"'{base.paths[0]}' has '{min(unused)}', which {found.class_name} of transformers has not.", "Take the model's folder as base."
        )
    return weights


def tensor_headers(base: GgufBase) -> dict[str, TensorHeader]:
    """Its tensors by transformers' names, in transformers' shapes. The dtype is a float one, "F32", or ggml's type of the blocks, "Q4_K"."""
    from olpack.model.shape import MetaModel

    model = MetaModel(config_of(base), str(base.paths[0])).module
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: base.tensors[weight.tensor] for name, weight in weights_of(base, model).items()}
    return {name: TensorHeader(tensor.type.name, shapes[name], tensor.path) for name, tensor in found.items()}


def _weight(base: GgufBase, architecture: Architecture, tensor: str) -> Weight:
    if architecture.permuted and ".attn_q." in tensor:
        return Weight(tensor, heads=_needed(base, "attention.head_count"))
    if architecture.permuted and ".attn_k." in tensor:
        return Weight(tensor, heads=base.integer("attention.head_count_kv") or _needed(base, "attention.head_count"))
    if architecture.norm_offset and tensor.endswith("norm.weight"):
        return Weight(tensor, offset=architecture.norm_offset)
    return Weight(tensor)
