"""The plan for a person: what will be done, what it takes, and each setting with where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from olpack import progress

if TYPE_CHECKING:
    from rich.table import Table


def print_plan(plan: dict) -> None:
    """The plan for a person: what will be done, what it takes, and each setting with where it came from."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False, markup=False, emoji=False)  # a path or a reason may hold what reads like markup
    found = plan["estimate"]
    counts = f"  {found['parameters'] / 1e6:,.1f} M parameters, builds into {plan['build']}"
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
    epochs = plan["settings"]["train.epochs"]["value"]
    needs.add_row(
        "data",
        f"{found['train_rows']:,} rows to learn, {found['eval_rows']:,} held out; {found['train_tokens']:,} tokens a pass, "
        f"{found['learned_tokens'] / found['train_tokens']:.0%} of them learned",
    )
    same = f"{found['texts_read'] - found['texts_differing']:,} of {found['texts_read']:,} texts become the same tokens in llama.cpp"
    needs.add_row("tokenizer", same + (f", by its pre-tokenizer {found['pre_tokenizer']}" if found["pre_tokenizer"] else ""))
    needs.add_row(
        "training",
        f"{found['steps']:,} steps ({epochs:g} epochs) on {found['device']}"
        + (f", about {progress.duration(found['train_seconds'])}" if found["train_seconds"] else ""),
    )
    if found["fit"]["training"]:
        needs.add_row("adapter", f"{found['adapter_parameters']:,} weights")
        _add_memory(needs, found["fit"], found["held"])
    else:
        size = progress.quantity(found["adapter_bytes"], "B")
        needs.add_row("adapter", f"{found['adapter_parameters']:,} weights, {size} with gradients and optimizer")
        needs.add_row(
            "frozen base",
            f"{progress.quantity(found['weights_bytes'], 'B')} in memory as {found['held']}, activations and logits besides "
            "(`--vram 24` plans for a GPU of 24 GiB)",
        )
    files = ", ".join(f"{quant} {progress.quantity(size, 'B')}" for quant, size in found["disk_bytes"].items())
    needs.add_row("disk", f"{progress.quantity(sum(found['disk_bytes'].values()), 'B')}: {files}; no intermediate files")
    if found["importance_bytes"]:
        needs.add_row("while exporting", f"{progress.quantity(found['importance_bytes'], 'B')} more disk: a Q8_0 to collect the importance matrix on")
    if found["sensitivity_bytes"]:
        needs.add_row(
            "while exporting",
            f"{progress.quantity(found['sensitivity_bytes'], 'B')} more disk, and as much memory: the fine-tune in 16 bits, "
            "to measure what each matrix loses",
        )
    if found["temporary_bytes"]:
        needs.add_row("while comparing", f"{progress.quantity(found['temporary_bytes'], 'B')} more disk: the unquantized fine-tune and its logits")
    console.print(needs, "", highlight=False)
    settings = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("setting", "value", "from"):
        settings.add_column(title, overflow="fold")
    for key, setting in plan["settings"].items():
        value = setting["value"]
        settings.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), setting["from"])
    console.print(settings, highlight=False)


def _add_memory(needs: Table, fit: dict, held: str) -> None:
    """What a training step takes of a GPU, by what it is for, and how it was made to fit."""
    parts = {name if name != "base" else f"base as {held}": size for name, size in fit["parts"].items()}
    needs.add_row("GPU memory", _sizes(parts))
    needs.add_row("", fit["said"])
    if fit["host_parts"]:
        needs.add_row("locked host memory", f"for each GPU: {_sizes(fit['host_parts'])}")


def _sizes(parts: dict[str, int]) -> str:
    return "; ".join(f"{name} {progress.quantity(size, 'B')}" for name, size in parts.items())
