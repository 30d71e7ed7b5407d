"""Training with streamed layers on a GPU whose memory is limited: peak, speed, and losses beside those of the same run with all layers on the GPU.

    python benchmarks/streaming.py [--seconds 170] [--lines 8B:2.4 70B:8 32B:4.8 70B:24]

Shapes of Llama 3 8B and 70B and of Qwen2.5 32B with random weights in NF4, made on the GPU; LoRA of rank 16 on all linear layers. Each line is
the planner's choice for a limit, which `set_per_process_memory_fraction` then enforces: GB of 10⁹ bytes, without the driver's context (0.5 GB).
The losses of an 8B are compared with those of the same micro-batches without streaming. Needs 70 GB of host memory for the largest line.
Prints each line as soon as it has it, and writes the table to benchmarks/streaming.md. No line begins once the seconds are over.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for losses that can be compared to the bit

import torch
from page import command_line
from train_8b import BEGUN, RANK, SHAPES, random_model, rows

SLACK = 0.05  # of the limit, as the planner leaves it of a GPU's memory
SLACKS = (SLACK, 0.07, 0.09, 0.11)  # which are tried in turn
STEP = 16_384  # tokens
COMPARED = 3  # steps whose losses are compared


class Run:
    """A model whose memory is limited, and its steps.

    Args:
        shape: one of `SHAPES`.
        limit: bytes of GPU memory; None: all.
        fit: the planner's choice, or that of another run; None: to be made.
        slack: of the limit, what the planner leaves.
    """

    def __init__(self, shape: str, device: torch.device, limit: float | None, fit=None, slack: float = SLACK):
        from olpack.errors import OlpackError
        from olpack.model.shape import MetaModel
        from olpack.recipe import Train
        from olpack.train import loop, planner
        from olpack.train.forward import Forward
        from olpack.train.model import stream_layers
        from olpack.train.ops.flat_parameters import FlatParameters
        from olpack.train.ops.layer_stream import tensors_of
        from olpack.train.ops.pinned_memory import PinnedMemory

        torch.cuda.set_per_process_memory_fraction(1.0)
        self.device, self.words = device, SHAPES[shape][-1]
        torch.manual_seed(0)
        model = random_model(shape, device)
        if fit is None:
            assert limit is not None
            batch = rows(STEP, self.words)
            settings = Train(batch_size=len(batch), epochs=1, rank=RANK, gradient_checkpointing=True)
            meta = MetaModel({"architectures": ["LlamaForCausalLM"], **model.config.to_dict()}, shape)
            available, host = round(limit * (1 - slack)), planner.streamable_memory()
            fit = planner.on_gpu(meta, batch, settings, available, streamable=host, pace=partial(planner.measure_pace, device))
            print(fit.summary, f"({time.time() - BEGUN:.0f} s since the start)", flush=True)
            if not fit.fits:
                raise OlpackError("No row fits.", "Take a larger limit.")
        self.fit = fit
        if fit.streamed:
            # As with a base that loads in the host's memory: the embeddings stay there, and what goes to the GPU lies side by side, not between the
            # holes that the streamed layers leave.
            embeddings = model.get_base_model().get_input_embeddings().weight
            embeddings.data = embeddings.data.cpu()
            free()  # or a slot takes a piece of their memory, and the rest of it is lost
            stream_layers(model.get_base_model(), device, fit.streamed)
            staying = [tensor for tensor in tensors_of(model) if tensor.is_cuda]
            for tensor in staying:
                tensor.data = tensor.data.cpu()
            free()
            for tensor in staying:
                tensor.data = tensor.data.to(device)
        free()
        print(f"{shape} made, {time.time() - BEGUN:.0f} s since the start", flush=True)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.reset_peak_memory_stats()
        pinned = PinnedMemory(fit.pinned_by_forward, device)
        self.forward = Forward(model, device, checkpointing=True, pinned=pinned, offload_head=fit.offload_head)
        self.trained = FlatParameters(model)
        self.optimizer = loop._optimizer(self.trained.parameters, Train(), device)

    def step(self, seed: int) -> tuple[float, float]:
        """(loss, seconds)"""
        from olpack.train import loop
        from olpack.train.checkpoint import State

        batch = rows(STEP, self.words, seed)
        torch.cuda.synchronize()
        started = time.time()
        state = State(budget=self.fit.tokens)
        loss = loop._backward(self.forward, self.trained, batch, state)
        if state.budget < self.fit.tokens:
            raise torch.OutOfMemoryError(f"the step was halved to {state.budget:,} tokens at once")
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return loss, time.time() - started

    def losses(self) -> list[float]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return [self.step(seed)[0] for seed in range(COMPARED)]
        finally:
            torch.use_deterministic_algorithms(False)


def free() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def steps_within(shape: str, gigabytes: float, device: torch.device, slack: float, compare: bool, steps: int):
    """(the planner's choice, losses, seconds of the other steps, peaks in GB: of tensors, with the allocator's free pieces)"""
    run = Run(shape, device, gigabytes * 1e9, slack=slack)
    losses = run.losses() if compare else [run.step(0)[0]]
    seconds = sorted(run.step(seed)[1] for seed in range(1, 1 + steps))
    return run.fit, losses, seconds, [torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9]


def line(shape: str, gigabytes: float, device: torch.device, compare: bool, steps: int) -> str:
    """A line of the table. Where memory runs out, which is printed, the planner leaves more of the limit."""
    from olpack.errors import OlpackError

    measured = None
    for slack in SLACKS:
        try:
            measured = steps_within(shape, gigabytes, device, slack, compare, steps)
        except (torch.OutOfMemoryError, OlpackError) as error:
            peak = torch.cuda.max_memory_allocated() / 1e9
            print(f"out of memory: {shape} in {gigabytes:g} GB with {slack:.0%} left, peak {peak:.2f} GB: {str(error)[:300]}", flush=True)
        free()
        if measured:
            break
    if measured is None:
        return f"does not fit: {shape} in {gigabytes:g} GB"
    fit, losses, seconds, peaks = measured
    pace = STEP / seconds[len(seconds) // 2]
    compared = f"first loss {losses[0]:.4f}"
    if compare:
        plain = Run(shape, device, None, replace(fit, streamed=0))
        expected, peak = plain.losses(), torch.cuda.max_memory_allocated() / 1e9
        seconds = sorted(plain.step(seed)[1] for seed in range(1, 1 + steps))
        del plain
        free()
        apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        compared = (
            f"{'equal to the bit' if losses == expected else f'at most {apart:.1e} apart'} over {COMPARED} steps ({', '.join(map(repr, losses))})"
        )
        compared += f"; without streaming {peak:.2f} GB, {STEP / seconds[len(seconds) // 2]:,.0f} tokens/s"
    link = f"{fit.pace.link / 1e9:.1f} | {fit.expected_tokens_per_s:,.0f}" if fit.pace else "| "
    return (
        f"| {shape} | {gigabytes:g} | {fit.largest:,} | {fit.streamed} of {SHAPES[shape][2]} "
        f"| {fit.bytes / 1e9:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} | {link} | {pace:,.0f} | {compared} |"
    )


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--lines", nargs="+", default=["8B:2.4", "70B:8", "32B:4.8", "70B:24"])
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    page = [
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; NF4, rank {RANK} on all linear layers, {STEP:,} tokens a step.",
        "`python benchmarks/streaming.py`",
        "",
        "| model | limit, GB | tokens at once | layers streamed | peak, estimated | peak | peak with the allocator's free pieces "
        "| link, GB/s | tokens/s expected at most | tokens/s | losses |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    print("\n".join(page), flush=True)
    for asked in arguments.lines:
        if time.time() - BEGUN > arguments.seconds:
            print(f"not begun: {asked}", flush=True)
            continue
        shape, gigabytes = asked.split(":")
        try:
            page.append(line(shape, float(gigabytes), device, compare=shape == "8B", steps=1))
        except Exception as error:  # the other lines are worth having
            page.append(f"failed: {asked}: {error!r}")
            free()
        print(page[-1], f"   ({time.time() - BEGUN:.0f} s since the start)", flush=True)
        arguments.output.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
