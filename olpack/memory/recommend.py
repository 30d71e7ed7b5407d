"""Which quants fit a machine, where each would run, and which to take: the best that fits, and the fastest within an accepted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from olpack.machine import Machine
from olpack.memory.footprint import Footprint, plan, read
from olpack.memory.job import Setting
from olpack.memory.model_source import Subject
from olpack.memory.published import SOURCE, published_loss, rule_of_thumb
from olpack.progress import quantity

if TYPE_CHECKING:
    from olpack.compare.results import Results

MAX_LOSS = 0.03  # accepted where the figures are llama.cpp's published ones: Q4_K_M is within it


@dataclass(frozen=True)
class Place:
    """Where a quant runs.

    Attributes:
        where: "gpu", "split" between GPU and RAM, "ram", or "nowhere".
        gpu_layers: layers on the GPU (n_gpu_layers of llama.cpp, num_gpu of Ollama), the output layer counted as one.
        layers: of the model, counted likewise.
        gpu_bytes, ram_bytes: what it takes on each. Where it fits nowhere, what it would take in RAM.
    """

    where: Literal["gpu", "split", "ram", "nowhere"]
    gpu_layers: int
    layers: int
    gpu_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class Candidate:
    """One quant on one machine.

    Attributes:
        footprint: what it takes.
        place: where it runs.
        loss: growth of perplexity, 0.01 is one per cent; None where no figure is known.
        measured: whether the loss was measured on this very file.
        tokens_per_s: generation as measured on this very file and this machine; None where it was not.
        rule_bytes: what the tutorials' rule of thumb gives; None where it has no figure.
    """

    footprint: Footprint
    place: Place
    loss: float | None
    measured: bool
    tokens_per_s: float | None
    rule_bytes: int | None

    @property
    def quant(self) -> str:
        return self.footprint.quant


@dataclass(frozen=True)
class Choice:
    """A recommended quant, and the reason in one sentence."""

    quant: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """What fits, and what to take. `best` and `fastest` are None where nothing fits, or nothing is within the accepted loss."""

    label: str
    parameters: int
    machine: Machine
    setting: Setting
    max_loss: float
    candidates: list[Candidate]
    best: Choice | None
    fastest: Choice | None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        """Plain data; bytes and shares, no text to parse but the reasons and notes."""
        rows = [
            {
                "quant": c.quant,
                "weights_bytes": c.footprint.weights,
                "kv_bytes": c.footprint.cache,
                "buffer_bytes": c.footprint.buffers,
                "process_bytes": c.footprint.process_bytes,
                "total_bytes": c.footprint.total,
                "rule_of_thumb_bytes": c.rule_bytes,
                **asdict(c.place),
                "loss": c.loss,
                "loss_measured": c.measured,
                "generation_tokens_per_s": c.tokens_per_s,
            }
            for c in self.candidates
        ]
        return {
            "model": self.label,
            "parameters": self.parameters,
            "setting": asdict(self.setting),
            "max_loss": self.max_loss,
            "machine": {"ram_bytes": self.machine.ram, "gpu_bytes": list(self.machine.gpus), "found": not self.machine.given},
            "quants": rows,
            "best": self.best and asdict(self.best),
            "fastest": self.fastest and asdict(self.fastest),
            "notes": self.notes,
        }


def place(footprint: Footprint, machine: Machine) -> Place:
    """As many of the last layers on the GPUs as fit; the rest in RAM, if it fits there."""
    layers = footprint.layers
    for count in range(layers if machine.gpus else 0, 0, -1):
        # Each further GPU computes a part of the graph with buffers of its own.
        on_gpu = footprint.on_gpu(count) + (len(machine.gpus) - 1) * footprint.compute_bytes
        if on_gpu <= machine.available_gpu and footprint.in_ram(count) <= machine.available_ram:
            return Place("gpu" if count == layers else "split", count, layers, on_gpu, footprint.in_ram(count))
    fits = footprint.total <= machine.available_ram
    return Place("ram" if fits else "nowhere", 0, layers, 0, footprint.total)


def recommend(
    label: str, parameters: int, footprints: list[Footprint], machine: Machine, setting: Setting, max_loss: float, results: Results | None = None
) -> Advice:
    measured = {quant.quant: quant for quant in results.quants} if results else {}
    candidates = []
    for footprint in footprints:
        result = measured.get(footprint.quant)
        loss = result.loss if result else None
        speed = result.speed.generation_tokens_per_s if result and result.speed and not machine.given else None
        candidates.append(
            Candidate(
                footprint,
                place(footprint, machine),
                loss.relative if loss else published_loss(footprint.quant),
                loss is not None,
                speed.median if speed else None,
                rule_of_thumb(footprint.quant, parameters),
            )
        )
    candidates.sort(key=lambda candidate: candidate.footprint.weights)
    best, fastest = _best(candidates, machine), _fastest(candidates, max_loss)
    notes = _notes(candidates, parameters, machine, setting)
    return Advice(label, parameters, machine, setting, max_loss, candidates, best, fastest, notes)


def recommend_files(paths: Sequence[Path], machine: Machine, setting: Setting, max_loss: float | None) -> Advice:
    """Advice on GGUFs of one model."""
    from olpack.model.gguf_header import read_header

    label = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    parameters = read_header(paths[0]).parameters
    footprints = [read(path, setting)[0] for path in paths]
    return recommend(label, parameters, footprints, machine, setting, MAX_LOSS if max_loss is None else max_loss)


def recommend_model(subject: Subject, quants: Sequence[str], machine: Machine, setting: Setting, max_loss: float | None) -> Advice:
    """Advice on a model that is not there, by its configuration or a typical shape."""
    footprints = plan(subject, quants, setting)[0]
    advice = recommend(subject.label, subject.model.parameters.text, footprints, machine, setting, MAX_LOSS if max_loss is None else max_loss)
    if subject.note:
        advice.notes.insert(0, f"Computed for {subject.note}.")
    return advice


def _best(candidates: list[Candidate], machine: Machine) -> Choice | None:
    """The lowest loss among those that fit wholly on the GPU; where none does, or there is no GPU, among those that fit at all."""
    fit = [c for c in candidates if c.place.where != "nowhere"]
    whole = [c for c in fit if c.place.where == "gpu"]
    if not fit:
        return None
    chosen = min(whole or fit, key=lambda c: (c.loss is None, c.loss, c.footprint.weights))
    where = {"gpu": "wholly on the GPU", "split": "on GPU and RAM together", "ram": "in RAM"}[chosen.place.where]
    used = chosen.place.gpu_bytes if chosen.place.where == "gpu" else chosen.place.ram_bytes + chosen.place.gpu_bytes
    available = machine.available_gpu if chosen.place.where == "gpu" else machine.available_ram + machine.available_gpu
    reason = f"{chosen.quant} loses least of those that fit {where}: it takes {quantity(used, 'B')} of {quantity(available, 'B')} available"
    larger = [c for c in candidates if c.footprint.weights > chosen.footprint.weights and c.place.where != chosen.place.where]
    if larger:
        beyond = min(larger, key=lambda c: c.footprint.weights)
        need = beyond.footprint.on_gpu(beyond.footprint.layers) if chosen.place.where == "gpu" else beyond.footprint.total
        reason += f"; {beyond.quant} would take {quantity(need, 'B')}"
    return Choice(chosen.quant, f"{reason}.")


def _fastest(candidates: list[Candidate], max_loss: float) -> Choice | None:
    """The highest measured speed within the loss; unmeasured, the one whose weights are read fastest for each token."""
    accepted = [c for c in candidates if c.place.where != "nowhere" and c.loss is not None and c.loss <= max_loss]
    if not accepted:
        return None
    within = f"within the {max_loss:.1%} accepted"
    if all(c.tokens_per_s for c in accepted):
        chosen = max(accepted, key=lambda c: c.tokens_per_s or 0.0)
        reason = f"generates fastest of those {within}, {chosen.tokens_per_s:,.0f} tokens/s measured here"
    else:
        chosen = min(accepted, key=lambda c: (c.place.layers - c.place.gpu_layers, c.footprint.weights))
        reason = f"has the least to read for each token of those {within}, {quantity(chosen.footprint.weights, 'B')} of weights"
    smaller = [c for c in candidates if c.footprint.weights < chosen.footprint.weights and c.loss is not None and c.loss > max_loss]
    rest = f"; {smaller[-1].quant}, smaller, loses {smaller[-1].loss:.1%}" if smaller else ""
    return Choice(chosen.quant, f"{chosen.quant} {reason}{rest}.")


def _notes(candidates: list[Candidate], parameters: int, machine: Machine, setting: Setting) -> list[str]:
    notes = []
    if any(not c.measured and c.loss is not None for c in candidates):
        notes.append(f"Losses in brackets are not of this model but of {SOURCE}.")
    gpus = "1 GiB of each GPU and " if machine.gpus else ""
    notes.append(f"Left free: {gpus}2 GiB of RAM, for driver, screen and system. GPU layers count the output layer as one.")
    if comparison := _against_rule(candidates, parameters, machine, setting):
        notes.append(comparison)
    return notes


def _against_rule(candidates: list[Candidate], parameters: int, machine: Machine, setting: Setting) -> str:
    """The quant that the tutorials' rule would choose here, and what it really takes."""
    ruled = [(c, c.rule_bytes) for c in candidates if c.rule_bytes is not None]
    if not ruled:
        return ""
    size = sum(machine.gpus) or machine.ram
    fits = [(c, rule) for c, rule in ruled if rule <= size]
    chosen, rule = max(fits or ruled[:1], key=lambda one: one[0].footprint.weights)
    outcome = f"chooses {chosen.quant}" if fits else f"finds nothing that fits, not even {chosen.quant}"
    needed = chosen.footprint.total
    bits = f"{8 * chosen.footprint.weights / parameters:.2f} bits a weight"
    return (
        f"The rule of thumb, GB per billion parameters × 1.2, {outcome}: {quantity(rule, 'B')}. Computed: {quantity(needed, 'B')} "
        f"({needed / rule - 1:+.0%}); the rule ignores the quant's real size ({bits}) and the context "
        f"({quantity(chosen.footprint.cache, 'B')} of KV cache for {setting.context:,} tokens)."
    )
