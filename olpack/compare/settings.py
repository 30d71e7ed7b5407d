"""What to measure, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError

_SHORTEST_PROMPT = 16  # tokens

# Disk space for the reference's logits: 7,000 positions of a 38k vocabulary or 1,766 of a 152k one. On that many positions the standard error
# of the mean is a few percent of it, which distinguishes quants; ten times as many positions would only divide the error by three.
LOGITS_BYTES = 1 << 30
OTHER_LOGITS_BYTES = 1 << 28  # of those on other text, of which one figure is reported: 441 positions of a 152k vocabulary


@dataclass(frozen=True)
class ComparedFile:
    """One GGUF to measure.

    Attributes:
        quant: "Q4_K_M".
        tag: "q4_K_M"; through a server the model is `<name>:<tag>`.
        path: the file.
        size: in bytes.
        bits_per_weight: None where unknown.
        sha256: of the file, as hexadecimal digits.
        adapter: a LoRA GGUF that is applied to it; None: there is none.
        alone: the server's model of the same file without the adapter; None: the server has none.
        types: of a budget, how many matrices of each kind have which type: {"attn_v": {"q6_K": 8}}. Empty for one of llama.cpp's own mixes.
        tensors: the same of any quant; empty where unknown.
    """

    quant: str
    tag: str
    path: Path
    size: int
    bits_per_weight: float | None
    sha256: str
    adapter: Path | None = None
    types: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    alone: str | None = None


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure.

    Attributes:
        prompt_lengths: prompt lengths in tokens at which prompt speed is measured.
        generated_tokens: tokens generated in one timed run.
        repeats: timed runs of each speed figure, divided among the rounds; each round begins with one more run, which is discarded.
        clients: numbers of concurrent clients, measured through a server only; none: concurrency is not measured.
        context: context length to load with, in tokens: what the package serves (num_ctx), because memory depends on it.
        threads: CPU threads of the embedded engine; None: the physical cores that this process may use.
        answer_tokens: an answer is cut here.
        tolerance: relative growth of perplexity that the recommendation accepts.
        suites: tasks of lm-evaluation-harness to run on every file.
        suite_folder: a folder with tasks of one's own in YAML.
        suite_limit: at most this many questions of each; None: all.
        load: further options with which a server loads each model, "num_batch" and its like, so that one that is not the package's runs alike.
        template: a chat template that writes the prompts in place of the files' own; None: those do.
    """

    prompt_lengths: tuple[int, ...] = (512,)
    generated_tokens: int = 64
    repeats: int = 5
    clients: tuple[int, ...] = ()
    context: int = 4096
    threads: int | None = None
    answer_tokens: int = 256
    tolerance: float = 0.01
    suites: tuple[str, ...] = ()
    suite_folder: str | None = None
    suite_limit: int | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None

    def __post_init__(self) -> None:
        if self.context < self.generated_tokens + _SHORTEST_PROMPT:
            raise OlpackError(
                f"num_ctx {self.context} leaves no space for a prompt beside the {self.generated_tokens} tokens that a timed run generates.",
                f"Set num_ctx to {self.generated_tokens + _SHORTEST_PROMPT} or more, or `compare.generated_tokens` lower.",
            )
