"""What the worker that asks llama.cpp gets and returns: plain data, the same on both sides of its pipes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """How llama.cpp runs a model: one sequence, one GPU stream.

    Attributes:
        context: tokens of the context.
        kv_type: tensor type of keys and values.
        flash_attention: whether it is used; None lets llama.cpp choose, as it does by default.
        micro_batch: tokens computed at once (n_ubatch). 512 is the default of llama.cpp and of Ollama.
        outputs: positions of a micro-batch for which logits are reserved. llama.cpp's server and Ollama reserve all; olpack's own engine 1.
    """

    context: int
    kv_type: str = "f16"
    flash_attention: bool | None = None
    micro_batch: int = 512
    outputs: int = 512


@dataclass(frozen=True)
class Job:
    """A model for llama.cpp: a GGUF, or the header-only checkpoint of a model and the quants to plan.

    Attributes:
        setting: how llama.cpp runs it.
        file: the GGUF; None for a checkpoint.
        folder: of the checkpoint.
        converter: folder of llama.cpp's converter, which reads the checkpoint.
        quants: names of quant types.
    """

    setting: Setting
    file: str | None = None
    folder: str = ""
    converter: str = ""
    quants: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KvCache:
    """One KV cache of a context: its bytes, and the layers that share it."""

    nbytes: int
    layers: list[int]


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp reports of one file.

    Attributes:
        info: what it prints of the model, as text.
        sliding: layers with a sliding window.
        caches: of keys and values.
        state_bytes: of recurrent layers.
        compute_bytes: of the compute graph.
        output_bytes: where logits are copied to.
        process_bytes: by how much the resident set grew for all else (vocabulary, bookkeeping, the graph's nodes).
        flash: whether flash attention is used.
    """

    info: dict[str, str]
    sliding: list[int]
    caches: list[KvCache]
    state_bytes: int
    compute_bytes: int
    output_bytes: int
    process_bytes: int
    flash: bool


@dataclass(frozen=True)
class Result:
    """Of one job.

    Attributes:
        run: cache and graph are the same whatever the weights' types.
        tensors: (name, bytes) of each file's tensors, by quant; empty for a GGUF.
    """

    run: DryRun
    tensors: dict[str, list[tuple[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A result, or the two sentences of an `OlpackError`."""

    result: Result | None = None
    problem: str = ""
    remedy: str = ""
