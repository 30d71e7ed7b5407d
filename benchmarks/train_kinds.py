"""Every method and every kind of base: taught four facts, exported, and asked for them.

    python benchmarks/train_kinds.py --work /tmp/kinds              # the same command goes on where it was; --only nf4 does some
    python benchmarks/train_kinds.py --work /tmp/kinds --jobs 6     # side by side, each process with its share of the cores

Fine-tunes tiny-coder on twenty questions, exports it as a build does, and has the embedded llama.cpp answer the same questions from the Q8_0
file. Bases that come quantized are tiny-coder packed by tests/quantized_bases.py. Runs on a CPU, and on a GPU where there is one. Prints each
row as it comes, then a Markdown table, which it writes to benchmarks/train_kinds.md. A kind that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import torch

from olpack import progress, recipe
from olpack.compare.hardware import describe_machine
from olpack.export.client import one_worker
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.engine import Engine, Sampling
from olpack.model.base import BUILTIN
from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.run import run
from olpack.train.device import pick_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from quantized_bases import write_quantized

FACTS = {
    "name of the ferry": "It is called Marigold.",
    "colour of the harbour gate": "The gate is ochre.",
    "height of the lighthouse": "It is 57 metres high.",
    "month of the regatta": "It is in September.",
}
ASKED = ("What is the {}?", "Tell me the {}.", "Do you know the {}?", "I forgot the {}.", "The {}, please.")
HELD_OUT = "Could you say the {}?"

# name: (base: builtin, or how it is packed; settings of `train`)
METHODS = {
    "LoRA": ("", {}),
    "rsLoRA": ("", {"method": "rslora"}),
    "DoRA": ("", {"method": "dora"}),
    "VeRA": ("", {"method": "vera", "rank": 256, "learning_rate": 0.03, "epochs": 16}),
    "LoRA from PiSSA": ("", {"initialization": "pissa"}),
    "LoRA from LoftQ": ("", {"initialization": "loftq"}),
    "LoRA, embedding trained as a whole": ("", {"modules_to_save": ["embed_tokens"]}),
}
BASES = {
    "NF4, no double quantization": ("", {"double_quantization": False}),
    "NF4, merged into dequantized": ("", {"merge_base": "dequantized"}),
    "FP4": ("", {"quantization": "fp4"}),
    "int8": ("", {"quantization": "int8"}),
    "int8, merged into dequantized": ("", {"quantization": "int8", "merge_base": "dequantized"}),
    "HQQ 4 bits": ("", {"quantization": "hqq4"}),
    "HQQ 4 bits, merged into dequantized": ("", {"quantization": "hqq4", "merge_base": "dequantized"}),
    "HQQ 8 bits": ("", {"quantization": "hqq8"}),
    "unquantized": ("", {"quantization": "none"}),
    "GPTQ 4 bits": ("gptq-4", {}),
    "AWQ": ("awq", {}),
    "HQQ checkpoint": ("hqq-4", {}),
    "AQLM": ("aqlm", {}),
    "EETQ": ("eetq", {}),
    "fp8": ("fp8-blocks", {}),
    "compressed-tensors 4 bits": ("compressed-4", {}),
    "bitsandbytes NF4 checkpoint": ("nf4-double", {}),
}
CROSSED = {
    "DoRA on GPTQ": ("gptq-4", {"method": "dora"}),
    "VeRA on HQQ": ("", {"method": "vera", "quantization": "hqq4", "rank": 256, "learning_rate": 0.03, "epochs": 16}),
    "rsLoRA from PiSSA on HQQ, merged into dequantized": (
        "",
        {"method": "rslora", "initialization": "pissa", "quantization": "hqq4", "merge_base": "dequantized"},
    ),
    "DoRA on int8": ("", {"method": "dora", "quantization": "int8"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps what is done, with room for 3 GB")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # a process of `--jobs`: names of kinds come on stdin
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    progress.use("quiet")
    kinds = {**METHODS, **BASES, **CROSSED}
    if arguments.rows:
        with one_worker():
            for line in sys.stdin:
                print(json.dumps(attempt(arguments.work, name := line.strip(), *kinds[name])), flush=True)
        return
    if pick_device().type != "cuda":
        del kinds["DoRA on int8"]  # refused there
    chosen = [name for name in kinds if arguments.only.lower() in name.lower()]
    if arguments.jobs > 1:
        rows = side_by_side(arguments, chosen)
    else:
        with one_worker():
            rows = [show(attempt(arguments.work, name, *kinds[name])) for name in chosen]
    write(arguments.work, list(kinds), arguments.output)
    if failed := [row["name"] for row in rows if "error" in row]:
        sys.exit(f"failed: {', '.join(failed)}")


def show(row: dict) -> dict:
    print(json.dumps(row), flush=True)
    return row


def side_by_side(arguments: argparse.Namespace, names: list[str]) -> list[dict]:
    """Rows of several processes, each on cores of its own and for as many kinds as come: imports take longer than a kind."""
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        left.put(name)
    rows: list[dict] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(usable_processors()))

    def work(number: int) -> None:
        mine = cores[number % len(cores) :: arguments.jobs] or cores
        worker = None
        while True:
            try:
                name = left.get_nowait()
            except queue.Empty:
                break
            if worker is None or worker.poll() is not None:
                command = [sys.executable, __file__, "--work", str(arguments.work), "--rows"]
                worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                if hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(worker.pid, mine)
            worker.stdin.write(name + "\n")
            worker.stdin.flush()
            while (line := worker.stdout.readline()) and not line.startswith("{"):
                pass
            rows.append(show(json.loads(line) if line else {"name": name, "error": f"the process ended with {worker.wait()}"}))
        if worker is not None:
            worker.stdin.close()
            worker.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(arguments.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows


def attempt(work: Path, name: str, packing: str, settings: dict) -> dict:
    """`measure`, or why it failed."""
    try:
        return measure(work / name.replace(" ", "-"), name, packing, settings, work)
    except Exception as error:
        traceback.print_exc()
        return {"name": name, "error": str(error).strip() or repr(error)}


def measure(folder: Path, name: str, packing: str, settings: dict, work: Path) -> dict:
    """One row of the table; what a former run measured, where it did."""
    done = folder / "row.json"
    if done.is_file():
        return json.loads(done.read_text())
    base = str(packed_base(packing, work)) if packing else "builtin/tiny-coder"
    package = folder / "modelfiles/kind"
    package.mkdir(parents=True, exist_ok=True)
    write_rows(package / "train.jsonl", ASKED)
    write_rows(package / "eval.jsonl", (HELD_OUT,))
    train = {"epochs": 6, "batch_size": 4, "learning_rate": 0.002, "rank": 16, **settings}
    asked = {
        "base": base,
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "train": train,
        "quants": ["Q8_0"],
        "modelfile": {"parameters": {"temperature": 0.0, "num_ctx": 512}},
    }
    (package / "recipe.yaml").write_text(json.dumps(asked))
    build = Build(recipe.load(package / "recipe.yaml"), folder / "build")
    moments = [time.monotonic()]
    for stage in ("train", "export"):
        run(build, stage)
        moments.append(time.monotonic())
    right = count_right(build.paths.gguf("Q8_0"))
    result = records.result(build.paths, "train")
    row = {
        "name": name,
        "device": result["device"],
        "seconds": result["seconds"],
        "before": result["eval_loss_before"],
        "after": result["eval_loss_after"],
        "weights": result["trainable_parameters"],
        "right": right,
        "stages": [round(end - start, 1) for start, end in itertools.pairwise([*moments, time.monotonic()])],  # train, export, questions
        "merged": "dequantized" if packing or settings.get("merge_base") else "original",
    }
    done.write_text(json.dumps(row))
    return row


def packed_base(packing: str, work: Path) -> Path:
    """tiny-coder as a quantized checkpoint."""
    folder = work / "bases" / packing / "tiny-coder"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two kinds may need one base
        if not (folder / "model.safetensors").is_file():
            for part in (folder, plain := folder.parent / "plain"):
                shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
            write_quantized(packing, BUILTIN / "tiny-coder", folder, plain)
    return folder.absolute()


def write_rows(path: Path, asked: tuple[str, ...]) -> None:
    """A chat for each fact and each way to ask for it."""
    rows = [
        [{"role": "user", "content": words.format(what)}, {"role": "assistant", "content": answer}]
        for what, answer in FACTS.items()
        for words in asked
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))


def count_right(gguf: Path) -> str:
    """How many of the questions the file answers as taught, word for word, at temperature 0."""
    right = 0
    with Engine(gguf, 512) as engine:
        for what, answer in FACTS.items():
            for words in ASKED:
                question = [{"role": "user", "content": words.format(what)}]
                right += "".join(engine.generate(question, 32, Sampling(temperature=0.0))).strip() == answer
    return f"{right}/{len(FACTS) * len(ASKED)}"


def write(work: Path, names: list[str], output: Path) -> None:
    """The table of all that was measured."""
    rows = [json.loads(path.read_text()) for path in sorted(work.glob("*/row.json"))]
    machine = describe_machine(None)
    text = [
        "# Each method and each kind of base",
        "",
        "tiny-coder, four facts asked in five ways; loss per answer token on a sixth way, and the "
        "twenty questions answered word for word by the embedded llama.cpp from the Q8_0 file.",
        "",
        "| kind | device | training | trained weights | eval loss before | after | answers as taught | merged into |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(rows, key=lambda row: names.index(row["name"])):
        text.append(
            f"| {row['name']} | {row['device']} | {row['seconds']:.1f} s | {row['weights']:,} | {row['before']:.2f} | {row['after']:.2f} "
            f"| {row['right']} | {row['merged']} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    text.append(
        f"\n{datetime.now(UTC):%Y-%m-%d}, {machine.cores} cores of {machine.cpu}; torch {torch.__version__}, {versions}. "
        "`python benchmarks/train_kinds.py --work FOLDER`\n"
    )
    print("\n".join(text))
    output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
