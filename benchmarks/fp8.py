"""Products of frozen weights in fp8 beside 16 bits: does training end at the same held-out loss, how alike are gradients, where is it faster?

    python benchmarks/fp8.py [--models builtin/tiny-coder smollm2.gguf] [--at-once 6] [--output benchmarks/fp8.md]

Needs a GPU that multiplies in fp8. A GGUF among the models is dequantized to a folder first. Each run trains on the rows of coding-assistant, in
a process of its own, and `--at-once` of them share the GPU. The 8B shape has random weights, and memorizes a few rows.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from page import command_line, environment, publish

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "modelfiles/coding-assistant"
SIZES = {"8B": (2048, 4096, 8192, 16384), "1B": (2048, 4096, 8192, 16384)}  # tokens of a step
WAYS, SEEDS, LENGTHS, BATCH = ("bf16", "fp8"), (0, 1, 2), (50, 500), 8


def folder_of(model: str, work: Path) -> str:
    """A GGUF as a folder in 16 bits; any other base as it is."""
    if not model.endswith(".gguf"):
        return model
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, folder = Path(model), work / Path(model).stem
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # the weights are dequantized, and transformers would not save what it read quantized
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder)


def rows_of(model: str):
    """(base, training rows, held-out rows)"""
    from transformers import AutoTokenizer

    from olpack.data import Renderer, load_chats
    from olpack.model.base import resolve

    base = resolve(model, relative_to=REPOSITORY)
    renderer = Renderer(AutoTokenizer.from_pretrained(base.path))
    return base, *([row for chat in load_chats(PACKAGE / name) for row in renderer.rows(chat)] for name in ("train.jsonl", "eval.jsonl"))


def learn(model: str, way: str, seed: int, work: Path) -> dict:
    """Held-out loss before and after each number of steps."""
    from olpack.recipe import Train
    from olpack.train import train

    base, rows, held_out = rows_of(model)
    losses = {}
    for steps in LENGTHS:
        settings = Train(products=way, seed=seed, epochs=steps * BATCH / len(rows), batch_size=BATCH, keep="last", eval_every=steps)
        folder = work / f"{way}-{seed}-{steps}"
        result = train(base, rows, held_out, settings, out=folder / "adapter", checkpoint=folder / "checkpoint", key=folder.name)
        losses["before"], losses[str(steps)] = result.eval_loss_before, result.eval_loss_after
    return losses


def with_adapter(model, scale: float = 0.01):
    """The model with B of each adapter drawn at random, so that A has gradients, too."""
    import torch

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def layer_gradients(model, rows: list, in_fp8: bool) -> dict[int, object]:
    """The gradient of each layer's adapters, one vector each."""
    import re

    import torch

    from olpack.train.batches import pack
    from olpack.train.forward import Forward

    device = torch.device("cuda", 0)
    forward = Forward(model, device, checkpointing=False, in_fp8=in_fp8)
    assert forward.in_fp8 == in_fp8
    (forward.loss(pack(rows, device)) / sum(row.target_count for row in rows)).backward()
    found: dict[int, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(int(re.search(r"layers[.](\d+)", name)[1]), []).append(parameter.grad.flatten())
    model.zero_grad(set_to_none=True)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def cosines(make, rows: list) -> str:
    """Cosine of each layer's gradient in fp8 with that in 16 bits: least and median."""
    import torch

    plain, other = (layer_gradients(make(), rows, in_fp8) for in_fp8 in (False, True))
    found = [torch.nn.functional.cosine_similarity(plain[layer].double(), other[layer].double(), dim=0).item() for layer in plain]
    return f"{min(found):.4f}, {statistics.median(found):.4f}"


def of_model(model: str) -> dict:
    """Cosines of a real model."""
    import torch

    from olpack.recipe import Train
    from olpack.train.model import load_with_adapter

    base, rows, _ = rows_of(model)
    return {"cosines": cosines(lambda: with_adapter(load_with_adapter(base, Train(), torch.device("cuda", 0)).model), rows[:16])}


def steps(forward, trained, count: int, batch: list, learning_rate: float = 1e-3) -> list[float]:
    """Losses of so many steps over the same rows."""
    import torch

    from olpack.recipe import Train
    from olpack.train import loop
    from olpack.train.checkpoint import State

    optimizer, losses = loop._optimizer(trained.parameters, Train(), forward.device), []
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    for _ in range(count):
        losses.append(loop._backward(forward, trained, batch, State(budget=10**9)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return losses


def of_8b() -> dict:
    """Cosines, memorizing, and speed of the 8B shape; speed of the 1B shape."""
    import gc

    import torch
    from train_8b import SHAPES, random_model
    from train_8b import rows as random_rows

    from olpack.train.forward import Forward
    from olpack.train.ops.flat_parameters import FlatParameters

    device, found = torch.device("cuda", 0), {"losses": {}, "speed": {}}

    def seeded():
        torch.manual_seed(0)
        return with_adapter(random_model("8B", device))

    found["cosines"] = cosines(seeded, random_rows(2048, 128_000))
    for shape, sizes in SIZES.items():
        for way in WAYS:
            gc.collect()
            torch.cuda.empty_cache()
            model = random_model(shape, device)
            forward = Forward(model, device, checkpointing=False, in_fp8=way == "fp8")
            trained = FlatParameters(model)
            start = [parameter.detach().clone() for parameter in trained.parameters]

            for tokens in sizes:
                batch = random_rows(tokens, SHAPES[shape][-1])
                steps(forward, trained, 3, batch)
                torch.cuda.reset_peak_memory_stats()
                begun = time.perf_counter()
                steps(forward, trained, 6, batch)
                speed = 6 * tokens / (time.perf_counter() - begun)
                found["speed"].setdefault(f"{shape} {tokens}", {})[way] = (speed, torch.cuda.max_memory_allocated() / 2**30)
            for seed in SEEDS if shape == "8B" else ():
                generator = torch.Generator(device).manual_seed(seed)
                for parameter, first in zip(trained.parameters, start, strict=True):
                    shaken = 1 + 0.1 * torch.randn(first.shape, generator=generator, device=device)
                    parameter.data.copy_(first * shaken)
                losses = steps(forward, trained, 50, random_rows(2048, 2000, 100))
                found["losses"].setdefault(way, []).append((losses[0], losses[-1]))
            del model, forward, trained, start
    return found


def child(arguments: list[str], log: Path) -> dict:
    """What this script prints in a process of its own."""
    threads = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.time()
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env={**environment(), **threads})
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    warnings = " ".join(line for line in done.stderr.splitlines() if line.startswith("warning"))
    print(f"{' '.join(arguments[:-1])}: {line or done.stderr[-1500:]} {warnings} ({time.time() - begun:.0f} s)", file=sys.stderr, flush=True)
    return json.loads(line.removeprefix("RESULT ")) if line else {}


def spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "failed"


def page(models: list[str], at_once: int) -> list[str]:
    import torch

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = {model: folder_of(model, work) for model in models}
        runs = {(model, way, seed): ["learn", folders[model], way, str(seed), str(work)] for model in models for way in WAYS for seed in SEEDS}
        shape = child(["8b"], work / "8b.log")
        with ThreadPoolExecutor(at_once) as pool:
            of_runs = dict(zip(runs, pool.map(lambda run: child(run, work / f"{'-'.join(run[2:4])}.log"), runs.values()), strict=True))
            of_models = dict(zip(models, pool.map(lambda model: child(["model", folders[model]], work / "model.log"), models), strict=True))
    lines = [
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}. `python benchmarks/fp8.py`. NF4, rank 16, all linear layers; "
        f"{BATCH} rows of coding-assistant a step; seeds {', '.join(map(str, SEEDS))}: mean held-out loss (lowest to highest).",
        "",
        "| model | steps | before | 16 bits | fp8 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for model in models:
        for steps in LENGTHS:
            of_way = {way: [of_runs[model, way, seed].get(str(steps)) for seed in SEEDS] for way in WAYS}
            cells = [spread([loss for loss in of_way[way] if loss is not None]) for way in WAYS]
            before = next((run["before"] for key, run in of_runs.items() if key[0] == model and run), None)
            lines.append(f"| {Path(model).stem} | {steps} | {before or 0:.3f} | {' | '.join(cells)} |")
    for way_losses in [shape.get("losses") or {}]:
        cells = [spread([last for _, last in way_losses.get(way, [])]) for way in WAYS]
        before = way_losses["bf16"][0][0] if way_losses else 0
        lines.append(f"| 8B shape, random weights; loss of the rows that it memorizes | 50 | {before:.3f} | {' | '.join(cells)} |")
    lines += ["", "Cosine of a layer's gradient in fp8 with that in 16 bits:", "", "| model | least, median of the layers |", "| --- | ---: |"]
    lines += [f"| {Path(model).stem} | {of_models[model].get('cosines', 'failed')} |" for model in models]
    lines += [f"| 8B shape, random weights | {shape.get('cosines', 'failed')} |", "", "Speed of a step without checkpointing:", ""]
    lines += ["| shape and tokens of a step | 16 bits, tokens/s | fp8 | | 16 bits, GiB | fp8 |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for key, ways in (shape.get("speed") or {}).items():
        (plain, plain_peak), (fast, fast_peak) = ways["bf16"], ways["fp8"]
        lines.append(f"| {key} | {plain:,.0f} | {fast:,.0f} | {fast / plain:.2f} × | {plain_peak:.1f} | {fast_peak:.1f} |")
    return lines


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("learn", "model", "8b"):
        random.seed(0)
        what, *rest = sys.argv[1:]
        if what == "learn":
            result = learn(rest[0], rest[1], int(rest[2]), Path(rest[3]) / Path(rest[0]).name)
        else:
            result = of_model(rest[0]) if what == "model" else of_8b()
        print("RESULT", json.dumps(result))
        return
    parser = command_line(__file__, __doc__)
    parser.add_argument("--models", nargs="+", default=["builtin/tiny-coder"])
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 2) // 3))
    arguments = parser.parse_args()
    publish(page(arguments.models, arguments.at_once), arguments.output)


if __name__ == "__main__":
    main()
