"""What a quant takes in llama.cpp: weights, KV cache, compute graph; and how much of it fits on a GPU of a given size."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from olpack import progress, workers
from olpack.errors import OlpackError
from olpack.llamacpp.library import INSTALL, row_size
from olpack.memory.job import Answer, DryRun, Job, Result, Setting
from olpack.memory.model_source import Subject
from olpack.model.gguf_header import read_header
from olpack.model.shape import write_header_only_checkpoint
from olpack.quants import QUANT_TYPES
from olpack.workspace import scratch

KV_TYPES = ("f16", "q8_0", "q4_0")
# What a vocabulary takes in llama.cpp, measured on the byte-level ones in its source: tables, and text, piece and merges of a token.
_VOCABULARY, _TOKEN = 3_500_000, 310
_BLOCK = re.compile(r"blk\.(\d+)\.")
_INPUTS = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")


@dataclass(frozen=True)
class Footprint:
    """Bytes that one quant takes with one setting. All of it is llama.cpp's own arithmetic, none of it measured.

    Attributes:
        quant: its name, "Q4_K_M".
        setting: of the run.
        layer_weights: of each repeating layer.
        input_weights: token embeddings, which llama.cpp keeps in RAM.
        output_weights: final norm and output layer; without the output layer where it is tied to the embedding.
        tied: whether the output layer is the embedding; with it on the GPU, a copy of the embedding is there, too.
        layer_cache: KV cache of each layer, window and padding as llama.cpp has them; 0 for layers without one.
        state_bytes: of recurrent layers.
        compute_bytes: the largest graph's activations, mask and logits.
        output_bytes: where logits are copied to.
        process_bytes: vocabulary and bookkeeping, always in RAM.
    """

    quant: str
    setting: Setting
    layer_weights: tuple[int, ...]
    input_weights: int
    output_weights: int
    tied: bool
    layer_cache: tuple[float, ...]
    state_bytes: int
    compute_bytes: int
    output_bytes: int
    process_bytes: int

    @property
    def weights(self) -> int:
        return sum(self.layer_weights) + self.input_weights + self.output_weights

    @property
    def cache(self) -> int:
        """KV cache and recurrent state."""
        return round(sum(self.layer_cache)) + self.state_bytes

    @property
    def buffers(self) -> int:
        """Compute graph and logits."""
        return self.compute_bytes + self.output_bytes

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.process_bytes

    @property
    def layers(self) -> int:
        """As llama.cpp counts them for a GPU: the repeating layers, and the output layer as one more."""
        return len(self.layer_weights) + 1

    def on_gpu(self, layers: int) -> int:
        """Bytes on the GPU with the last `layers` layers on it (llama.cpp's n_gpu_layers), the first of which is the output layer."""
        if layers == 0:
            return 0
        count = layers - 1
        output = self.output_weights + (self.input_weights if self.tied else 0)
        blocks = sum(self.layer_weights[len(self.layer_weights) - count :]) + round(sum(self.layer_cache[len(self.layer_cache) - count :]))
        return output + blocks + round(self.state_bytes * count / (self.layers - 1)) + self.compute_bytes

    def in_ram(self, layers: int) -> int:
        """Bytes in RAM with as many layers on the GPU. The compute graph needs its share on both sides while both compute."""
        count = self.layers - 1 - max(0, layers - 1)
        state = round(self.state_bytes * count / (self.layers - 1))
        blocks = sum(self.layer_weights[:count]) + round(sum(self.layer_cache[:count])) + state
        output = self.output_weights if layers == 0 else 0
        compute = self.compute_bytes if count else 0
        return self.input_weights + blocks + output + compute + self.output_bytes + self.process_bytes


@dataclass(frozen=True)
class ModelLayout:
    """What llama.cpp reports of a model, whatever the quant.

    Attributes:
        architecture: llama.cpp's name.
        layers, kv_heads: as it prints them; `kv_heads` is a list in text where layers differ.
        sliding: layers with a sliding window.
        recurrent: whether layers keep a state in place of keys and values.
        flash: whether flash attention is used.
    """

    architecture: str
    layers: int
    kv_heads: str
    sliding: tuple[int, ...]
    recurrent: bool
    flash: bool


def plan(subject: Subject, quants: Sequence[str], setting: Setting) -> tuple[list[Footprint], ModelLayout]:
    """The footprints of a model's quants, without its weights.

    Args:
        subject: a model that has a configuration.
        quants: names of quant types.
        setting: how llama.cpp runs it.

    Raises:
        OlpackError: transformers, llama.cpp's converter or llama.cpp does not know the architecture, or a quant needs an importance matrix.
    """
    from olpack.llamacpp.source import converter_source

    source = converter_source()
    with scratch() as folder, progress.task(f"asking llama.cpp about {subject.label}"):
        write_header_only_checkpoint(subject.model, folder)
        result = _work(Job(setting, folder=str(folder), converter=str(source), quants=list(quants)), subject.label)
    vocabulary = _VOCABULARY + _TOKEN * subject.model.shape.vocabulary
    return [_footprint(quant, setting, result.tensors[quant], result.run, vocabulary) for quant in quants], _layout(result.run)


def read(path: Path, setting: Setting) -> tuple[Footprint, ModelLayout]:
    """The footprint of a GGUF.

    Raises:
        OlpackError: no GGUF, one part of several, or one that llama.cpp refuses.
    """
    header = read_header(path)
    if (header.integer("split.count") or 1) > 1:
        raise OlpackError(f"{path} is one part of a GGUF in several files.", "Join them with llama-gguf-split --merge.")
    tensors = [(name, math.prod(shape) // shape[0] * row_size(type_, shape[0])) for name, (shape, type_) in header.tensors.items()]
    run = _work(Job(setting, file=str(path.absolute())), path.name).run
    by_number = {quant.ftype: quant.name for quant in QUANT_TYPES.values()}
    quant = by_number.get(header.integer("general.file_type"), path.stem)
    return _footprint(quant, setting, tensors, run, 0), _layout(run)


def _footprint(quant: str, setting: Setting, tensors: Sequence[tuple[str, int]], run: DryRun, vocabulary: int) -> Footprint:
    layers = int(run.info.get("n_layer_all") or run.info["n_layer"])
    blocks, inputs, output, tied = [0] * layers, 0, 0, True
    for name, size in tensors:
        if (match := _BLOCK.match(name)) and int(match[1]) < layers:
            blocks[int(match[1])] += size
        elif name.startswith(_INPUTS):
            inputs += size
        else:
            output += size
            tied = tied and not name.startswith("output.")
    cache = [0.0] * layers
    for shared in run.caches:
        for layer in shared.layers:  # llama.cpp logs the sum of a cache; layers of one cache have the same number of cells
            cache[layer] += shared.nbytes / len(shared.layers)
    return Footprint(
        quant,
        setting,
        tuple(blocks),
        inputs,
        output,
        tied,
        tuple(cache),
        run.state_bytes,
        run.compute_bytes,
        run.output_bytes,
        run.process_bytes + vocabulary,
    )


def _layout(run: DryRun) -> ModelLayout:
    layers, kv_heads = int(run.info["n_layer"]), run.info.get("n_head_kv", "?")
    return ModelLayout(run.info["arch"], layers, kv_heads, tuple(run.sliding), run.state_bytes > 0, run.flash)


def _work(job: Job, label: str) -> Result:
    """Run one job in a worker process."""
    child = subprocess.run(
        workers.command("olpack.memory.worker"),
        input=json.dumps(asdict(job)),
        env=workers.environment(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if child.returncode == 0:
        answer = TypeAdapter(Answer).validate_json(child.stdout)
        if answer.result is None:
            raise OlpackError(answer.problem.replace(job.folder, label) if job.folder else answer.problem, answer.remedy)
        return answer.result
    raise workers.exit_error(
        f"The process that asked llama.cpp about {label}",
        child.returncode,
        child.stderr,
        f"If `olpack doctor` finds llama.cpp broken, install it again: {INSTALL}",
    )
