"""The plan for a person: what will be done, what it takes, and each setting with where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from olpack import printable, progress

if TYPE_CHECKING:
    from rich.table import Table


def print_plan(plan: dict) -> None:
    """The plan for a person: what will be done, what it takes, and each setting with where it came from."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = printable.console()
    estimate = plan["estimate"]
    counts = f"  {estimate['parameters'] / 1e6:,.1f} M parameters, builds into {plan['build']}"
    console.print(Text.assemble((plan["name"], "bold"), counts), highlight=False)
    steps = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("step", "what will happen", "because"):
        steps.add_column(title, overflow="fold")
    for step in plan["steps"]:
        steps.add_row(step["step"], "run" if step["stale"] else "nothing", step["stale"] or "done, and its inputs are the same")
    if plan["server"] is None:
        steps.add_row("deploy", "nothing", "no Ollama server answers")
    console.print(steps, "")
    needs = Table(box=None, pad_edge=False, show_header=False)
    if "served_as_it_is" in plan:
        needs.add_row("base", plan["served_as_it_is"])
    if "tags" in plan:
        needs.add_row("tags", plan["tags"])
    epochs, finished = plan["settings"]["train.epochs"]["value"], plan["settings"]["train.adapter"]["value"]
    rows = f"{estimate['train_rows']:,} training rows, {estimate['eval_rows']:,} held out"
    if estimate["train_tokens"]:
        shares = f"{estimate['train_tokens']:,} tokens a pass, {estimate['learned_tokens'] / estimate['train_tokens']:.0%} of them target tokens"
        rows = f"{rows}; {shares}"
    needs.add_row("data", rows)
    same = f"{estimate['texts_read'] - estimate['texts_differing']:,} of {estimate['texts_read']:,} texts become the same tokens in llama.cpp"
    needs.add_row("tokenizer", same + (f", by its pre-tokenizer {estimate['pre_tokenizer']}" if estimate["pre_tokenizer"] else ""))
    if finished:
        needs.add_row("training", f"none: the adapter {finished} with {estimate['adapter_parameters']:,} weights is copied")
    else:
        _add_training(needs, estimate, epochs)
    files = ", ".join(f"{quant} {progress.quantity(size, 'B')}" for quant, size in estimate["disk_bytes"].items())
    needs.add_row("disk", f"{progress.quantity(sum(estimate['disk_bytes'].values()), 'B')}: {files}; no intermediate files")
    if (rounding := plan["settings"]["export.rounding"]["value"]) == "search":
        needs.add_row("rounding", "search: scales of blocks with the smallest weighted error, in place of ggml's")
    elif rounding == "learned":
        takes = f", about {progress.duration(estimate['rounding_seconds'])}" if estimate["rounding_seconds"] else ""
        trained = f"; the block scales of {' and '.join(estimate['scaled'])} are trained" if estimate["scaled"] else ""
        needs.add_row("rounding", f"learned: so that the outputs of each matrix on training rows change least{trained}{takes}")
    if estimate["importance_bytes"]:
        needs.add_row(
            "while exporting", f"{progress.quantity(estimate['importance_bytes'], 'B')} more disk: a Q8_0 to collect the importance matrix on"
        )
    if estimate["rounding_bytes"]:
        needs.add_row(
            "while exporting", f"{progress.quantity(estimate['rounding_bytes'], 'B')} more disk: rounded matrices, and a model to read rows"
        )
    if estimate["sensitivity_bytes"]:
        needs.add_row(
            "while exporting",
            f"{progress.quantity(estimate['sensitivity_bytes'], 'B')} more disk, and as much memory: the fine-tune in 16 bits, "
            "to measure what each matrix loses",
        )
    if estimate["temporary_bytes"]:
        needs.add_row("while comparing", f"{progress.quantity(estimate['temporary_bytes'], 'B')} more disk: the unquantized fine-tune and its logits")
    if estimate["answers"]:
        needs.add_row("answers", estimate["answers"])
    console.print(needs, "", highlight=False)
    settings = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("setting", "value", "from"):
        settings.add_column(title, overflow="fold")
    for key, setting in plan["settings"].items():
        value = setting["value"]
        settings.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), setting["from"])
    console.print(settings, highlight=False)


def _add_training(needs: Table, estimate: dict, epochs: float) -> None:
    """Steps, weights and memory of the training."""
    needs.add_row(
        "training",
        f"{estimate['steps']:,} steps ({epochs:g} epochs) on {estimate['device']}"
        + (f", about {progress.duration(estimate['train_seconds'])}" if estimate["train_seconds"] else ""),
    )
    if estimate["fit"]["training"]:
        needs.add_row("adapter", f"{estimate['adapter_parameters']:,} weights")
        _add_memory(needs, estimate["fit"], estimate["held"])
    else:
        size = progress.quantity(estimate["adapter_bytes"], "B")
        needs.add_row("adapter", f"{estimate['adapter_parameters']:,} weights, {size} with gradients and optimizer")
        needs.add_row(
            "frozen base",
            f"{progress.quantity(estimate['weights_bytes'], 'B')} in memory as {estimate['held']}, activations and logits besides "
            "(`--vram 24` plans for a GPU of 24 GiB)",
        )


def _add_memory(needs: Table, fit: dict, quantization: str) -> None:
    """GPU memory of a training step by what it is for, and the settings that make it fit."""
    parts = {name if name != "base" else f"base as {quantization}": size for name, size in fit["parts"].items()}
    needs.add_row("GPU memory", _sizes(parts))
    needs.add_row("", fit["said"])
    if fit["host_parts"]:
        needs.add_row("pinned memory", f"for each GPU: {_sizes(fit['host_parts'])}")


def _sizes(parts: dict[str, int]) -> str:
    return "; ".join(f"{name} {progress.quantity(size, 'B')}" for name, size in parts.items())
