"""What a page's command blocks find: a Hub's cache with a small model under the name of a large one, a finished build, and faults.

A block with `<!-- scene: NAME -->` is run after the scene of that name. A scene changes the page's working folder or the server; what it yields
to is undone after the block.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ollama_double
import pytest
from ollama_double import OllamaDouble
from oracle import write_base

MODEL, COMMIT = "Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"


@dataclass
class Workplace:
    """The working folder of a page, the server that it sees, and the base model's folder in the Hub's cache."""

    folder: Path
    server: OllamaDouble
    base: Path

    def broken_base(self, name: str) -> Path:
        """A copy of the base to break, which `modelfiles/support` then names."""
        shutil.copytree(self.base, copy := self.folder / name)
        recipe = self.folder / "modelfiles/support/recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f'base: "{MODEL}"', f"base: ../../{name}"))
        return copy


def write_hub_cache(root: Path) -> Path:
    """A cache of the Hub in which `MODEL` is a model of two small layers; its folder."""
    cached = root / f"models--{MODEL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(COMMIT)
    return write_base(cached / "snapshots" / COMMIT)


def _weights(folder: Path, change: Callable[[dict], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without_a_trained_end(place: Workplace) -> None:
    _weights(place.broken_base("base"), lambda tensors: tensors["model.embed_tokens.weight"][:3].zero_())


def without_an_output_layer(place: Workplace) -> None:
    _json(place.broken_base("base") / "config.json", lambda config: config.update(tie_word_embeddings=False))


def with_a_weight_that_is_no_number(place: Workplace) -> None:
    _weights(place.broken_base("base"), lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"][0].fill_(float("nan")))


def with_a_pre_tokenizer_of_its_own(place: Workplace) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}|[^\p{N}]{1,3}"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    path = place.broken_base("base") / "tokenizer.json"
    _json(path, lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [pattern, level]}))


def registered_by_hand(place: Workplace) -> None:
    from olpack.deploy.client import OllamaClient

    template = "{{ .System }} {{ .Prompt }} "
    OllamaClient(place.server.url).create({"model": "support:q4_K_M", "from": "support:q4_K_M", "template": template})


@contextlib.contextmanager
def answers_that_loop(place: Workplace) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.server, "answer", lambda prompt: ollama_double.LOOP)
        yield


@contextlib.contextmanager
def no_gpu(place: Workplace) -> Iterator[None]:
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@contextlib.contextmanager
def little_space(place: Workplace) -> Iterator[None]:
    usage = shutil.disk_usage(place.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_200_000))
        yield


@contextlib.contextmanager
def full_disk_of_the_server(place: Workplace) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.server.faults, "disk_left", 0)
        yield


def without_the_tags(place: Workplace) -> None:
    from olpack.deploy.client import OllamaClient

    client = OllamaClient(place.server.url)
    for tag in client.tags():
        client.delete(tag.model)


def rows_with_tools(place: Workplace) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Riyadh"}}}
    turns = [{"role": "user", "content": "Hot in Riyadh?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (place.folder / "calls.jsonl").write_text(json.dumps({"tools": tools, "messages": turns}) + "\n")


def ten_epochs(place: Workplace) -> None:
    recipe = place.folder / "modelfiles/support/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 2\n", "epochs: 10\n").replace("batch_size: 16 ", "batch_size: 4 "))


def model_in_a_folder(place: Workplace) -> None:
    shutil.copytree(place.base, place.folder / "models/Qwen3-0.6B")


def earlier_results(place: Workplace) -> None:
    shutil.copy(place.folder / "build/support/compare/results.json", place.folder / "before.json")


SCENES: dict[str, Callable[[Workplace], object]] = {
    "a base whose special tokens were never trained": without_a_trained_end,
    "a base that lacks its output layer": without_an_output_layer,
    "a base with a weight that is no number": with_a_weight_that_is_no_number,
    "a base with a pre-tokenizer of its own": with_a_pre_tokenizer_of_its_own,
    "somebody registered the tag by hand": registered_by_hand,
    "the model repeats itself": answers_that_loop,
    "no GPU": no_gpu,
    "1.2 MB of free space": little_space,
    "the server's disk is full": full_disk_of_the_server,
    "the server lost its models": without_the_tags,
    "ten epochs in batches of four": ten_epochs,
    "rows with tool calls": rows_with_tools,
    "the base in a folder": model_in_a_folder,
    "a copy of earlier results": earlier_results,
}


@contextlib.contextmanager
def scene(name: str | None, place: Workplace) -> Iterator[None]:
    """The scene of a block, for as long as the block runs."""
    made = SCENES[name](place) if name else None
    with made if isinstance(made, contextlib.AbstractContextManager) else contextlib.nullcontext():
        yield
