"""A LoRA or VeRA adapter in peft's format: what it changes, and the change itself, tensor by tensor.

The merge of one weight is W + scale * (B @ A) in float32, as in "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al.,
2021), with scale = alpha / r, or alpha / sqrt(r) for rank-stabilized adapters (Kalajdzievski, 2023). DoRA (Liu et al., 2024) then gives
each output's column of weights a trained norm: m * W' / |W'|. VeRA (Kopiczko et al., 2024) trains two vectors for each weight between random
matrices that all weights share, cut to the weight's size: (b * B) @ (d * A).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import regex
from pydantic import TypeAdapter, ValidationError

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.export.experts import Stack, find_stacks
from olpack.model.checkpoint import TensorHeader, read_safetensors_header
from olpack.model.frozen_weights import FrozenQuantization
from olpack.model.names import EMBEDDINGS, HEAD, BaseNames

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_NORMS = "lora_magnitude_vector"
_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_PATTERN_SECONDS = 2  # for one comparison of a name with a pattern of an adapter's configuration
_TOKENS = "trainable_tokens_delta"
_SHARED = ("base_model.vera_A", "base_model.vera_B")
_SETTINGS = "settings.json"

# Settings of peft under which W + scale * B @ A is not what was trained, and what they mean.
_REFUSED = {
    "lora_bias": "biases in its B matrices",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}

# Initial values of A and B that leave the base's weights as they are. The others (PiSSA, CorDA, OLoRA, LoftQ, …) also change the base,
# so the saved adapter does not fit the published weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one weight: the names of A and B in the adapter's file, and the scale of their product."""

    a: str
    b: str
    scale: float
    transposed: bool  # the base stores this weight as [in, out]
    magnitude: str | None = None  # the name of DoRA's norms, [out]
    vectors: tuple[str, str] | None = None  # the names of VeRA's vectors, [out] and [rank]
    stack: Stack | None = None  # A and B are of all experts of a layer

    def factors(self, file: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B [rows, rank] and A [rank, columns] in float32, from the open safetensors. Cloned, because the last bit of a product depends on how
        its factors are aligned, and in the file they are anyhow."""
        import torch

        a, b = (file.get_tensor(name).to(torch.float32).clone() for name in (self.a, self.b))
        if self.vectors is None:
            return b, a
        outer, inner = (file.get_tensor(name).to(torch.float32).unsqueeze(-1) for name in self.vectors)
        return outer * b[:rows], inner * a[:, :columns]


TrainedTokens = tuple[str, tuple[int, ...]]  # the name of the rows in the adapter's file, and their numbers


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in a base, by the names of the base's tensors.

    Attributes:
        file: its safetensors.
        low_rank: weights that get a low-rank update.
        replaced: tensors that were trained as a whole (`modules_to_save`, biases), by the name in the adapter's file.
        quantization: of the base in training, where the adapter is to be added to the dequantized weights; `quantized` names those weights.
        tokens: rows of an embedding or output layer that were trained by themselves, as (name in the file, row numbers); they replace the base's.
        untied: the output layer that the base has not, because it uses its embedding as such, to the embedding's name: training made two
            matrices of the one.
        vocabulary: rows of the embedding where training changed their number.
    """

    file: Path
    low_rank: dict[str, LowRankUpdate]
    replaced: dict[str, str]
    quantization: FrozenQuantization | None = None
    quantized: frozenset[str] = frozenset()
    tokens: dict[str, TrainedTokens] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    vocabulary: int | None = None

    @property
    def tensors(self) -> set[str]:
        """The base's tensors that are changed, and an output layer that it has not."""
        return {*self.low_rank, *self.replaced, *self.tokens, *self.untied, *self.quantized}

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a changed tensor, from that of the base's."""
        return (self.vocabulary, *shape[1:]) if self.vocabulary and name.endswith((*EMBEDDINGS, HEAD)) else tuple(shape)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The changed tensor in float32.

        Args:
            name: of the tensor in the base, one of `tensors`.
            weight: the base's values, any floating dtype; for one of `untied` those of the embedding.
        """
        import torch
        from safetensors import safe_open

        quantization = self.quantization if name in self.quantized else None
        with safe_open(str(self.file), framework="pt") as file:
            if name in self.replaced:  # for a targeted embedding peft saves the base's matrix too
                weight = file.get_tensor(self.replaced[name])
            if name in self.tokens:
                key, ids = self.tokens[name]
                return weight.to(torch.float32).index_copy(0, torch.tensor(ids), file.get_tensor(key).to(torch.float32))
            if name not in self.low_rank:
                return quantization.round_trip(weight) if quantization else weight.to(torch.float32)
            change = self.low_rank[name]
            if change.stack is not None:
                b, a = (file.get_tensor(key).to(torch.float32) for key in (change.b, change.a))
                return change.stack.delta(b, a).mul_(change.scale).add_(weight)
            rows, columns = weight.shape[::-1] if change.transposed else weight.shape
            b, a = change.factors(file, rows, columns)
            norms = file.get_tensor(change.magnitude).to(torch.float32) if change.magnitude else None
        if quantization:
            weight, b, a = _as_trained(quantization, weight, b, a, change.scale)
        product = b @ a
        # In place: a further matrix of the weight's size would cost as much time as the product itself.
        changed = (product.T if change.transposed else product).mul_(change.scale).add_(weight)
        if norms is None:
            return changed
        changed = changed.contiguous()  # the last bit of a sum depends on its order, and that on the layout
        factor = norms / torch.linalg.norm(changed.T if change.transposed else changed, dim=1)
        return changed.mul_(factor.view(1, -1) if change.transposed else factor.view(-1, 1))


def _as_trained(
    quantization: FrozenQuantization, weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dequantized weight of training, and the B and A that were added to it.

    The second half of an adapter that did not begin at zero is its initial value, negated: PiSSA subtracts that from the weight before it is
    quantized, LoftQ does not.
    """
    import torch

    if quantization.initialization == "default":
        return quantization.round_trip(weight), b, a
    rank = len(a) // 2
    if quantization.initialization == "pissa":
        weight = weight.to(getattr(torch, quantization.dtype)).float() + scale * (b[:, rank:] @ a[rank:])
    return quantization.round_trip(weight), b[:, :rank].contiguous(), a[:rank]


def read_adapter(folder: Path, base: Mapping[str, TensorHeader], *, dequantized: bool = False, tied: bool = False) -> Adapter:
    """Read an adapter's configuration and header, and find the base's tensor for each of its own.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: the base's tensors by their names in its checkpoint, those of a quantized one as `dequantized_headers` gives them.
        dequantized: add to the weights as training dequantized them; `settings.json` beside the adapter records how.
        tied: whether the base's configuration ties embedding and output layer; a base without an output layer is tied in any case.

    Raises:
        OlpackError: no LoRA adapter, a kind that cannot be merged this way, or one for another base.
    """
    file = adapter_files(folder)[1]
    config = _read_config(folder)
    header = read_safetensors_header(file)
    names = BaseNames(base)
    reader = _Reader(folder, config, header, base, names)
    # Matrices that were trained as a whole come first, because an addition to one has its shape.
    parsed = [(key, *_parse(key, folder)) for key in sorted(header)]
    for key, module, kind in sorted(parsed, key=lambda one: one[2] != "whole"):
        reader.add(key, module, kind)
    low_rank, replaced, tokens = reader.low_rank, reader.replaced, reader.tokens
    if not low_rank and not replaced and not tokens:
        raise OlpackError(f"The adapter '{folder}' changes nothing: its file contains no tensors.", "Train it again.")
    if config.get("trainable_token_indices") and not tokens:
        raise OlpackError(
            f"The configuration of the adapter '{folder}' names single trained tokens, and its file contains none.",
            "It was not saved completely: save it again.",
        )
    untied = reader.untie(file) if tied or names.headless else {}
    adapter = Adapter(file, low_rank, replaced, tokens=tokens, untied=untied, vocabulary=reader.vocabulary(untied))
    if not dequantized:
        return adapter
    quantization = read_quantization(folder)
    return replace(adapter, quantization=quantization, quantized=frozenset(names.find(f"{module}.weight") for module in quantization.modules))


def adapter_files(folder: Path, *, dequantized: bool = False) -> list[Path]:
    """The files of an adapter that a merge reads: its configuration, its tensors, and with `dequantized` the record of how olpack trained it.

    Raises:
        OlpackError: one of them is not there.
    """
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise OlpackError(f"'{folder}' is no adapter: it has no adapter_config.json.", "Name the folder that peft's save_pretrained wrote.")
    if not tensors.is_file():
        if (folder / "adapters.safetensors").is_file():
            raise _of_mlx(folder)
        raise OlpackError(f"'{folder}' has no adapter_model.safetensors.", "Save the adapter with save_pretrained (safetensors, not pickle).")
    if dequantized:
        read_quantization(folder)
    return [config, tensors, *([folder / _SETTINGS] if dequantized else [])]


class _Reader:
    """What the tensors of one adapter's file change, taken one after the other."""

    def __init__(self, folder: Path, config: dict, header: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader], names: BaseNames):
        self._folder, self._config, self._header, self._base, self._names = folder, config, header, base, names
        self.low_rank: dict[str, LowRankUpdate] = {}
        self.replaced: dict[str, str] = {}
        self.tokens: dict[str, TrainedTokens] = {}

    def add(self, key: str, module: str, kind: str) -> None:
        """Note what a tensor of the file does. `module` and `kind` are as `_parse` gives them."""
        folder, header, names, found = self._folder, self._header, self._names, self._header[key]
        if kind == "whole":
            self._add_whole(key, module)
        elif kind == _TOKENS:
            self._add_tokens(key, module)
        elif kind.endswith("A"):
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in header:
                raise OlpackError(f"The adapter '{folder}' has '{key}' and no '{other}'.", "It was not saved completely: save it again.")
            if self._config.get("target_parameters") and names.get(f"{module}.weight") is None:
                self._add_stack(key, other, module)
                return
            name = names.find(f"{module}.weight")
            transposed = kind == "lora_embedding_A" or bool(self._config.get("fan_in_fan_out"))
            product = (header[other].shape[0], found.shape[-1])
            _expect_shape(folder, key, product[::-1] if transposed else product, self._shape(name))
            stem = key.partition(".lora_")[0]
            magnitude = next((norms for norms in (f"{stem}.{_NORMS}", f"{stem}.{_NORMS}.weight") if norms in header), None)
            if (magnitude is not None) != bool(self._config.get("use_dora")):
                raise OlpackError(
                    f"The adapter '{folder}' {'has' if magnitude else 'lacks'} the norms of DoRA for '{module}', and its configuration has "
                    f"use_dora: {json.dumps(bool(self._config.get('use_dora')))}.",
                    "It was not saved completely: save it again.",
                )
            if magnitude is not None:
                shape = self._shape(name)
                _expect_shape(folder, magnitude, header[magnitude].shape, shape[1:] if transposed else shape[:1])
            self.low_rank[name] = LowRankUpdate(key, other, _scale(folder, self._config, module, rank=found.shape[0]), transposed, magnitude)
        elif kind == _VECTORS[0]:
            vectors = key, key.replace(*_VECTORS)
            if lost := [part for part in (*_SHARED, vectors[1]) if part not in header]:
                raise OlpackError(
                    f"The adapter '{folder}' has '{key}' and no '{lost[0]}'.", "Save it with save_projection: true in its configuration."
                )
            name = names.find(f"{module}.weight")
            transposed, (a, b) = bool(self._config.get("fan_in_fan_out")), _SHARED
            rows, columns = self._shape(name)[::-1] if transposed else self._shape(name)
            if header[key].shape != (rows,) or header[b].shape[0] < rows or header[a].shape[1] < columns:
                _expect_shape(folder, key, (header[key].shape[0], header[a].shape[1]), (rows, columns))
            self.low_rank[name] = LowRankUpdate(a, b, 1.0, transposed, vectors=vectors)
        elif kind in (_VECTORS[1], "shared"):
            pass  # read with the vector of the rows
        elif kind == _NORMS:
            stem = key.partition(_NORMS)[0]
            if not header.keys() & {f"{stem}lora_A.weight", f"{stem}lora_embedding_A"}:
                raise OlpackError(f"The adapter '{folder}' has '{key}' without its A matrix.", "It was not saved completely: save it again.")
        elif key.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A") not in header:
            raise OlpackError(f"The adapter '{folder}' has '{key}' without its A matrix.", "It was not saved completely: save it again.")

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor before low-rank additions."""
        if name in self.replaced:
            return self._header[self.replaced[name]].shape
        stored = name if name in self._base else self._names.embedding
        assert stored is not None  # a tensor that the base does not store is the output layer, and the embedding in its place
        return self._base[stored].shape

    def _add_whole(self, key: str, tensor: str) -> None:
        if ".original_module." in tensor:  # the matrix before training, which peft saves beside the trained one of a resized vocabulary
            return
        tensor = re.sub(r"\.(modules_to_save|token_adapter|base_layer)(?=\.)", "", tensor)
        name = self._names.find(tensor)
        shape, wanted = self._header[key].shape, self._shape(name)
        if name not in self._names.vocabularies or shape[1:] != wanted[1:]:
            _expect_shape(self._folder, key, shape, wanted)
        if name not in self.replaced or ".modules_to_save." in key:
            self.replaced[name] = key

    def _add_tokens(self, key: str, module: str) -> None:
        asked = self._config.get("trainable_token_indices") or self._config.get("token_indices")
        if isinstance(asked, dict):
            asked = next((rows for place, rows in asked.items() if f".{module}".endswith(f".{place}")), next(iter(asked.values()), None))
        name, shape = self._names.find(f"{module}.weight"), self._header[key].shape
        if not isinstance(asked, list) or not all(type(row) is int for row in asked) or (len(asked),) != shape[:1]:
            raise OlpackError(
                f"The adapter '{self._folder}' contains {shape[0]} trained tokens of '{module}', and its configuration does not name as many.",
                "It was not saved completely: save it again.",
            )
        rows, *columns = self._shape(name)
        _expect_shape(self._folder, key, shape[1:], tuple(columns))
        if wrong := [row for row in asked if not 0 <= row < rows]:
            raise OlpackError(
                f"The adapter '{self._folder}' trained token {wrong[0]}, and the base's embedding has {rows:,} rows.",
                "Save it with save_embedding_layers=True, or name the base whose embedding was resized.",
            )
        self.tokens[name] = key, tuple(asked)

    def _add_stack(self, a: str, b: str, module: str) -> None:
        shapes = {name: header.shape for name, header in self._base.items()}
        for name, parameter, rank, stack in find_stacks(
            self._folder, self._config, module, self._header[a].shape, self._header[b].shape, shapes, self._names.get
        ):
            self.low_rank[name] = LowRankUpdate(a, b, _scale(self._folder, self._config, parameter, rank=rank), transposed=False, stack=stack)

    # -- one matrix as embedding and as output layer ------------------------------------------------------------------------------------------

    def untie(self, file: Path) -> dict[str, str]:
        """The output layer that training made a matrix of its own, to the embedding's name; none where both are still one.

        peft gives each module its own copy, so what was trained of one leaves the other as it was. Both are one still where it saved one change
        twice (`ensure_weight_tying`, a resized vocabulary), and where single tokens of the embedding were trained.
        """
        embedding, head = self._names.embedding, self._names.head
        if embedding is None:
            return {}
        here, there = self._change(embedding), self._change(head)
        if not any(here) and not any(there):
            return {}
        if here.tokens and any(there) and not there.tokens:
            raise OlpackError(
                f"The adapter '{self._folder}' trained single tokens of the embedding and '{head}' otherwise, and the base uses one "
                "matrix for both, which peft cannot compute.",
                "Train one of the two.",
            )
        only_tokens = here.tokens and not here.low_rank and not any(there)
        tied = not any(there) and bool(self._config.get("ensure_weight_tying"))
        if only_tokens or tied or (any(here) and any(there) and _same(file, here, there)):
            stored = head in self._base
            _copy(self.low_rank, head, here.low_rank if stored else None)
            _copy(self.replaced, head, here.replaced if stored else None)
            _copy(self.tokens, head, here.tokens if stored else None)
            return {}
        return {} if head in self._base else {head: embedding}

    def _change(self, name: str) -> _Change:
        return _Change(self.low_rank.get(name), self.replaced.get(name), self.tokens.get(name))

    def vocabulary(self, untied: Mapping[str, str]) -> int | None:
        """Rows of the embedding where they are not as many as the base's."""
        embedding = self._names.embedding
        if embedding is None:
            return None
        names = [name for name in self._names.vocabularies if name in self._base or name in untied]
        rows = {name: self._shape(name)[0] for name in names}
        if len(set(rows.values())) > 1:
            (one, count), (other, too) = sorted(rows.items(), key=lambda item: item[0] not in self.replaced)[:2]
            raise OlpackError(
                f"The adapter '{self._folder}' has {count:,} rows for '{one}', because its vocabulary was resized, and '{other}' has {too:,}.",
                "Save it with save_pretrained(…, save_embedding_layers=True), which saves both.",
            )
        found = next(iter(rows.values()))
        return found if found != self._base[embedding].shape[0] else None


class _Change(NamedTuple):
    """What training changed of one tensor."""

    low_rank: LowRankUpdate | None
    replaced: str | None
    tokens: TrainedTokens | None


_T = TypeVar("_T")


def _copy(changes: dict[str, _T], name: str, change: _T | None) -> None:
    """Set what is changed of a tensor; None: nothing."""
    changes.pop(name, None)
    if change is not None:
        changes[name] = change


def _same(file: Path, embedding: _Change, head: _Change) -> bool:
    """Whether embedding and output layer were changed alike, so that both are one matrix still."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:

        def low_rank(one: LowRankUpdate | None, other: LowRankUpdate | None) -> bool:
            if one is None or other is None:
                return one is other
            turned = one.transposed and not other.transposed
            return turned and one.scale == other.scale and _equal(opened, one.a, other.b, turned=True) and _equal(opened, one.b, other.a, turned=True)

        def tokens(one: TrainedTokens | None, other: TrainedTokens | None) -> bool:
            if one is None or other is None:
                return one is other
            return one[1] == other[1] and _equal(opened, one[0], other[0])

        def whole(one: str | None, other: str | None) -> bool:
            return one is other if one is None or other is None else _equal(opened, one, other)

        return low_rank(embedding.low_rank, head.low_rank) and tokens(embedding.tokens, head.tokens) and whole(embedding.replaced, head.replaced)


def _equal(file: Any, one: str, other: str, *, turned: bool = False) -> bool:
    import torch

    if turned:
        return torch.equal(file.get_tensor(one).T, file.get_tensor(other))
    mine, theirs = file.get_slice(one), file.get_slice(other)
    if mine.get_shape() != theirs.get_shape() or mine.get_dtype() != theirs.get_dtype():
        return False
    return all(torch.equal(mine[first : first + 4096], theirs[first : first + 4096]) for first in range(0, mine.get_shape()[0], 4096))


def read_quantization(folder: Path) -> FrozenQuantization:
    """How training quantized the base of an adapter.

    Raises:
        OlpackError: olpack did not train it, or on a base that it did not quantize.
    """
    path = folder / _SETTINGS
    again = "Set `train.merge_base: original`."
    found = bounded_json.read_object(path, again).get("held") if path.is_file() else None
    if found is None:
        raise OlpackError(
            f"The adapter '{folder}' does not record how olpack quantized its base, so the dequantized weights of training are unknown.",
            again,
        )
    try:
        return TypeAdapter(FrozenQuantization).validate_python(found)
    except ValidationError:
        raise OlpackError(f"{path} records a quantization that is none of olpack's.", again) from None


def _read_config(folder: Path) -> dict:
    path = folder / "adapter_config.json"
    for file in sorted(folder.iterdir()):
        bounded_json.check_regular(file)
    config = bounded_json.read_object(path, "Save the adapter again.")
    kind = config.get("peft_type")
    if kind is None and "fine_tune_type" in config:
        raise _of_mlx(folder)
    if kind not in ("LORA", "VERA", "TRAINABLE_TOKENS"):
        raise OlpackError(f"The adapter '{folder}' is of the kind {kind}, and only LoRA and VeRA can be merged.", "Train a LoRA adapter.")
    _check_numbers(path, config)
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


def _of_mlx(folder: Path) -> OlpackError:
    return OlpackError(
        f"The adapter '{folder}' is one of MLX, whose matrices have other names and sides than peft's.",
        "Merge it with mlx_lm.fuse, and name the merged folder as the model.",
    )


def _check_numbers(path: Path, config: dict) -> None:
    """Raises OlpackError where a rank or an alpha is none, or a pattern for them cannot be a pattern."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def refuse(what: str) -> NoReturn:
        raise OlpackError(f"'{path}' is no valid adapter configuration: {what}.", "Save the adapter again.")

    if config["peft_type"] == "LORA" and not number(config.get("lora_alpha")):
        refuse(f"its lora_alpha is {json.dumps(config['lora_alpha'])} and no number" if "lora_alpha" in config else "it has no lora_alpha")
    if config.get("r") is not None and not (type(config["r"]) is int and config["r"] > 0):
        refuse(f"its rank r is {json.dumps(config['r'])}")
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(setting) or {}
        if not isinstance(patterns, dict) or not all(map(number, patterns.values())):
            refuse(f"its {setting} is no table of patterns and numbers")
        for pattern in patterns:
            try:
                regex.compile(pattern)
            except (regex.error, RecursionError) as error:
                refuse(f"'{pattern}' in its {setting} is no regular expression ({error})")


def _parse(key: str, folder: Path) -> tuple[str, str]:
    """(module, "lora_A"), or (tensor, "whole") for one that was trained as a whole."""
    if key in _SHARED:
        return key, "shared"
    if "_orig_mod." in key:
        raise OlpackError(
            f"The adapter '{folder}' contains '{key}': it was saved from a model that torch.compile had wrapped, and peft finds no module "
            "of such a name.",
            "Save it from the model itself (model._orig_mod.save_pretrained), or take '_orig_mod.' out of the names.",
        )
    if not key.startswith(_PREFIX):
        raise OlpackError(f"The adapter '{folder}' contains '{key}', a name that peft does not give.", "Save it with peft's save_pretrained.")
    name = key
    while name.startswith(_PREFIX):  # a model that was wrapped twice has the prefix twice
        name = name.removeprefix(_PREFIX)
    if match := re.fullmatch(rf"(.+?)(?:\.token_adapter)?\.{_TOKENS}", name):
        return match[1], _TOKENS
    match = re.fullmatch(rf"(.+)\.(lora_[AB])\.weight|(.+)\.(lora_embedding_[AB])|(.+)\.({_NORMS})(?:\.weight)?", name)
    if match:
        module, kind = (found for found in match.groups() if found)
        return module, kind
    if match := re.fullmatch(rf"(.+)\.({'|'.join(_VECTORS)})", name):
        return match[1], match[2]
    if ".lora_" in name:
        raise OlpackError(
            f"The adapter '{folder}' contains '{key}', which a plain LoRA merge would lose.",
            "Merge it with peft (merge_and_unload) and export the merged folder.",
        )
    return name, "whole"


def _expect_shape(folder: Path, key: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(got) != tuple(wanted):
        raise OlpackError(
            f"The adapter '{folder}' is for another base: '{key}' makes {list(got)}, and the base has {list(wanted)} there.",
            "Name the base that it was trained on.",
        )


def _scale(folder: Path, config: dict, module: str, rank: int) -> float:
    def setting(patterns: dict, default: float) -> float:
        # peft's rule: a pattern is a regular expression for the end of the module's name, the first that fits counts.
        for pattern, value in patterns.items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                    return value
            except TimeoutError:
                raise OlpackError(
                    f"The pattern '{pattern}' in the configuration of the adapter '{folder}' takes more than {_PATTERN_SECONDS} s to "
                    f"compare with '{module}'.",
                    "Write it without nested repetitions.",
                ) from None
        return default

    named = setting(config.get("rank_pattern") or {}, config.get("r") or rank)
    if named != rank:
        raise OlpackError(f"The adapter's '{module}' has rank {rank}, and its configuration gives {named}.", "Save the adapter again.")
    alpha = setting(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
