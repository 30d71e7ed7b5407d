"""Special tokens that the rows use and the base never trained: a chat template on a base model that has seen no chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress
from typing import TYPE_CHECKING, Literal

import torch

from olpack.data import TokenRow
from olpack.model.base import Base
from olpack.model.checkpoint import TensorHeader
from olpack.model.gguf_architectures import weights_of
from olpack.model.gguf_base import GgufBase
from olpack.model.names import BaseNames
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train.adapter import adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SMALL = 0.05  # of the median norm
_ALIKE = 0.05  # of a vector's norm; vectors of two tokens that were trained are apart by about as much as they are long
_SAMPLE = 256  # vectors that stand for all of their kind
_UNQUANTIZED = ("F64", "F32", "F16", "BF16")


def untrained_tokens(
    base: Base, settings: Train, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], package: Literal["merged", "adapter"] = "merged"
) -> str | None:
    """A warning that names the added tokens of the rows whose vectors the base never trained, and the setting that trains them.

    A vector counts as untrained if it is shorter than a twentieth of the median vector of the ordinary tokens (weight decay leaves such), or if
    its distance from that of another added token is less than a twentieth of its length: a token that the rows use, or one that no row uses, such
    as `<|reserved_special_token_5|>` or the padding behind the vocabulary. An output layer moves all tokens that no text has by the same gradient,
    and a resized embedding draws its new vectors closely around one mean, so such vectors are nearly the same, and seldom equal byte for byte.

    The input embedding is judged by all tokens of the rows, and an output layer of its own by the target tokens, since no other is predicted. What
    the adapter trains is not judged. Of the checkpoint, only the vectors that are compared are read.

    Args:
        base: what is trained.
        settings: of the adapter.
        tokenizer: of the base.
        rows: the training rows.
        package: the recipe's; only a merged one takes trained vectors.
    """
    from transformers.core_model_loading import revert_weight_conversion

    meta = MetaModel(base.config, base.label)
    config = adapter_config(base, settings)
    changed = {*(config.target_modules or []), *(config.modules_to_save or [])}
    places = {id(module): name for name, module in meta.module.named_modules()}
    added = set(tokenizer.added_tokens_decoder)
    judged = {places[id(meta.module.get_input_embeddings())]: added.intersection(chain.from_iterable(row.ids for row in rows))}
    if not meta.shape.tied:
        targets = added.intersection(chain.from_iterable(compress(row.ids, row.loss_mask) for row in rows))
        judged[places[id(meta.module.get_output_embeddings())]] = targets
    headers = base.tensor_headers()
    names = BaseNames(headers)
    untrained: dict[str, list[str]] = {}  # by module
    for module, used in judged.items():
        (stored,) = revert_weight_conversion(meta.module, {f"{module}.weight": meta.module.get_parameter(f"{module}.weight")})
        name = names.get(stored)
        if module in changed or name not in headers or (base.gguf is None and headers[name].dtype not in _UNQUANTIZED):
            continue
        read = partial(_read, name, headers[name]) if base.gguf is None else partial(_read_blocks, base.gguf, meta.module, name)
        if tokens := _untrained(read, headers[name].shape[0], used, added, len(tokenizer)):
            untrained[module.rpartition(".")[2]] = list(tokenizer.convert_ids_to_tokens(tokens))
    if not untrained:
        return None
    asked = [f"`train.modules_to_save: [{', '.join([*settings.modules_to_save, *untrained])}]`"]
    asked += ["`train.method: lora`"] if settings.method == "vera" and meta.shape.tied else []
    asked += ["`package: merged`"] if package == "adapter" else []
    where = "; ".join(f"{', '.join(names)} in {module}" for module, names in untrained.items())
    return (
        f"{base.label} never trained all special tokens of the rows. Their vectors are next to zero, or the same as those of other special "
        f"tokens: {where}. An adapter on linear layers leaves them as they are, so the answers may never end. Train them with "
        f"{' and '.join(asked)}, take the instruct version of the base, or a chat template of tokens that the base knows."
    )


def _untrained(read: Callable[[list[int]], torch.Tensor], count: int, used: set[int], added: set[int], size: int) -> list[int]:
    """Those of the tokens whose vectors are untrained.

    Args:
        read: the vectors of tokens, [tokens, size], float32.
        count: of the vectors in the table.
        used: the tokens that are judged, all of them added ones.
        added: all tokens that were added to the vocabulary.
        size: of the vocabulary. Vectors behind it are of no token.
    """
    asked = sorted(token for token in used if token < count)
    ordinary = _sample([token for token in range(min(size, count)) if token not in added])
    unused = _sample([token for token in sorted({*added, *range(size, count)} - used) if token < count])
    if not asked or not ordinary:
        return []
    vectors = read([*asked, *unused, *ordinary])
    norms, special = vectors.norm(dim=1), len(asked) + len(unused)
    small = norms[: len(asked)] < _SMALL * norms[special:].median()
    distances = torch.cdist(vectors[: len(asked)], vectors[:special], compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)  # of a token from itself
    alike = (distances < _ALIKE * norms[: len(asked), None]).any(dim=1)
    return list(compress(asked, (small | alike).tolist()))


def _sample(tokens: list[int]) -> list[int]:
    """Tokens from everywhere in the list, all of it where it is short."""
    return tokens[:: max(1, len(tokens) // _SAMPLE)][:_SAMPLE]


def _read(name: str, header: TensorHeader, tokens: list[int]) -> torch.Tensor:
    """Rows of a table of vectors. The others stay on the disk."""
    from safetensors import safe_open

    with safe_open(str(header.file), framework="pt") as file:
        table = file.get_slice(name)
        return torch.cat([table[token : token + 1] for token in tokens]).float()


def _read_blocks(base: GgufBase, model: PreTrainedModel, name: str, tokens: list[int]) -> torch.Tensor:
    """As `_read`, of a GGUF."""
    (tensor,) = weights_of(base, model)[name].tensors
    return base.tensors[tensor].type.dequantize(base.blocks(tensor)[tokens])
