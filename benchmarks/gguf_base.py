"""Bases that are GGUF files: how near training's forward pass is to llama.cpp on the same file, and the trained model to the served one.

    python benchmarks/gguf_base.py --work FOLDER             # the same command goes on where it was; --only does one of the tables

First table: small models of each architecture, converted and quantized by llama.cpp; the largest difference of a logit from llama.cpp's, in
standard deviations of the logits, and the KL divergence of the tokens. llama.cpp rounds a layer's input to 16 bits where the weight has 16, and to 8
where it has fewer, which olpack does not: that is what the figures show. With experts, a rounded input can choose another expert.

Second table: SmolLM2-135M (builtin/smollm2-135m, a Q4_1 file) is trained on its own blocks and, with its dequantized weights as the original, on NF4.
KL divergence of the served file from training's forward pass, over the target tokens of held-out rows, in millinats.

Third table: the example `persona` with its own settings, on builtin/tiny-coder, once as a Q4_0 file and once on NF4, and on SmolLM2-135M as above:
24 tasks, answered greedily, the KL divergence as above, and the speed of generation, all files of a training in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from olpack import progress, recipe
from olpack.compare.cache import Cache, Units
from olpack.compare.hardware import describe_machine
from olpack.compare.job import Job, asked_of, run_worker
from olpack.compare.results import Scores
from olpack.compare.scores import check_answers
from olpack.data import TokenRow
from olpack.export import Target, export
from olpack.export.lora import export_adapter
from olpack.llamacpp.cores import usable_cores
from olpack.llamacpp.engine import Engine
from olpack.model.base import BUILTIN, Base, resolve
from olpack.model.gguf_architectures import config_of, weights_of
from olpack.model.gguf_base import open_gguf
from olpack.model.shape import MetaModel
from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.run import run
from olpack.train.model import load_with_adapter
from olpack.workspace import shipped

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from gguf_models import MODELS, QUANTS, has_experts, llama_cpps, make, ours

BASE = "builtin/smollm2-135m"
SCORED = 12  # held-out rows
MERGED = ["Q4_0", "Q4_1", "Q4_K_M", "Q8_0"]
EXAMPLE = "persona"
EXAMPLES = {
    "tiny-coder-blocks": "tiny-coder, the blocks of a Q4_0 file",
    "tiny-coder-nf4": "tiny-coder, NF4",
    "smollm2-blocks": "SmolLM2-135M, the blocks of the Q4_1 file",
    "smollm2-nf4": "SmolLM2-135M, NF4",
}
TURNS, BEFORE, GENERATED = 6, 32, 48  # of the speed: turns, and tokens in the context before and generated

Files = dict[str, tuple[Path, Path | None]]  # what is served, by its name in the tables: a GGUF, and the adapter on it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done, with room for 3 GB")
    parser.add_argument("--only", choices=["logits", "served", "tasks"], help="one of the tables")
    parser.add_argument("--trainings", nargs="*", choices=list(EXAMPLES), default=list(EXAMPLES), help="these of the third table")
    parser.add_argument("--rows", type=int, default=96, help="training rows of the second table")
    parser.add_argument("--threads", type=int, help="of llama.cpp; all cores by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    progress.use("quiet")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "logits"):
        for name in MODELS:
            kept(arguments.work / f"logits-{name}.json", lambda name=name: compare(arguments.work / name, name))
    if arguments.only in (None, "served", "tasks"):
        base = resolve(BASE, relative_to=Path())
        original = unpacked(base, arguments.work / "original")
        for name, source in (("blocks", BASE), ("nf4", str(original))) if arguments.only != "tasks" else ():
            kept(
                arguments.work / f"served-{name}.json",
                lambda name=name, source=source: serve(arguments.work / name, source, arguments.rows, arguments.threads),
            )
    if arguments.only in (None, "tasks"):
        tiny = arguments.work.absolute() / "tiny-coder-Q4_0.gguf"
        if not tiny.is_file():
            export(BUILTIN / "tiny-coder", [Target("Q4_0", tiny)], name="tiny-coder")
        for name, source in zip(EXAMPLES, (str(tiny), "builtin/tiny-coder", BASE, str(original)), strict=True):
            if name in arguments.trainings:
                kept(
                    arguments.work / f"{name}.json",
                    lambda name=name, source=source: serve_example(arguments.work / name, source, arguments.threads),
                )
    write(arguments.work, arguments.output)


def kept(file: Path, measure) -> None:
    """What a former run measured stays."""
    if not file.is_file():
        file.write_text(json.dumps(measure()))
        print(file.stem, file.read_text(), flush=True)


def compare(folder: Path, name: str) -> dict:
    """One row of the first table."""
    files = export(make(folder, name), [Target(quant, folder / f"{quant}.gguf") for quant in QUANTS])
    row = {}
    for file in files:
        found, expected = ours(open_gguf(file.path)), llama_cpps(file.path)
        row[file.quant] = {"largest": float(np.abs(found - expected).max() / expected.std()), "kl": float(divergence(found, expected).mean())}
    shutil.rmtree(folder)
    return row


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of each token, [tokens], in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (reference, other))
    return (p.exp() * (p - q)).sum(-1).numpy()


def unpacked(base: Base, folder: Path) -> Path:
    """The model's folder that a GGUF stands for: its dequantized weights in float32, and its tokenizer."""
    if not (folder / "config.json").is_file():
        assert base.gguf is not None
        shutil.copytree(base.path, folder, dirs_exist_ok=True)
        config = config_of(base.gguf)
        weights = weights_of(base.gguf, MetaModel(config, base.label).module)
        read = {name: weight.read(base.gguf, torch.float32).contiguous() for name, weight in weights.items()}
        save_file(read, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    return folder.absolute()


def serve(folder: Path, base: str, rows: int, threads: int | None) -> dict:
    """Train on a base, and compare what is served with it. One row for each file of the second table."""
    package = folder / "modelfiles/served"
    package.mkdir(parents=True, exist_ok=True)
    source = shipped("modelfiles") / "coding-assistant"
    for name, count in (("train.jsonl", rows), ("eval.jsonl", 24)):
        lines = (source / name).read_text(encoding="utf-8").splitlines()
        (package / name).write_text("\n".join(lines[:: len(lines) // count][:count]) + "\n", encoding="utf-8")
    asked = {
        "base": base,
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "rank": 16},
        "quants": MERGED,
        "modelfile": {"system": "You are a coding assistant. Answer with Python code.", "parameters": {"num_ctx": 512}},
    }
    (package / "recipe.yaml").write_text(json.dumps(asked))
    build = Build(recipe.load(package / "recipe.yaml"), folder / "build")
    return measured(build, served_files(build, folder), threads)


def serve_example(folder: Path, base: str, threads: int | None) -> dict:
    """Train the example on a base, and have every file that is served answer its tasks. One training of the third table."""
    package = folder / "modelfiles" / EXAMPLE
    if not package.is_dir():
        shutil.copytree(shipped("examples") / EXAMPLE, package)
    asked = [f"base={base}", f"quants=[{', '.join(MERGED)}]", *(["train.learning_rate=0.002"] if "tiny-coder" in base else [])]
    build = Build(recipe.load(package / "recipe.yaml", asked), folder / "build")
    files = served_files(build, folder)
    row = measured(build, files, threads)
    rates = speeds(files, threads)
    for name, (file, adapter) in files.items():
        row["files"][name] |= {"rates": rates[name], "passed": passed(build, file, adapter, threads)}
    return row


def served_files(build: Build, folder: Path) -> Files:
    """Train and export."""
    run(build, "train")
    run(build, "export")
    files: Files = {f"merged {quant}": (build.paths.gguf(quant), None) for quant in MERGED}
    if build.base.gguf is not None:
        adapter = folder / "adapter.gguf"
        export_adapter(build.base.source, build.paths.adapter, adapter)
        files = {"adapter on the file": (build.base.source, adapter), "the file without its adapter": (build.base.source, None), **files}
    return files


def passed(build: Build, file: Path, adapter: Path | None, threads: int | None) -> list[float | None]:
    """Scores of the tasks."""
    asked, threads = build.recipe.compare, threads or usable_cores()
    units = Units(Cache(None), "", {})
    job = Job(
        path=file,
        adapter=adapter,
        engine="",
        context=build.package.num_ctx,
        threads=threads,
        untimed_threads=threads,
        answer_tokens=asked.answer_tokens,
        tasks=asked_of(build.tasks),
    )
    if problems := run_worker(job, file.name, units):
        raise problems[0]
    check_answers(build.tasks, units, file.name)
    scores = units.get("scores", Scores)
    assert scores is not None  # the tasks were answered
    return scores.values


def speeds(files: Files, threads: int | None) -> dict[str, list[float]]:
    """Generated tokens per second of each file, in turns, each in the opposite order of the one before. The first turn is discarded."""
    rates: dict[str, list[float]] = {name: [] for name in files}
    with ExitStack() as opened:
        engines = {
            name: opened.enter_context(Engine(file, BEFORE + GENERATED, threads, adapter=adapter, max_outputs=1))
            for name, (file, adapter) in files.items()
        }
        for turn in range(TURNS + 1):
            for name in engines if turn % 2 else reversed(engines):
                engines[name].process(list(range(1, BEFORE + 1)))
                started = time.perf_counter()
                for token in range(1, GENERATED + 1):
                    engines[name].extend(token)
                if turn:
                    rates[name].append(GENERATED / (time.perf_counter() - started))
    return rates


def measured(build: Build, files: Files, threads: int | None) -> dict:
    """Losses of the training, and the divergence of each file."""
    trained = records.result(build.paths, "train")
    held_out = build.rows[1][:SCORED]
    reference = forward(build, held_out)
    row = {"before": trained["eval_loss_before"], "after": trained["eval_loss_after"], "seconds": trained["seconds"], "files": {}}
    for name, (file, adapter) in files.items():
        tokens = divergences(file, adapter, held_out, reference, threads)
        row["files"][name] = {
            "kl": float(tokens.mean()),
            "error": float(tokens.std() / np.sqrt(len(tokens))),
            "p99": float(np.quantile(tokens, 0.99)),
            "bytes": (adapter or file).stat().st_size,
        }
    return row


def forward(build: Build, rows: list[TokenRow]) -> list[np.ndarray]:
    """Logits of the trained model before each target token, in training's forward pass in 32 bits, which is that of the CPU."""
    adapted = load_with_adapter(build.base, build.recipe.train, torch.device("cpu")).model.eval()
    set_peft_model_state_dict(adapted, load_file(build.paths.adapter / "adapter_model.safetensors"))
    found = []
    with torch.no_grad():
        for row in rows:
            logits = adapted(input_ids=torch.tensor([row.ids], device=adapted.device)).logits[0, :-1]
            found.append(logits[torch.tensor(row.loss_mask[1:])].float().cpu().numpy())
    return found


def divergences(file: Path, adapter: Path | None, rows: list[TokenRow], reference: list[np.ndarray], threads: int | None) -> np.ndarray:
    """KL divergence of a served file from the reference at each target token, in nats."""
    with Engine(file, max(len(row.ids) for row in rows) + 1, threads, adapter=adapter) as engine:
        found = [np.stack([logits.copy() for _, logits in engine.scored(row.ids, row.loss_mask)]) for row in rows]
    return np.concatenate([divergence(one, other) for one, other in zip(reference, found, strict=True)])


def write(work: Path, output: Path) -> None:
    """The tables, of all that was measured."""
    machine = describe_machine(None)
    first, _, rest = (__doc__ or "").partition("First table: ")[2].partition("Second table: ")
    second, _, third = rest.partition("Third table: ")
    text = ["# GGUF files as bases", "", f"S{first.strip()[1:]}", ""]
    text += [f"| architecture | {' | '.join(QUANTS)} |", f"| --- |{' ---: |' * len(QUANTS)}"]
    for name in MODELS:
        if (file := work / f"logits-{name}.json").is_file():
            row = json.loads(file.read_text())
            figures = [f"{row[quant]['largest']:.3f} ({1000 * row[quant]['kl']:.3f})" for quant in QUANTS]
            experts = " (experts)" if has_experts(name) and "experts" not in name else ""
            text.append(f"| {name.removesuffix('-sentencepiece')}{experts} | {' | '.join(figures)} |")
    text += ["", "Largest difference of a logit in standard deviations (KL divergence in millinats).", ""]
    text += [second.strip(), ""]
    text += ["| trained on | served as | size | KL mean ± s.e. | KL 99 % |", "| --- | --- | ---: | ---: | ---: |"]
    for name, title in (("blocks", "the file's blocks"), ("nf4", "NF4")):
        if (file := work / f"served-{name}.json").is_file():
            row = json.loads(file.read_text())
            for served, figures in row["files"].items():
                kl = f"{1000 * figures['kl']:.2f} ± {1000 * figures['error']:.2f}"
                text.append(f"| {title} | {served} | {figures['bytes'] / 1e6:.1f} MB | {kl} | {1000 * figures['p99']:.1f} |")
            text.append(f"| {title} | loss on held-out rows {row['before']:.3f} -> {row['after']:.3f} in {row['seconds']:.0f} s | | | |")
    text += ["", f"T{third.strip()[1:]}", ""]
    text += ["| trained on | served as | size | KL mean ± s.e. | tasks | generated tokens/s |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, title in EXAMPLES.items():
        if (file := work / f"{name}.json").is_file():
            row = json.loads(file.read_text())
            for served, figures in row["files"].items():
                kl, scores, rates = f"{1000 * figures['kl']:.2f} ± {1000 * figures['error']:.2f}", figures["passed"], figures["rates"]
                solved = f"{sum(value or 0 for value in scores):.0f} of {len(scores)}"
                speed = f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})"
                text.append(f"| {title} | {served} | {figures['bytes'] / 1e6:.1f} MB | {kl} | {solved} | {speed} |")
            text.append(f"| {title} | loss on held-out rows {row['before']:.3f} -> {row['after']:.3f} in {row['seconds']:.0f} s | | | | |")
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    text.append(f"\n{datetime.now(UTC):%Y-%m-%d}, {machine.cores} cores of {machine.cpu}; torch {torch.__version__}, {versions}.")
    text.append("`python benchmarks/gguf_base.py --work FOLDER`\n")
    print("\n".join(text))
    output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
