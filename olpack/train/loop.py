"""The training loop: fixed order of rows, loss over target tokens of the whole batch, evaluations, checkpoints in time and at an interrupt."""

from __future__ import annotations

import json
import math
import platform
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError

from olpack import __version__, progress
from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train.adapter import save_adapter
from olpack.train.batches import micro_batches, pack, schedule
from olpack.train.checkpoint import Checkpoint, State, adapter_weights
from olpack.train.device import compute_dtype, pick_device
from olpack.train.forward import Forward
from olpack.train.metrics import Metrics
from olpack.train.model import AdaptedModel, load_with_adapter
from olpack.train.ops.flat_parameters import FlatParameters
from olpack.train.ops.fp8 import computing_in_16_bits
from olpack.train.ops.pinned_memory import PinnedMemory
from olpack.train.planner import Fit, choose
from olpack.train.processes import ALONE, Ranks, partition, shard
from olpack.train.result import TrainResult
from olpack.workspace import folder_atomically

EVALUATIONS = 10  # of a run, where the recipe does not say how often
_EVALUATION_SHARE = 0.1  # of the time of a run
_WARM = 3  # steps that are not timed: kernels are compiled and memory is reserved in them


def run(
    base: Base, rows: list[TokenRow], eval_rows: list[TokenRow], settings: Train, *, out: Path, checkpoint: Path, key: str, ranks: Ranks = ALONE
) -> TrainResult:
    """`olpack.train.train` in this process. Of several processes that run it together, the first writes and prints."""
    device = ranks.device or pick_device()
    fit = choose(base, rows, settings, device, ranks)
    if fit.summary:
        progress.say(fit.summary)
    pinned = PinnedMemory(fit.pinned_by_forward, device) if fit.checkpointing and device.type == "cuda" else None
    with progress.task(f"loading {base.label} ({base.quantization or settings.quantization})"):
        adapted = load_with_adapter(base, settings, device, sharded=fit.sharded, streamed=fit.streamed, in_host_memory=fit.loads_in_host_memory)
        model = adapted.model
        forward = Forward(
            model,
            device,
            checkpointing=fit.checkpointing,
            pinned=pinned,
            offload_attention=fit.offload_attention,
            offload_head=fit.offload_head,
            in_fp8=fit.in_fp8,
        )
    if fit.sharded:
        shard(model)
        ranks.sharded = True
    trained = FlatParameters(model)
    if trained.in_place and not fit.sharded:
        forward.use_graphs()
    ranks.broadcast(trained.parameters)
    optimizer = _optimizer(trained.parameters, settings, device)
    # The first values of an adapter are computed again when a run resumes, and differ on another kind of device.
    begun_on = "" if settings.initialization == "default" else f" {device.type} {compute_dtype(device)}"
    saved = Checkpoint(checkpoint, key + begun_on, writes=ranks.first)
    state = saved.load(model, optimizer)
    if state is None:
        state = State(budget=fit.tokens)
    else:
        state.budget = min(state.budget, fit.tokens)  # it may have been halved, or the GPU be another
        progress.say(f"going on from step {state.step}")
    ranks.wait()  # until all have read the checkpoint
    metrics = Metrics(checkpoint, settings, state, name=out.parent.name, writes=ranks.first)
    batches = schedule(len(rows), settings.epochs, settings.batch_size, settings.seed)
    started = time.monotonic() - state.seconds
    try:
        _steps(forward, optimizer, trained, rows, eval_rows, batches, settings, state, saved, metrics, ranks, started)
    except Stopped:
        state.seconds = time.monotonic() - started
        saved.save(model, optimizer, state)
        progress.say(f"stopped at step {state.step} of {len(batches)}; the same command goes on from {_place(saved)}")
        raise
    except BaseException:
        state.seconds = time.monotonic() - started
        if state.whole and saved.step != state.step:
            saved.save(model, optimizer, state)
        raise
    finally:
        metrics.close()
    state.seconds = time.monotonic() - started
    saved.save(model, optimizer, state)
    result = _result(forward, trained, settings, state, fit, ranks)
    if result.eval_loss_after > result.eval_loss_before:
        progress.warn(
            f"Training raised the held-out loss from {result.eval_loss_before:.3f} to {result.eval_loss_after:.3f}: "
            "lower `train.learning_rate` or `train.epochs`, or look at the data"
        )
    if ranks.first:
        if settings.keep == "best" and state.best:
            set_peft_model_state_dict(model, state.best)
        _write_adapter(adapted, base, settings, state, result, out, saved)
    saved.remove()
    return result


def _result(forward: Forward, trained: FlatParameters, settings: Train, state: State, fit: Fit, ranks: Ranks) -> TrainResult:
    device = forward.device
    if settings.keep == "best":
        step, loss = state.best_step, state.best_loss
    else:
        step, loss = state.step, _eval_loss(state, state.step)
    assert step is not None and loss is not None  # the last step is evaluated
    return TrainResult(
        steps=state.step,
        kept_step=step,
        learned_tokens=state.learned,
        packed=forward.packs,
        eval_loss_before=_eval_loss(state, 0),
        eval_loss_after=loss,
        trainable_parameters=sum(parameter.numel() for parameter in trained.parameters),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        gpus=ranks.count if device.type == "cuda" else 0,
        estimated_gpu_bytes=fit.bytes,
        peak_gpu_bytes=ranks.largest(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None,
        tokens_per_s=state.timed / state.timed_s if state.timed_s else None,
        seconds=state.seconds,
    )


def _steps(
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    trained: FlatParameters,
    rows: list[TokenRow],
    eval_rows: list[TokenRow],
    batches: list[list[int]],
    settings: Train,
    state: State,
    saved: Checkpoint,
    metrics: Metrics,
    ranks: Ranks,
    started: float,
) -> None:
    tokens = [len(row.ids) for row in rows]
    total = sum(tokens[index] for batch in batches for index in batch)
    done = sum(tokens[index] for batch in batches[: state.step] for index in batch)
    interval = evaluation_interval(len(batches), total, sum(len(row.ids) for row in eval_rows), settings)
    warm = state.step + _WARM
    with _interrupt_between_steps(ranks) as stop_if_asked, progress.task("training", total=total, unit="tokens", done=done) as task:
        while True:
            if (state.step % interval == 0 or state.step == len(batches)) and state.evaluated < state.step:
                _evaluate_step(forward, eval_rows, settings, state, metrics, ranks, stop_if_asked)
            if settings.patience and state.waited >= settings.patience:
                progress.say(
                    f"stopped early at step {state.step} of {len(batches)}: the held-out loss is lowest at step {state.best_step}, "
                    f"{state.waited} evaluations ago"
                )
                return
            if state.step == len(batches):
                return
            begun = time.monotonic()
            rate = learning_rate(state.step, len(batches), settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = [rows[index] for index in batches[state.step]]
            # Dropout follows from seed and step alone, so that a checkpoint needs no state of it.
            torch.manual_seed(random.Random(f"{settings.seed}/{state.step}/{ranks.rank}").getrandbits(63))
            loss = _backward(forward, trained, chosen, state, ranks)
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters, settings.max_grad_norm).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                saved.save(forward.model, optimizer, state)
                ranks.wait()  # a process that ends with an error takes the others with it
                raise OlpackError(
                    f"The loss is not finite at step {state.step + 1} (loss {loss}, gradient norm {norm}).{_last_checkpoint(saved)}",
                    f"Lower `train.learning_rate` (now {settings.learning_rate:g}).",
                )
            state.whole = False
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            seen = sum(len(row.ids) for row in chosen)
            state.learned += sum(row.target_count for row in chosen)
            if state.step > warm:
                state.timed += seen
                state.timed_s += time.monotonic() - begun
            metrics.log(state, loss=loss, learning_rate=rate, grad_norm=norm)
            state.whole = True
            task.advance(seen, note=f"step {state.step}/{len(batches)}  loss {loss:.3f}")
            if saved.due and state.step < len(batches):
                state.seconds = time.monotonic() - started
                saved.save(forward.model, optimizer, state)
            stop_if_asked()


def evaluation_interval(steps: int, train_tokens: int, eval_tokens: int, settings: Train) -> int:
    """Steps from one evaluation to the next; there is one at the end too.

    A token that is evaluated goes forward, one of a training step goes forward and back through frozen weights, which is twice the work. The
    number of evaluations follows from that, not from a clock, so that a run that goes on elsewhere makes the same ones.

    Args:
        train_tokens: of all epochs.
        eval_tokens: of one evaluation.
    """
    if settings.eval_every != "auto":
        return settings.eval_every
    affordable = int(_EVALUATION_SHARE * 2 * train_tokens / max(1, eval_tokens))
    return math.ceil(steps / max(1, min(EVALUATIONS, affordable)))


def _evaluate_step(
    forward: Forward, eval_rows: list[TokenRow], settings: Train, state: State, metrics: Metrics, ranks: Ranks, stop_if_asked: Callable[[], None]
) -> None:
    """Evaluate, and copy the adapter if its loss is the lowest so far."""
    title = "eval loss before" if state.step == 0 else f"eval loss at step {state.step}"
    loss = evaluate(forward, eval_rows, state.budget, title, ranks, stop_if_asked)
    if not math.isfinite(loss):
        state.whole = state.step == 0  # such weights are not worth a checkpoint; the last one stays
        remedy = f"Lower `train.learning_rate` (now {settings.learning_rate:g})." if state.step else "The base itself gives no numbers on this data."
        raise OlpackError(f"The held-out loss is not finite at step {state.step} ({loss}).", remedy)
    if state.step > 0:
        state.waited += 1
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
            state.best = adapter_weights(forward.model) if settings.keep == "best" else None
    metrics.log(state, eval_loss=loss, perplexity=math.exp(min(loss, 700.0)))
    state.evaluated = state.step


def _last_checkpoint(saved: Checkpoint) -> str:
    return "" if saved.step is None else f" {saved.file} holds step {saved.step}."


def _place(saved: Checkpoint) -> str:
    return "there" if saved.step is None else f"step {saved.step}"


def _eval_loss(state: State, step: int) -> float:
    return next(record["eval_loss"] for record in reversed(state.metrics) if record["step"] == step and "eval_loss" in record)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, between two steps."""


@contextmanager
def _interrupt_between_steps(ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C until the step is whole, so that weights, optimizer and step count belong together; a second one is immediate.

    Of several processes one gets it, and all stop at the same step.
    """
    asked = threading.Event()

    def stop_if_asked() -> None:
        if ranks.any(asked.is_set()):
            raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield stop_if_asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_asked
    finally:
        signal.signal(signal.SIGINT, before)


def _backward(forward: Forward, trained: FlatParameters, rows: list[TokenRow], state: State, ranks: Ranks = ALONE) -> float:
    """Gradients of the mean loss over all target tokens of a batch, at `trained.parameters`; returns that loss.

    The sum over micro-batches is divided by the batch's count of target tokens, so the result does not depend on how the
    batch was cut. Where memory runs out the micro-batch is halved and the batch starts again. Of several processes each computes its rows,
    and all have the gradients and the loss of all rows.
    """
    count = sum(row.target_count for row in rows)
    while True:
        total, failed = 0.0, False
        trained.begin()
        try:
            losses = []
            for group, weight in _groups(rows, forward.budget(state.budget), ranks):
                losses.append(forward.backward(group, weight))
            total = torch.stack(losses).sum().item() if losses else 0.0
        except torch.OutOfMemoryError:
            if ranks.sharded:  # the others wait for this one in the middle of a layer, and the batch cannot start again
                raise OlpackError(
                    "A GPU's memory ran out.", f"Lower `train.micro_batch_tokens` (now {state.budget}); the same command then goes on."
                ) from None
            failed = True
        total, failures = ranks.sum(total, failed)
        if not failures:
            trained.fill()
            ranks.sum_gradients(trained.parameters)
            for parameter in trained.parameters:
                assert parameter.grad is not None  # `fill` has put zeros where there was none
                parameter.grad /= count  # last, in float32: in 16 bits the gradients of one token among thousands could vanish
            return total / count
        had_graphs = ranks.any(forward.forget())
        if forward.device.type == "cuda":
            torch.cuda.empty_cache()
        if had_graphs:
            continue  # with their memory
        longest = max(len(row.ids) for row in rows)
        if not forward.packs or state.budget <= longest:
            raise OlpackError(
                f"One row of {longest} tokens does not fit into the GPU's memory.",
                "Lower `data.max_length` or `train.rank`, set `train.gradient_checkpointing: true`, or take a smaller base.",
            )
        state.budget //= 2
        progress.warn(f"GPU memory ran out: going on with micro-batches of {state.budget} tokens, same batch")


def _groups(rows: list[TokenRow], budget: int, ranks: Ranks) -> Iterator[tuple[list[TokenRow], float]]:
    """Micro-batches of this process, each with the weight of its loss: 1, or 0 where it is run only because another process has one more."""
    if ranks.count == 1:
        yield from ((group, 1.0) for group in micro_batches(rows, budget))
        return
    shares = [micro_batches(share, budget) for share in partition(rows, ranks.count)]
    yield from ((group, 1.0) for group in shares[ranks.rank])
    if ranks.sharded:
        for _ in range(max(map(len, shares)) - len(shares[ranks.rank])):
            yield [min(rows, key=lambda row: len(row.ids))], 0.0


def evaluate(
    forward: Forward, rows: list[TokenRow], budget: int, title: str, ranks: Ranks = ALONE, stop_if_asked: Callable[[], None] | None = None
) -> float:
    """Mean negative log-probability per target token over `rows`, in nats, with products in 16 bits."""
    total = 0.0
    forward.model.eval()
    try:
        with torch.no_grad(), computing_in_16_bits(), progress.task(title, total=len(rows), unit="rows") as task:
            for group, weight in _groups(rows, forward.budget(budget), ranks):
                total += forward.loss(pack(group, forward.device)).item() * weight
                task.advance(min(len(group) * ranks.count, len(rows) - task.done))
                if stop_if_asked and ranks.count == 1:  # several processes can only stop where all are at the same place
                    stop_if_asked()
    finally:
        forward.model.train()
    return ranks.sum(total)[0] / sum(row.target_count for row in rows)


def learning_rate(step: int, steps: int, settings: Train) -> float:
    """Learning rate of a step (the first is 0): a linear rise over the warm-up, then the schedule down to zero at the end."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[settings.schedule]
    return settings.learning_rate * factor


def _optimizer(parameters: list[torch.nn.Parameter], settings: Train, device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cuda":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _write_adapter(adapted: AdaptedModel, base: Base, settings: Train, state: State, result: TrainResult, out: Path, saved: Checkpoint) -> None:
    import bitsandbytes
    import peft
    import transformers

    versions = {"olpack": __version__, "python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    record = {
        "base": base.label,
        "base_digest": base.digest,
        "train": settings.model_dump(),
        "held": adapted.quantization and vars(adapted.quantization),
        "result": vars(result),
        "versions": versions,
    }
    metrics = [*state.metrics, {"step": state.step, "kept_step": result.kept_step}]
    try:
        with folder_atomically(out) as folder:
            save_adapter(adapted.model, adapted.start, folder)
            (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    except (SafetensorError, OlpackError) as error:
        problem = error.problem if isinstance(error, OlpackError) else f"{out} could not be written: {error}."
        raise OlpackError(problem, f"Free some space; the same command goes on from the checkpoint of {_place(saved)}.") from None
