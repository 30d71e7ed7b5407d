"""What a model takes for inference and training, precision by precision, beside the tutorials' rule "parameters × bytes"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from olpack.errors import OlpackError
from olpack.memory.footprint import Footprint, ModelLayout, plan, read
from olpack.memory.job import Setting
from olpack.memory.model_source import Subject
from olpack.memory.published import rule_of_thumb
from olpack.model.shape import MetaModel, Parameters, Shape
from olpack.progress import quantity
from olpack.train.memory import TrainingMemory, estimate_training, frozen_bytes

_RULE = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5}  # bytes a weight, as tutorials have them
TITLES = {"float32": "FP32", "bfloat16": "FP16, BF16", "int8": "8-bit", "nf4": "4-bit NF4"}


@dataclass(frozen=True)
class Loaded:
    """A model in transformers, in bytes.

    Attributes:
        precision: "float32", "bfloat16", "int8" or "nf4".
        weights: as `get_memory_footprint` of transformers counts them.
        constants: of quantization, which it does not count.
        cache: keys and values of one sequence that fills the context.
        rule: parameters × bytes.
    """

    precision: str
    weights: int
    constants: int
    cache: int
    rule: int

    @property
    def total(self) -> int:
        return self.weights + self.constants + self.cache


@dataclass(frozen=True)
class MemoryEstimate:
    """What a model takes. Of a GGUF, the fields that need its original's configuration are None or empty."""

    label: str
    parameters: Parameters | None
    shape: Shape | None
    setting: Setting
    loaded: list[Loaded]
    quants: list[Footprint]
    layout: ModelLayout | None
    rank: int
    tokens: int
    training: dict[str, TrainingMemory]
    count: int
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        """Plain data, bytes throughout."""
        training = {
            name: {**asdict(one), "peak": one.total(checkpointing=False), "peak_checkpointing": one.total(checkpointing=True)}
            for name, one in self.training.items()
        }
        quants = [
            {
                "quant": f.quant,
                "weights": f.weights,
                "kv": f.cache,
                "buffers": f.buffers,
                "process": f.process_bytes,
                "total": f.total,
                "rule": rule_of_thumb(f.quant, self.count),
            }
            for f in self.quants
        ]
        return {
            "model": self.label,
            "parameters": self.parameters and asdict(self.parameters) | {"total": self.parameters.total},
            "shape": self.shape and asdict(self.shape),
            "setting": asdict(self.setting),
            "transformers": [asdict(row) | {"total": row.total} for row in self.loaded],
            "llama_cpp": quants,
            "layout": self.layout and asdict(self.layout),
            "training": {"rank": self.rank, "tokens": self.tokens, **training},
            "notes": self.notes,
        }


def estimate(subject: Subject, quants: Sequence[str], setting: Setting, *, rank: int, tokens: int) -> MemoryEstimate:
    """Memory of a model for inference with transformers and llama.cpp, and for training.

    Args:
        subject: the model.
        quants: llama.cpp's quant types to look at; of a GGUF, its own is.
        setting: context and type of the KV cache.
        rank: of the adapter.
        tokens: that go through the model at once in training.

    Raises:
        OlpackError: the configuration makes no model, or the GGUF none that llama.cpp loads. Where only the converter or llama.cpp does
            not know the architecture, the estimate lacks their figures and a note gives the reason.
    """
    if subject.gguf is not None:
        from olpack.model.gguf_header import read_header

        footprint, gguf_layout = read(subject.gguf, setting)
        notes = ["A GGUF cannot be trained: name the model that it was made from for the memory of training and of other precisions."]
        return MemoryEstimate(
            subject.label,
            None,
            None,
            setting,
            [],
            [footprint],
            gguf_layout,
            rank,
            tokens,
            {},
            read_header(subject.gguf).parameters,
            [*notes, *_llama_notes(gguf_layout, [footprint])],
        )
    model = subject.model
    loaded = [_loaded(model, precision, setting.context) for precision in TITLES]
    precisions = {"QLoRA": "nf4", "LoRA": "bfloat16"}
    training = {name: estimate_training(model, rank=rank, tokens=tokens, precision=precision) for name, precision in precisions.items()}
    notes = [f"Computed for {subject.note}."] if subject.note else []
    notes += _notes(model, loaded, training)
    footprints: list[Footprint] = []
    layout: ModelLayout | None = None
    try:
        footprints, layout = plan(subject, quants, setting)
        notes += _llama_notes(layout, footprints)
    except OlpackError as error:
        notes.append(f"No figures of llama.cpp: {error}")
    return MemoryEstimate(
        subject.label, model.parameters, model.shape, setting, loaded, footprints, layout, rank, tokens, training, model.parameters.text, notes
    )


def _loaded(model: MetaModel, precision: str, context: int) -> Loaded:
    weights, constants = frozen_bytes(model, precision)
    cache = model.shape.kv_bytes(context, 4 if precision == "float32" else 2)
    return Loaded(precision, weights, constants, cache, round(model.parameters.total * _RULE[precision]))


def _notes(model: MetaModel, loaded: list[Loaded], training: dict[str, TrainingMemory]) -> list[str]:
    """What "parameters × bytes" omits, in this model's figures."""
    four, count = loaded[-1], model.parameters
    kept = 2 * (count.total - sum(rows * columns for rows, columns in model.quantizable().values()))
    notes = [
        f'"Parameters × bytes" omits what 4-bit leaves in 16 bits (embeddings, output layer, norms: {quantity(kept, "B")}), the '
        f"constants of quantization ({quantity(four.constants, 'B')}, which transformers' get_memory_footprint leaves out too), the KV "
        f"cache ({quantity(loaded[1].cache, 'B')} in 16 bits) and, in training, logits and activations."
    ]
    if count.experts:
        notes.append(f"bitsandbytes quantizes no stacked experts: {quantity(2 * count.experts, 'B')} stay in 16 bits in any case.")
    notes.append(
        "Peak of training: with checkpointing, the layer that is computed again and the logits are not in memory at the same time; the larger "
        "counts. Every token of the batch counts as a target token. The GPU's own context, about half a GB, comes on top."
    )
    if training["QLoRA"].activations is None:
        notes.append("Activations are not counted: this architecture computes with data that only a loaded model has.")
    return notes


def _llama_notes(layout: ModelLayout, footprints: list[Footprint]) -> list[str]:
    notes = []
    if layout.sliding:
        cells = f"{len(layout.sliding)} of {layout.layers} layers keep their sliding window only"
        notes.append(f"KV cache of llama.cpp: {cells}, rounded up for one batch.")
    if layout.recurrent:
        notes.append(f"Recurrent layers keep a state of {quantity(footprints[0].state_bytes, 'B')}, whatever the context.")
    return notes
