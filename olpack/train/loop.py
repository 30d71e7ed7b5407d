"""The training loop: fixed order of rows, loss over learned tokens of the whole batch, checkpoints in time and at an interrupt."""

from __future__ import annotations

import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from olpack import __version__, progress
from olpack.base import Base
from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.recipe import Train
from olpack.train import TrainResult
from olpack.train.batches import collate, micro_batches, schedule
from olpack.train.checkpoint import Checkpoint, State
from olpack.train.methods import save_adapter
from olpack.train.model import load_with_adapter, pick_device, summed_loss
from olpack.workspace import folder_atomically

CHECKPOINT_EVERY_S = 60.0  # the most work that a killed run loses
_BUDGET = {"cpu": 512, "cuda": 8192}  # a CPU is fastest where activations stay in its cache, and padding is least


def run(base: Base, rows: list[TokenRow], eval_rows: list[TokenRow], settings: Train, *, out: Path, checkpoint: Path, key: str) -> TrainResult:
    """See `olpack.train.train`."""
    device = pick_device()
    checkpointing = device.type == "cuda" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing
    budget = _BUDGET[device.type] if settings.micro_batch_tokens == "auto" else settings.micro_batch_tokens
    with progress.task(f"loading {base.label} ({settings.quantization})"):
        model = load_with_adapter(base, settings, device, checkpointing=checkpointing)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(adapter, settings, device)
    saved = Checkpoint(checkpoint, key)
    state = saved.load(model, optimizer)
    if state is None:
        state = State(budget=budget)
        saved.begin_metrics(state)
        saved.log(state, eval_loss=evaluate(model, eval_rows, state.budget, device, "eval loss before"))
    else:
        progress.say(f"going on from step {state.step}")
        saved.begin_metrics(state)
    batches = schedule(len(rows), settings.epochs, settings.batch_size, settings.seed)
    started = time.monotonic() - state.seconds
    try:
        _steps(model, optimizer, adapter, rows, batches, settings, state, saved, device, started)
    except _Stopped:
        progress.say(f"stopped at step {state.step} of {len(batches)}; the same command goes on from there")
        raise
    finally:
        state.seconds = time.monotonic() - started
        if state.whole:
            saved.save(model, optimizer, state)
    saved.log(state, eval_loss=evaluate(model, eval_rows, state.budget, device, "eval loss after"))
    result = TrainResult(
        steps=state.step,
        learned_tokens=state.learned,
        padding_share=1 - state.real / state.processed,
        eval_loss_before=state.metrics[0]["eval_loss"],
        eval_loss_after=state.metrics[-1]["eval_loss"],
        trainable_parameters=sum(parameter.numel() for parameter in adapter),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds=time.monotonic() - started,
    )
    _write_adapter(model, base, settings, state, result, out)
    saved.remove()
    return result


def _steps(model, optimizer, adapter, rows, batches, settings: Train, state: State, saved: Checkpoint, device, started: float) -> None:
    checkpointed = time.monotonic()
    total = sum(len(rows[index].ids) for batch in batches for index in batch)
    done = sum(len(rows[index].ids) for batch in batches[: state.step] for index in batch)
    with _interrupt_between_steps() as stop_if_asked, progress.task("training", total=total, unit="tokens", done=done) as task:
        for batch in batches[state.step :]:
            rate = learning_rate(state.step, len(batches), settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = [rows[index] for index in batch]
            loss = _backward(model, chosen, state, device)
            norm = torch.nn.utils.clip_grad_norm_(adapter, settings.max_grad_norm).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise OlpackError(f"The loss is not finite at step {state.step + 1} (loss {loss}, gradient norm {norm}).",
                                  f"Lower `train.learning_rate` (now {settings.learning_rate:g}).")
            state.whole = False
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.real += (tokens := sum(len(row.ids) for row in chosen))
            state.learned += sum(row.learned_count for row in chosen)
            saved.log(state, loss=loss, learning_rate=rate, grad_norm=norm)
            state.whole = True
            task.advance(tokens, note=f"step {state.step}/{len(batches)}  loss {loss:.3f}")
            if time.monotonic() - checkpointed > CHECKPOINT_EVERY_S and state.step < len(batches):
                state.seconds = time.monotonic() - started
                saved.save(model, optimizer, state)
                checkpointed = time.monotonic()
            stop_if_asked()


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, between two steps."""


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the step is whole, so that weights, optimizer and step count belong together; a second one is immediate."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number, frame):
        signal.signal(signal.SIGINT, before)
        asked.set()

    def stop_if_asked():
        if asked.is_set():
            raise _Stopped

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _backward(model, rows: list[TokenRow], state: State, device: torch.device) -> float:
    """Gradients of the mean loss over all learned tokens of a batch; returns that loss.

    The sum over micro-batches is divided by the batch's count of learned tokens, so the result does not depend on how the
    batch was cut. Where memory runs out the micro-batch is halved and the batch begun anew.
    """
    count = sum(row.learned_count for row in rows)
    while True:
        total, processed = 0.0, 0
        try:
            for group in micro_batches(rows, state.budget):
                ids, labels = collate(group, device)
                loss = summed_loss(model, ids, labels)
                loss.backward()
                total += loss.item()
                processed += ids.numel()
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if state.budget <= max(len(row.ids) for row in rows):
                raise OlpackError(f"The GPU's memory does not hold one row of {max(len(row.ids) for row in rows)} tokens.",
                                  "Lower `data.max_length` or `train.rank`, or take a smaller base.") from None
            state.budget //= 2
            progress.warn(f"GPU memory ran out: going on with micro-batches of {state.budget} tokens, same batch")
        else:
            # Divided last, in float32: in 16 bits the gradients of one token among thousands could vanish.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= count
            state.processed += processed
            return total / count


def evaluate(model, rows: list[TokenRow], budget: int, device: torch.device, title: str) -> float:
    """Mean negative log-probability per learned token over `rows`, in nats."""
    total = 0.0
    model.eval()
    with torch.no_grad(), progress.task(title, total=len(rows), unit="rows") as task:
        for group in micro_batches(rows, budget):
            total += summed_loss(model, *collate(group, device)).item()
            task.advance(len(group))
    model.train()
    return total / sum(row.learned_count for row in rows)


def learning_rate(step: int, steps: int, settings: Train) -> float:
    """Learning rate of a step (the first is 0): a linear rise over the warm-up, then the schedule down to zero at the end."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[settings.schedule]
    return settings.learning_rate * factor


def _optimizer(adapter: list[torch.nn.Parameter], settings: Train, device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(adapter, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(adapter, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _write_adapter(model, base: Base, settings: Train, state: State, result: TrainResult, out: Path) -> None:
    import bitsandbytes
    import peft
    import transformers

    versions = {"olpack": __version__, "python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    with folder_atomically(out) as folder:
        save_adapter(model, model.olpack_start, folder)
        held = model.olpack_held and vars(model.olpack_held)
        record = {"base": base.label, "base_digest": base.digest, "train": settings.model_dump(), "held": held, "result": vars(result),
                  "versions": versions}  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state.metrics), encoding="utf-8")
