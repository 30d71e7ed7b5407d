"""Advice and estimates as tables for a terminal, or for a log without one."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olpack import printable
from olpack.compare.table import plain
from olpack.machine import Machine
from olpack.memory.estimate import TITLES, MemoryEstimate
from olpack.memory.job import Setting
from olpack.memory.published import rule_of_thumb
from olpack.memory.recommend import Advice, Candidate
from olpack.progress import quantity

_NONE = "–"
_KINDS = {"embedding": "embedding", "head": "output layer", "linear": "linear layers", "experts": "experts", "towers": "vision or audio"}


def print_advice(advice: Advice, console: Console | None = None) -> None:
    """What fits where, the two to choose from, and what to know of the figures; to stdout, or to `console`."""
    console = console or printable.console()
    title = f"{advice.label}, {_count(advice.parameters)} parameters, on {_machine(advice.machine)}; {_setting(advice.setting)}"
    console.print(Text(title), soft_wrap=not console.is_terminal)
    unit, divisor = ("GB", 1e9) if max(candidate.footprint.total for candidate in advice.candidates) >= 1e9 else ("MB", 1e6)
    timed = any(candidate.tokens_per_s for candidate in advice.candidates)
    titles = ("quant", "weights", "KV\ncache", "buffers", "total", "rule of\nthumb", "runs on", "loss", "tok/s")
    table = _table(unit, *(titles if timed else titles[:-1]))
    chosen = {choice.quant for choice in (advice.best, advice.fastest) if choice}
    for candidate in advice.candidates:
        style = "dim" if candidate.place.where == "nowhere" else "bold green" if candidate.quant in chosen else ""
        cells = _advice_cells(candidate, divisor)
        table.add_row("→" if candidate.quant in chosen else "", *(cells if timed else cells[:-1]), style=style)
    console.print(table)
    lines = [f"Best:    {advice.best.reason}" if advice.best else _nothing(advice)]
    if advice.best:
        none = f"no quant that fits is known to lose at most {advice.max_loss:.1%}; --max-loss accepts more."
        lines.append(f"Fastest: {advice.fastest.reason if advice.fastest else none}")
    _print_lines(console, [*lines, *advice.notes])


def print_estimate(found: MemoryEstimate, console: Console | None = None) -> None:
    """The model, then what it takes in transformers, in llama.cpp and in training; to stdout, or to `console`."""
    console = console or printable.console()
    _print_lines(console, _description(found))
    if found.loaded:
        table = _table("transformers", "weights", "constants", "KV cache", "total", "parameters\n× bytes")
        for row in found.loaded:
            table.add_row(TITLES[row.precision], *map(_bytes, (row.weights, row.constants, row.cache, row.total, row.rule)))
        console.print(table, "")
    if found.quants:
        table = _table("llama.cpp", "bits/\nweight", "weights", "KV cache", "buffers", "process", "total", "rule of\nthumb")
        for quant in found.quants:
            sizes = (quant.weights, quant.cache, quant.buffers, quant.process_bytes, quant.total, rule_of_thumb(quant.quant, found.count))
            table.add_row(quant.quant, f"{8 * quant.weights / found.count:.2f}", *map(_bytes, sizes))
        console.print(table, "")
    if found.training:
        title = f"training, rank {found.rank},\n{found.tokens:,} tokens at once"
        table = _table(title, "base", "adapter,\noptimizer", "activa-\ntions", "logits", "peak")
        for name, training in found.training.items():
            adapter = training.adapter + training.gradients + training.optimizer
            for checkpointing in (True, False):
                activations = training.checkpointed if checkpointing else training.activations
                if activations is not None and checkpointing:
                    activations += sum(training.layer.values())
                title = f"{name}{', checkpointing' if checkpointing else ''}"
                peak = training.total(checkpointing)
                table.add_row(title, *map(_bytes, (training.weights, adapter, activations, training.logits, peak)))
        console.print(table, "")
    _print_lines(console, found.notes)


def _advice_cells(candidate: Candidate, divisor: float) -> list[str]:
    footprint, place = candidate.footprint, candidate.place
    part = f"GPU {place.gpu_layers}/{place.layers}"
    where = {"gpu": "GPU", "split": part, "ram": "RAM", "nowhere": "nothing"}[place.where]
    loss = _NONE if candidate.loss is None else f"{candidate.loss:.1%}" if candidate.measured else f"({candidate.loss:.1%})"
    sizes = (footprint.weights, footprint.cache, footprint.buffers, footprint.total, candidate.rule_bytes)
    cells = [_NONE if size is None else plain(size / divisor) for size in sizes]
    return [candidate.quant, *cells, where, loss, plain(candidate.tokens_per_s) if candidate.tokens_per_s else _NONE]


def _description(found: MemoryEstimate) -> list[str]:
    if found.shape is None or found.parameters is None:
        architecture = f", {found.layout.architecture}" if found.layout else ""
        return [f"{found.label}, {_count(found.count)} parameters{architecture}; {_setting(found.setting)}"]
    parts = [f"{_count(size)} {title}" for kind, title in _KINDS.items() if (size := getattr(found.parameters, kind))]
    shape = found.shape
    lines = [f"{found.label}, {_count(found.parameters.total)} parameters: {', '.join(parts)}"]
    heads = f"{shape.heads} heads, {shape.kv_heads} KV heads of {shape.head_dim}" if shape.heads else "no attention"
    vocabulary = f"vocabulary {shape.vocabulary:,}{' (tied)' if shape.tied else ''}"
    lines.append(f"{shape.layers} layers, hidden {shape.hidden:,}, {heads}, intermediate {shape.intermediate:,}, {vocabulary}")
    if shape.window:
        sliding, full = shape.kinds.count("sliding"), shape.kinds.count("full")
        lines.append(f"{sliding} layers see a window of {shape.window:,} tokens, {full} the whole context")
    if shape.heads and (without := shape.kinds.count("none")):
        lines.append(f"{without} layers keep a state in place of keys and values")
    if shape.experts:
        lines.append(f"{shape.experts} experts, {shape.experts_used} for a token: {_count(found.parameters.active)} parameters active")
    return [*lines, _setting(found.setting)]


def _nothing(advice: Advice) -> str:
    least = min(advice.candidates, key=lambda candidate: candidate.footprint.total)
    return (
        f"Nothing fits: {least.quant}, the smallest here, takes {quantity(least.footprint.total, 'B')}. "
        "Take a smaller model, a shorter context (--context), or a smaller KV cache (--kv q8_0)."
    )


def _machine(machine: Machine) -> str:
    gpus = "no GPU" if not machine.gpus else " + ".join(f"{size / (1 << 30):.3g} GiB" for size in machine.gpus) + " of GPU memory"
    return f"{gpus}, {machine.ram / (1 << 30):.3g} GiB of RAM"


def _setting(setting: Setting) -> str:
    return f"context {setting.context:,} tokens, KV cache in {setting.kv_type}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _bytes(size: int | None) -> str:
    return _NONE if size is None else quantity(size, "B")


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="left" if title in ("quant", "runs on") else "right", no_wrap=True)
    return table


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)
