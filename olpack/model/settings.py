"""The JSON files of a model's folder, validated before anything else reads them: types, sizes, counts.

A model's folder may be anybody's. transformers and llama.cpp take a text for a number, 10^5 layers or a negative size as they come, and fail far
from the cause, or compute for minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from olpack import bounded_json
from olpack.errors import OlpackError

_AGAIN = "Fetch the model again, or take the file as the model's publisher has it."
_MOST_LAYERS = 1000
_MOST_EXPERT_BLOCKS = 1 << 20  # layers times experts: 23,424 in Kimi K2, 524,288 in Doge
_WIDE = 1 << 24  # a width; the largest published one is below 2^18
_TOKENS = (1 << 31) - 1  # llama.cpp counts them in 32 bits
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES: dict[str, tuple[int, int]] = {  # setting: the least and the most that it can be
    **dict.fromkeys(_LAYERS, (0, _MOST_LAYERS)),
    **dict.fromkeys(_EXPERTS, (0, 1 << 14)),
    **dict.fromkeys(("num_experts_per_tok", "n_shared_experts", "num_shared_experts", "n_group", "topk_group"), (0, 1 << 14)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), (1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), (0, 1 << 14)),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), (0, 1 << 14)),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), (0, 1 << 18)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim"), (0, _WIDE)),
    "vocab_size": (1, 1 << 22),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "original_max_position_embeddings"), (0, _TOKENS)),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "max_window_layers"), (-1, _TOKENS)),
    **dict.fromkeys(("image_size", "patch_size", "num_channels", "in_channels", "d_state", "d_conv", "state_size", "conv_kernel"), (0, 1 << 16)),
}
_POSITIVE = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head", "intermediate_size")
_OBJECTS = ("text_config", "vision_config", "audio_config", "quantization_config", "rope_scaling", "rope_parameters")
_TEXTS = ("model_type", "hidden_act", "hidden_activation")
_TEXT_LISTS = ("architectures", "layer_types", "mlp_layer_types")
_ROPE = ("rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")
_ROPE_MOST = 1e15  # of a base; published ones go up to 10^9
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_config_file(path: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        OlpackError: it cannot be read, or no model has such settings.
    """
    config = read_object(path)
    check_config(config, str(path))
    return config


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse settings that no model has, before any library builds something of them.

    Args:
        config: the fields of a config.json.
        place: what the message calls it.

    Raises:
        OlpackError: a text where a number belongs, a number where an object belongs, a size out of bounds.
    """
    for key in _POSITIVE:
        for part in (config, config.get("text_config")):
            if isinstance(part, Mapping) and not isinstance(part.get(key, 1), bool) and part.get(key, 1) == 0:
                _refuse(place, key, 0, "must be positive")
    _check_part(config, place, "")


def _check_part(part: Mapping[str, Any], place: str, within: str) -> None:
    for key, value in part.items():
        name = f"{within}{key}"
        if value is None:
            continue
        if key in _SIZES:
            _check_size(place, name, value, *_SIZES[key])
        elif key in _OBJECTS:
            if not isinstance(value, Mapping):
                _refuse(place, name, value, "must be an object")
        elif key in _TEXTS:
            if not isinstance(value, str):
                _refuse(place, name, value, "must be a text")
        elif key in _TEXT_LISTS:
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                _refuse(place, name, value, "must be a list of texts")
            if len(value) > _MOST_LAYERS:
                _refuse(place, name, value, f"has {len(value):,} entries, and at most {_MOST_LAYERS:,} are read")
        if key in _ROPE:
            _check_rope(place, name, value)
        elif isinstance(value, Mapping):
            _check_part(value, place, f"{name}.")
    layers = max((part[key] for key in _LAYERS if isinstance(part.get(key), int)), default=1)
    experts = max((part[key] for key in _EXPERTS if isinstance(part.get(key), int)), default=1)
    if layers * experts > _MOST_EXPERT_BLOCKS:
        _refuse(place, f"{within}num_experts", experts, f"makes {layers * experts:,} experts in all layers; at most {_MOST_EXPERT_BLOCKS:,} are read")


def _check_size(place: str, name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, list):  # of each layer
        if len(value) > _MOST_LAYERS:
            _refuse(place, name, value, f"has {len(value):,} entries, and at most {_MOST_LAYERS:,} are read")
        for one in value:
            if one is not None:
                _check_size(place, name, one, low, high) if not isinstance(one, list) else _refuse(place, name, value, "must be an integer")
        return
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        _refuse(place, name, value, "must be an integer")
    if not low <= value <= high:
        _refuse(place, name, value, f"must lie between {low:,} and {high:,}")


def _check_rope(place: str, name: str, value: Any) -> None:
    """Rotary settings: their numbers are finite and positive; texts, bools and lists of sections are as they come."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_rope(place, f"{name}.{key}", inner)
        kind = value.get("rope_type", value.get("type"))
        if kind is not None and not isinstance(kind, str):
            _refuse(place, f"{name}.rope_type", kind, "must be a text")
        if (low := value.get("low_freq_factor")) is not None and low == value.get("high_freq_factor"):
            _refuse(place, f"{name}.high_freq_factor", low, "must differ from low_freq_factor")
    elif isinstance(value, list):
        if len(value) > 1 << 16:
            _refuse(place, name, value, f"has {len(value):,} entries")
        for inner in value:
            _check_rope(place, name, inner)
    elif (key := name.rpartition(".")[2]).endswith(("factor", "theta", "freq", "embeddings", "pct", "beta_fast", "beta_slow")):
        if isinstance(value, bool) or (value is not None and not isinstance(value, int | float)):
            _refuse(place, name, value, "must be a number")
        least_allowed = 0 if key in ("partial_rotary_factor", "rotary_pct") else None
        if value is not None and not ((value > 0 or value == least_allowed) and value <= _ROPE_MOST):
            _refuse(place, name, value, f"must be positive and at most {_ROPE_MOST:g}")
    elif isinstance(value, int | float) and not abs(value) <= _ROPE_MOST:
        _refuse(place, name, value, f"must be a number of at most {_ROPE_MOST:g}")


def check_tokenizer(folder: Path) -> None:
    """Validate what the tokenizer and the generation of a model's folder are made from.

    Raises:
        OlpackError: a file of the folder is a pipe or a device, or one of these files has a wrong shape.
    """
    for path in sorted(folder.iterdir()):
        bounded_json.check_regular(path)
    for name, check in _FILES.items():
        if (path := folder / name).is_file():
            check(path, read_object(path))


def _tokenizer_settings(path: Path, settings: dict[str, Any]) -> None:
    for name in _SPECIAL:
        token = settings.get(name)
        if isinstance(token, Mapping):
            token = token.get("content", 0)
        if token is not None and not isinstance(token, str):
            _refuse(str(path), name, token, "must be a text")
    template = settings.get("chat_template")
    named = template if isinstance(template, list) else []
    if template is not None and not isinstance(template, str | list):
        _refuse(str(path), "chat_template", template, "must be a text")
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str) for one in named):
        _refuse(str(path), "chat_template", template, "must be a list of objects with `name` and `template`")
    longest = settings.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        _refuse(str(path), "model_max_length", longest, "must be a positive number")
    for key in ("added_tokens_decoder", "model_specific_special_tokens"):
        if not isinstance(settings.get(key) or {}, Mapping):
            _refuse(str(path), key, settings[key], "must be an object")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        if not str(number).isdecimal() or int(number) > _TOKENS or not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            _refuse(str(path), f"added_tokens_decoder.{number}", token, "must be the number and the `content` of a token")
    for key in ("tokenizer_class", "processor_class"):
        if settings.get(key) is not None and not isinstance(settings[key], str):
            _refuse(str(path), key, settings[key], "must be a text")


def _tokenizer(path: Path, tokenizer: dict[str, Any]) -> None:
    model = tokenizer.get("model")
    if not isinstance(model, Mapping):
        _refuse(str(path), "model", model, "must be an object")
    vocabulary, merges, added = model.get("vocab"), model.get("merges") or [], tokenizer.get("added_tokens") or []
    if isinstance(vocabulary, Mapping):
        wrong = next((item for item in vocabulary.items() if type(item[1]) is not int or not 0 <= item[1] <= _TOKENS), None)
    elif isinstance(vocabulary, list):
        wrong = next(
            (one for one in vocabulary if not (isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and _number(one[1]))), None
        )
    else:
        wrong = vocabulary
    if wrong is not None or not vocabulary:
        _refuse(str(path), "model.vocab", wrong, "must give each token its number")
    if not isinstance(merges, list) or not all(isinstance(one, str) or (isinstance(one, list) and len(one) == 2) for one in merges):
        _refuse(str(path), "model.merges", merges, "must be a list of pairs")
    if not isinstance(added, list):
        _refuse(str(path), "added_tokens", added, "must be a list")
    for token in added:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            _refuse(str(path), "added_tokens", token, "must be objects with `id` and `content`")
        if not 0 <= token["id"] <= _TOKENS:
            _refuse(str(path), "added_tokens", token, f"must have an `id` from 0 to {_TOKENS:,}")


def _is_piece(value: Any) -> bool:
    """Whether a value is a piece of a Unigram vocabulary with its score."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _number(value[1])


def _generation(path: Path, settings: dict[str, Any]) -> None:
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = settings.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not -1 <= number <= _TOKENS):
                _refuse(str(path), key, value, "must be the number of a token, or a list of these")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_FILES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "tokenizer_config.json": _tokenizer_settings,
    "special_tokens_map.json": _tokenizer_settings,
    "added_tokens.json": lambda path, settings: None,
    "tokenizer.json": _tokenizer,
    "generation_config.json": _generation,
}


def read_object(path: Path) -> dict[str, Any]:
    """The object in one of the JSON files of a model's folder."""
    return bounded_json.read_object(path, _AGAIN, object_hook=_infinite)


def _infinite(value: dict[str, Any]) -> Any:
    """Transformers writes an infinite number, for which JSON has no word, as {"__float__": "Infinity"}: `time_step_limit` of Mamba 2."""
    return float(value["__float__"]) if value.keys() == {"__float__"} and isinstance(value["__float__"], str) else value


def _refuse(place: str, name: str, value: Any, rule: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    raise OlpackError(f"{place}: {name} {rule}, and is {shown}.", _AGAIN)
