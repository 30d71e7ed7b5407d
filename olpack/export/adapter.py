"""A LoRA or VeRA adapter in peft's format: what it changes, and the change itself, tensor by tensor.

The merge of one weight is W + scale * (B @ A) in float32, as in "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al.,
2021), with scale = alpha / r, or alpha / sqrt(r) for rank-stabilized adapters (Kalajdzievski, 2023). DoRA (Liu et al., 2024) then gives
each output's column of weights a trained norm: m * W' / |W'|. VeRA (Kopiczko et al., 2024) learns two vectors for each weight between random
matrices that all weights share, cut to the weight's size: (b * B) @ (d * A).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack.errors import OlpackError
from olpack.export.folder import TensorHeader, read_safetensors_header
from olpack.held import Held

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_NORMS = "lora_magnitude_vector"
_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_SHARED = ("base_model.vera_A", "base_model.vera_B")

# Settings of peft under which W + scale * B @ A is not what was trained, and what they mean.
_REFUSED = {
    "lora_bias": "biases in its B matrices", "layer_replication": "repeated layers",
    "target_parameters": "bare parameters as targets", "trainable_token_indices": "single trained tokens",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
}  # fmt: skip

# Initial values of A and B that leave the base's weights as they are. The others (PiSSA, CorDA, OLoRA, LoftQ, …) also change the base,
# so the saved adapter does not fit the published weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: the names of A and B in the adapter's file, and what their product is multiplied by."""

    a: str
    b: str
    scale: float
    transposed: bool  # the base stores this weight as [in, out]
    magnitude: str | None = None  # the name of DoRA's norms, [out]
    vectors: tuple[str, str] | None = None  # the names of VeRA's vectors, [out] and [rank]

    def factors(self, file: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B [rows, rank] and A [rank, columns] in float32, from the open safetensors. Cloned, because the last bit of a product depends on how
        its factors are aligned, and in the file they are anyhow."""
        import torch

        a, b = (file.get_tensor(name).to(torch.float32).clone() for name in (self.a, self.b))
        if self.vectors is None:
            return b, a
        outer, inner = (file.get_tensor(name).to(torch.float32).unsqueeze(-1) for name in self.vectors)
        return outer * b[:rows], inner * a[:, :columns]


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in a base, by the names of the base's tensors.

    Attributes:
        file: its safetensors.
        low_rank: weights that get an addition.
        replaced: tensors that were trained as a whole (`modules_to_save`, biases), by the name in the adapter's file.
        held: how training held the base, where the adapter is to be added to that; with the weights that were held so.
    """

    file: Path
    low_rank: dict[str, LowRank]
    replaced: dict[str, str]
    held: Held | None = None
    held_weights: frozenset[str] = frozenset()

    @property
    def tensors(self) -> set[str]:
        """The base's tensors that are changed."""
        return {*self.low_rank, *self.replaced, *self.held_weights}

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The changed tensor in float32.

        Args:
            name: of the tensor in the base, one of `tensors`.
            weight: the base's values, any floating dtype.
        """
        import torch
        from safetensors import safe_open

        with safe_open(str(self.file), framework="pt") as file:
            if name in self.replaced:  # for a targeted embedding peft saves the base's matrix too
                weight = file.get_tensor(self.replaced[name])
            if name not in self.low_rank:
                return self.held.round_trip(weight) if name in self.held_weights else weight.to(torch.float32)
            change = self.low_rank[name]
            rows, columns = weight.shape[::-1] if change.transposed else weight.shape
            b, a = change.factors(file, rows, columns)
            norms = file.get_tensor(change.magnitude).to(torch.float32) if change.magnitude else None
        if name in self.held_weights:
            weight, b, a = self._as_held(weight, b, a, change.scale)
        product = b @ a
        # In place: a further matrix of the weight's size would cost as much time as the product itself.
        changed = (product.T if change.transposed else product).mul_(change.scale).add_(weight)
        if norms is None:
            return changed
        changed = changed.contiguous()  # the last bit of a sum depends on its order, and that on the layout
        factor = norms / torch.linalg.norm(changed.T if change.transposed else changed, dim=1)
        return changed.mul_(factor.view(1, -1) if change.transposed else factor.view(-1, 1))

    def _as_held(self, weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight that training saw, and the B and A that it added to it. The second half of an adapter that did not begin at zero is what it
        began with, negated: PiSSA had taken that out of the weight before it was quantized, LoftQ had not."""
        import torch

        if self.held.initialization == "default":
            return self.held.round_trip(weight), b, a
        rank = len(a) // 2
        if self.held.initialization == "pissa":
            weight = weight.to(getattr(torch, self.held.dtype)).float() + scale * (b[:, rank:] @ a[rank:])
        return self.held.round_trip(weight), b[:, :rank].contiguous(), a[:rank]


def read_adapter(folder: Path, base: Mapping[str, TensorHeader], *, dequantized: bool = False) -> Adapter:
    """Read an adapter's configuration and header, and find the base's tensor for each of its own.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: the base's tensors by their names in its checkpoint, those of a quantized one as `dequantized_headers` gives them.
        dequantized: add to the weights as training held them, which `settings.json` beside the adapter tells.

    Raises:
        OlpackError: no LoRA adapter, a kind that cannot be merged this way, or one for another base.
    """
    config = _read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise OlpackError(
            f"'{folder}' has no adapter_model.safetensors.", "Save the adapter with save_pretrained (safetensors, not pickle)."
        )
    header = read_safetensors_header(file)
    names = BaseNames(base, config)

    low_rank: dict[str, LowRank] = {}
    replaced: dict[str, str] = {}
    for key, found in sorted(header.items()):
        module, kind = _parse(key, folder)
        if kind == "whole":
            name = names.find(module.replace(".modules_to_save.", ".").replace(".base_layer.", "."))
            _expect_shape(folder, key, found.shape, base[name].shape)
            replaced[name] = key
        elif kind.endswith("A"):
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in header:
                raise OlpackError(f"The adapter '{folder}' has '{key}' and no '{other}'.", "It was not saved completely: save it again.")
            name = names.find(f"{module}.weight")
            transposed = kind == "lora_embedding_A" or bool(config.get("fan_in_fan_out"))
            product = (header[other].shape[0], found.shape[-1])
            _expect_shape(folder, key, product[::-1] if transposed else product, base[name].shape)
            magnitude = next((norms for norms in (f"{_PREFIX}{module}.{_NORMS}", f"{_PREFIX}{module}.{_NORMS}.weight") if norms in header), None)
            if (magnitude is not None) != bool(config.get("use_dora")):
                raise OlpackError(
                    f"The adapter '{folder}' {'has' if magnitude else 'lacks'} the norms of DoRA for '{module}', and its configuration says "
                    f"use_dora: {json.dumps(bool(config.get('use_dora')))}.", "It was not saved completely: save it again."
                )  # fmt: skip
            if magnitude is not None:
                _expect_shape(folder, magnitude, header[magnitude].shape, base[name].shape[1:] if transposed else base[name].shape[:1])
            low_rank[name] = LowRank(key, other, _scale(config, module, rank=found.shape[0]), transposed, magnitude)
        elif kind == _VECTORS[0]:
            vectors = key, key.replace(*_VECTORS)
            if lost := [part for part in (*_SHARED, vectors[1]) if part not in header]:
                raise OlpackError(f"The adapter '{folder}' has '{key}' and no '{lost[0]}'.",
                                  "Save it with save_projection: true in its configuration.")
            name = names.find(f"{module}.weight")
            transposed, (a, b) = bool(config.get("fan_in_fan_out")), _SHARED
            rows, columns = base[name].shape[::-1] if transposed else base[name].shape
            if header[key].shape != (rows,) or header[b].shape[0] < rows or header[a].shape[1] < columns:
                _expect_shape(folder, key, (header[key].shape[0], header[a].shape[1]), (rows, columns))
            low_rank[name] = LowRank(a, b, 1.0, transposed, vectors=vectors)
        elif kind in (_VECTORS[1], "shared"):
            pass  # read with the vector of the rows
        elif kind == _NORMS:
            if not any(header.keys() & {f"{_PREFIX}{module}.{a}" for a in ("lora_A.weight", "lora_embedding_A")}):
                raise OlpackError(f"The adapter '{folder}' has '{key}' without its A matrix.", "It was not saved completely: save it again.")
        elif key.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A") not in header:
            raise OlpackError(f"The adapter '{folder}' has '{key}' without its A matrix.", "It was not saved completely: save it again.")
    if not low_rank and not replaced:
        raise OlpackError(f"The adapter '{folder}' changes nothing: its file holds no tensors.", "Train it again.")
    if not dequantized:
        return Adapter(file, low_rank, replaced)
    held = read_held(folder)
    return Adapter(file, low_rank, replaced, held, frozenset(names.find(f"{module}.weight") for module in held.modules))


def read_held(folder: Path) -> Held:
    """How training held the base of an adapter.

    Raises:
        OlpackError: olpack did not train it, or on a base that it did not quantize.
    """
    path = folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("held") if path.is_file() else None
    if found is None:
        raise OlpackError(f"The adapter '{folder}' does not say how olpack quantized its base, so there are no weights that training saw instead.",
                          "Set `train.merge_base: original`.")
    return Held(**found)


def _read_config(folder: Path) -> dict:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise OlpackError(f"'{folder}' is no adapter: it has no adapter_config.json.", "Name the folder that peft's save_pretrained wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise OlpackError(f"'{path}' is no valid adapter configuration: {error}.", "Save the adapter again.") from error
    if kind not in ("LORA", "VERA"):
        raise OlpackError(f"The adapter '{folder}' is of the kind {kind}, and only LoRA and VeRA can be merged.", "Train a LoRA adapter.")
    for setting, meaning in _REFUSED.items():
        if config.get(setting):
            raise OlpackError(
                f"The adapter '{folder}' uses {meaning} ({setting}), which a plain LoRA merge would lose.",
                "Merge it with peft (merge_and_unload) and export the merged folder.",
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise OlpackError(
            f"The adapter '{folder}' began as '{config['init_lora_weights']}', which also changes the base's weights.",
            "Merge it with peft where it was trained (merge_and_unload) and export the merged folder, or save it again with "
            "path_initial_model_for_weight_conversion, which needs the adapter as it was before the first step.",
        )
    return config


def _parse(key: str, folder: Path) -> tuple[str, str]:
    """(module, "lora_A"), or (tensor, "whole") for one that was trained as a whole."""
    if key in _SHARED:
        return key, "shared"
    if not key.startswith(_PREFIX):
        raise OlpackError(f"The adapter '{folder}' holds '{key}', a name that peft does not give.", "Save it with peft's save_pretrained.")
    name = key.removeprefix(_PREFIX)
    match = re.fullmatch(rf"(.+)\.(lora_[AB])\.weight|(.+)\.(lora_embedding_[AB])|(.+)\.({_NORMS})(?:\.weight)?", name)
    if match:
        module, kind = (found for found in match.groups() if found)
        return module, kind
    if match := re.fullmatch(rf"(.+)\.({'|'.join(_VECTORS)})", name):
        return match[1], match[2]
    if ".lora_" in name:
        raise OlpackError(
            f"The adapter '{folder}' holds '{key}', which a plain LoRA merge would lose.",
            "Merge it with peft (merge_and_unload) and export the merged folder.",
        )
    return name, "whole"


def _expect_shape(folder: Path, key: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(got) != tuple(wanted):
        raise OlpackError(
            f"The adapter '{folder}' is for another base: '{key}' makes {list(got)}, and the base has {list(wanted)} there.",
            "Name the base that it was trained on.",
        )


def _scale(config: dict, module: str, rank: int) -> float:
    def setting(patterns: dict, default: float) -> float:
        # peft's rule: a pattern is a regular expression for the end of the module's name, the first that fits counts.
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)

    named = setting(config.get("rank_pattern") or {}, config.get("r", rank))
    if named != rank:
        raise OlpackError(f"The adapter's '{module}' has rank {rank}, and its configuration says {named}.", "Save the adapter again.")
    alpha = setting(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class BaseNames:
    """The base's name for a tensor that peft names after the module tree.

    The two differ for models that a checkpoint nests otherwise than the class does ("language_model.model.layers…" and
    "model.language_model.layers…"), so containers of that kind are left out of the comparison where the plain name is not found.
    """

    _CONTAINERS = ("model", "language_model", "transformer")

    def __init__(self, base: Mapping[str, TensorHeader], config: dict):
        self._base = base
        self._short: dict[str, str] = {}
        for name in base:
            self._short[self._shorten(name)] = name
        self._shared = "lm_head" not in {name.split(".")[-2] for name in base if "." in name}
        self._kept_shared = bool(config.get("ensure_weight_tying"))

    def _shorten(self, name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in self._CONTAINERS)

    def find(self, name: str) -> str:
        """The base's name of a tensor.

        Raises:
            OlpackError: the base has no such tensor, or it is the shared embedding and the adapter does not say that it keeps it shared.
        """
        module = name.rpartition(".")[0].rpartition(".")[2]
        if self._shared and self._kept_shared and module == "lm_head":  # peft saves the shared matrix under both names
            name = next((known for known in self._base if known.endswith(_EMBEDDINGS)), name)
        if self._shared and not self._kept_shared and module in ("lm_head", "embed_tokens", "wte"):
            raise OlpackError(
                f"The adapter changes '{module}', and the base uses one matrix as embedding and as output layer.",
                f"Train without '{module}', or with ensure_weight_tying: true in peft's configuration.",
            )
        found = name if name in self._base else self._short.get(self._shorten(name))
        if found is None:
            raise OlpackError(
                f"The adapter is for another base: it changes '{name}', which the base does not have.",
                "Name the base that it was trained on.",
            )
        return found
