"""The model of an estimate: a folder, a config.json, a Hub id, a GGUF, or only a number of parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.model.shape import MetaModel

# Public shapes, one for each class of size, as their publishers' config.json has them.
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8}
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _of(family: dict[str, Any], *widths: int, **more: Any) -> dict[str, Any]:
    return {**family, **dict(zip(_WIDTHS, widths, strict=True)), **more}


_SHAPES: dict[str, tuple[float, dict[str, Any]]] = {  # name: (parameters, configuration)
    "SmolLM2-135M": (134.5e6, _of(_LLAMA, 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)),
    "Qwen3-0.6B": (596.0e6, _of(_QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True)),
    "Qwen3-1.7B": (1.721e9, _of(_QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True)),
    "Qwen3-4B": (4.022e9, _of(_QWEN3, 2560, 9728, 36, 32, tie_word_embeddings=True)),
    "Mistral-7B-v0.3": (7.248e9, _of(_LLAMA, 4096, 14336, 32, 32, vocab_size=32768)),
    "Llama-3.1-8B": (8.030e9, _of(_LLAMA, 4096, 14336, 32, 32, vocab_size=128256)),
    "Qwen3-14B": (14.768e9, _of(_QWEN3, 5120, 17408, 40, 40)),
    "Qwen3-32B": (32.762e9, _of(_QWEN3, 5120, 25600, 64, 64)),
    "Yi-34B": (34.389e9, _of(_LLAMA, 7168, 20480, 60, 56, vocab_size=64000)),
    "Llama-3.1-70B": (70.554e9, _of(_LLAMA, 8192, 28672, 80, 64, vocab_size=128256)),
    "Llama-3.1-405B": (405.853e9, _of(_LLAMA, 16384, 53248, 126, 128, vocab_size=128256)),
}
_NEAR = 0.05  # a shape this near is taken as it is
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Subject:
    """The model of an estimate.

    Attributes:
        label: what it is called in the output.
        config: the fields of its config.json; None for a GGUF.
        gguf: the file, where there is one.
        note: what a reader must know of it: that its shape is a typical one.
    """

    label: str
    config: dict[str, Any] | None = None
    gguf: Path | None = None
    note: str = ""

    @cached_property
    def model(self) -> MetaModel:
        """The model without data; of a subject with a configuration only."""
        from olpack.model.shape import MetaModel

        if self.config is None:
            raise OlpackError(f"{self.label} is a GGUF, which has no config.json.", "Name the model that it was made from.")
        return MetaModel(self.config, self.label)


def find(label: str) -> Subject:
    """A model by what a user calls it: a GGUF, a config.json, a folder, builtin/NAME, ollama/NAME, or a Hub id, of which only config.json is fetched.

    Raises:
        OlpackError: there is no such model.
    """
    path = Path(label).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise OlpackError(f"There is no file {label}.", "Correct the path.")
        return Subject(path.name, gguf=path)
    from olpack.model.base import OF_SERVER, config_of
    from olpack.model.gguf_files import WHEELS, fetched_model

    if label.startswith(OF_SERVER):
        from olpack.deploy.tag_bases import find_tag

        return Subject(label, gguf=find_tag(label.removeprefix(OF_SERVER)).path)
    if (name := label.removeprefix("builtin/")) != label and name in WHEELS:
        return Subject(label, gguf=fetched_model(name))
    return Subject(label, config_of(label))


def typical(size: str) -> Subject:
    """A model of a size: the published shape nearest to it, with layers added or left out where the sizes differ.

    Args:
        size: number of parameters: "8B", "1.5b", "350M".

    Raises:
        OlpackError: no number, or one that no transformer has.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", size, re.IGNORECASE)
    wanted = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 10e6 <= wanted <= 4e12:
        raise OlpackError(f"'{size}' is not a number of parameters.", "Write it as in 8B, 1.5B or 350M.")
    name = min(_SHAPES, key=lambda name: abs(math.log(wanted / _SHAPES[name][0])))
    parameters, config = _SHAPES[name]
    note = f"a typical shape, that of {name}"
    if abs(wanted / parameters - 1) > _NEAR:
        layers = config["num_hidden_layers"]
        fixed = config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2)
        count = max(1, round(layers * (wanted - fixed) / (parameters - fixed)))
        note += f" with {count} layers in place of {layers}"
        config = {**config, "num_hidden_layers": count}
    return Subject(size.strip().upper(), config, note=f"{note}; name a model for exact figures")
