"""How long an 8B takes to its first step, phase by phase; and steps of few tokens: speed, kernels launched, the same losses with CUDA graphs.

    python benchmarks/small_steps.py make FOLDER                              # a base of Llama 3 8B's shape with random weights, 16 GB
    python benchmarks/small_steps.py run FOLDER [--olpack DIR] [--tokens 2048]
    python benchmarks/small_steps.py start FOLDER --olpack DIR                # what `olpack train` takes before it loads the base, there and here

`run` prints as it goes. `start` runs both in turn, each time in a new process, on rows of the shipped package: with bytecode, and with none, as
packages are that uv installs (Python is to look for it in an empty folder). `--olpack` is a folder with another version of olpack, to compare two of
them; `--busy N` measures again while N processes use the host's cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BEGUN = time.time()
START = """
import sys, time
began = time.monotonic()
import json, os
import olpack.train
def stop(*_, **__):
    print(json.dumps([time.monotonic() - began, time.process_time(), len(sys.modules)]), flush=True)
    os._exit(0)
olpack.train.train = stop
from olpack.cli import main
sys.argv = ["olpack", "--quiet", "train", "coding-assistant"]
main()
"""
SHAPE = {"8B": (4096, 14336, 32, 128256), "tiny": (1024, 2048, 3, None)}  # hidden size, MLP, layers, vocabulary
RANK = 16
STEPS, WARM = 12, 5


def lap(name: str) -> None:
    print(f"{time.time() - BEGUN:7.2f} s  {name}", flush=True)


def timed(owner: object, name: str) -> None:
    """Print how long each call of a function takes, the GPU's work included."""
    import torch

    function = getattr(owner, name, None)
    if function is None:  # another version of olpack
        return

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        started = time.time()
        try:
            return function(*arguments, **named)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f"           {time.time() - started:6.2f} s in {name}", flush=True)

    setattr(owner, name, wrapped)


def run(folder: Path, tokens: int, busy: int) -> None:
    import torch

    lap("torch imported")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.zeros(1, device=device)
        lap("GPU ready")
    from olpack.model.base import Base
    from olpack.recipe import Train
    from olpack.train.device import compute_dtype
    from olpack.train.ops import pointwise

    lap("olpack's recipe and base imported")
    base, settings = Base("random", folder), Train(rank=RANK, alpha=RANK)
    pointwise.compile_kernels(device, compute_dtype(device), base.config, RANK)
    lap("the kernels' compilation begins")
    try:
        from olpack.model.libraries import import_libraries
    except ImportError:  # another version of olpack
        from olpack.train import import_libraries
    import_libraries()
    from olpack.train import loop, model
    from olpack.train.forward import Forward
    from olpack.train.ops import equivalence, lora
    from olpack.train.ops.flat_parameters import FlatParameters

    lap("transformers and peft imported")
    for owner, name in ((model, "_load"), (model, "get_peft_model"), (model, "begin"), (equivalence.EquivalenceCheck, "__init__")):
        timed(owner, name)
    for owner, name in ((pointwise, "use_kernels"), (Forward, "_fuse"), (Forward, "_use_packed_attention"), (Forward, "_head_is_all")):
        timed(owner, name)
    adapted = model.load_with_adapter(base, settings, device).model
    lap("base loaded and quantized, adapter on it")
    forward = Forward(adapted, device, checkpointing=False)
    lap("fused functions checked")
    trained = FlatParameters(adapted)
    optimizer = loop._optimizer(trained.parameters, settings, device)
    bench = _Steps(forward, trained, optimizer, base.config["vocab_size"], tokens)
    bench.step(0)
    lap("FIRST STEP")
    if device.type != "cuda":
        return
    first = [parameter.detach().clone() for parameter in trained.parameters]
    print("plain:", bench.speed(), bench.launches(), flush=True)
    in_graphs = hasattr(forward, "use_graphs")
    for fp8 in (False, True) if in_graphs else ():
        if fp8:
            lora.fuse(adapted, forward.dtype, in_fp8=True)
            print("fp8, plain:", bench.speed(), bench.launches(), flush=True)
        bench.compare(first, settings)
        forward.use_graphs()
        print(f"{'fp8, ' if fp8 else ''}in graphs:", bench.speed(), bench.launches(), flush=True)
        print("graphs:", list(forward._graphs._seen) if forward._graphs else None, flush=True)
        if busy:
            others = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10000))"]) for _ in range(busy)]
            print(f"in graphs, {busy} busy processes beside it:", bench.speed(), flush=True)
            forward._graphs = None
            print(f"plain, {busy} busy processes beside it:", bench.speed(), flush=True)
            for other in others:
                other.kill()
        forward._graphs = None
    if in_graphs:
        lora.fuse(adapted, forward.dtype)
        forward.use_graphs()
        adapted.get_base_model().get_decoder().layers[1].register_forward_hook(lambda *_: torch.cuda.synchronize())
        print("a model that waits for the GPU:", [round(bench.step(seed), 4) for seed in (0, 0, 0, 1)], flush=True)


class _Steps:
    def __init__(self, forward, trained, optimizer, words: int, tokens: int):
        self.forward, self.trained, self.optimizer, self.words, self.tokens = forward, trained, optimizer, words, tokens

    def step(self, seed: int) -> float:
        import torch
        from train_8b import rows  # which imports torch, whose time is measured before

        from olpack.train import loop
        from olpack.train.checkpoint import State

        loss = loop._backward(self.forward, self.trained, rows(self.tokens, self.words, seed), State(budget=10**9))
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def speed(self) -> str:
        """Of the median step and of the slowest, after warm-up."""
        import torch

        seconds = []
        for seed in range(STEPS):
            torch.cuda.synchronize()
            started = time.time()
            self.step(seed)
            torch.cuda.synchronize()
            seconds.append(time.time() - started)
        median, slowest = sorted(seconds[WARM:])[(STEPS - WARM) // 2], max(seconds[WARM:])
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30
        rates = f"{self.tokens / median:,.0f} tokens/s (slowest step {self.tokens / slowest:,.0f})"
        return f"{rates}, peak {peak:.2f} GiB, {reserved:.1f} reserved;"

    def launches(self) -> str:
        import torch

        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            started = time.time()
            self.step(3)
            torch.cuda.synchronize()
            wall = time.time() - started
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        longest = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
        table = "".join(f"\n    {event.self_device_time_total / 1e3:7.2f} ms {event.count:5} × {event.key[:90]}" for event in longest)
        return (
            f"{len(events)} kernels and copies, {sum(event.self_device_time_total for event in events) / 1e6:.3f} s of the GPU in {wall:.3f} s{table}"
        )

    def compare(self, first: list, settings) -> None:
        """The same eight steps in several ways, without and with sums in a fixed order (flash attention adds up gradients in any order)."""
        import torch

        forward = self.forward
        torch.utils.deterministic.fill_uninitialized_memory = False
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it
        for in_order in (False, True):
            torch.use_deterministic_algorithms(in_order)
            plain = self.losses(first, settings)
            found = {"again": self.losses(first, settings)}
            forward.use_graphs()
            forward.forget()
            found["padded"] = padded = self.losses(first, settings)
            forward.use_graphs()
            found["in graphs"] = self.losses(first, settings)
            forward.use_graphs()
            found["resumed at step 4"] = self.losses(first, settings, resumed=4)
            forward._graphs = None
            apart = [f"{name} {_apart(plain, losses):.1e} from plain, {_apart(padded, losses):.1e} from padded" for name, losses in found.items()]
            print(f"sums in {'a fixed' if in_order else 'any'} order: plain {plain[0]:.5f} to {plain[-1]:.5f};", "; ".join(apart), flush=True)
        torch.use_deterministic_algorithms(False)

    def losses(self, first: list, settings, resumed: int | None = None) -> list[float]:
        """Of eight steps over three batches, from the same adapter on, and the norm of the adapter then.

        Args:
            resumed: before this step, all graphs are forgotten, as in a run that resumes.
        """
        import torch

        from olpack.train import loop

        for parameter, value in zip(self.trained.parameters, first, strict=True):
            parameter.data.copy_(value)
        self.optimizer = loop._optimizer(self.trained.parameters, settings, torch.device("cuda"))
        found = []
        for number, seed in enumerate((0, 1, 2, 0, 1, 2, 0, 1)):
            if number == resumed:
                self.forward.use_graphs()
            found.append(self.step(seed))
        return [*found, sum(parameter.double().norm().item() for parameter in self.trained.parameters)]


def start(folder: Path, before: Path, times: int) -> None:
    repository = Path(__file__).resolve().parents[1]
    package = folder / "modelfiles/coding-assistant"
    shutil.copytree(repository / "modelfiles/coding-assistant", package, dirs_exist_ok=True)
    for name, count in (("train", 40), ("eval", 8)):
        file = package / f"{name}.jsonl"
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    commit = subprocess.check_output(["git", "-C", before, "rev-parse", "--short", "HEAD"], text=True).strip()
    checkouts = {f"at {commit}": before.resolve(), "here": repository}
    print("| bytecode | olpack | seconds | of the processor | modules |\n| --- | --- | ---: | ---: | ---: |")
    for bytecode in ("there", "none"):
        runs: dict[str, list[list[float]]] = {checkout: [] for checkout in checkouts}
        for turn in range(times + 1):
            for checkout, source in checkouts.items():
                shutil.rmtree(folder / "build", ignore_errors=True)
                variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))}
                if bytecode == "none":
                    variables |= {"PYTHONPYCACHEPREFIX": str(folder / "no-bytecode"), "PYTHONDONTWRITEBYTECODE": "1"}
                done = subprocess.run([sys.executable, "-P", "-c", START], cwd=folder, env=variables, check=True, stdout=subprocess.PIPE, text=True)
                if turn:  # the first is not counted
                    runs[checkout].append(json.loads(done.stdout.splitlines()[-1]))
        for checkout, made in runs.items():
            seconds, processor, modules = (statistics.median(column) for column in zip(*made, strict=True))
            print(f"| {bytecode} | {checkout} | {seconds:.2f} | {processor:.2f} | {modules:,.0f} |", flush=True)


def _apart(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "start"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPE, default="8B")
    parser.add_argument("--olpack", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--busy", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "start":
        return start(arguments.folder, arguments.olpack, arguments.times)
    if arguments.olpack:
        sys.path.insert(0, str(arguments.olpack))
    if arguments.what == "make":
        from random_model import write_base

        hidden, middle, layers, words = SHAPE[arguments.shape]
        write_base(arguments.folder, hidden, middle, layers, words, llama=True)
        lap("written")
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        run(arguments.folder, arguments.tokens, arguments.busy)


if __name__ == "__main__":
    main()
