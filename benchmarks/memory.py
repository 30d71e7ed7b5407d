"""What olpack estimates and what llama.cpp takes: weights, KV cache, compute buffers, resident set, for four quants at two context lengths.

    python benchmarks/memory.py                                         # tiny-coder, and random models with its vocabulary
    python benchmarks/memory.py --vocabulary ggml-vocab-qwen2.gguf      # a published vocabulary, as llama.cpp's source holds it

Every measurement is a process of its own that loads the file, fills the context, and reads llama.cpp's log and its own resident set. The
resident set is taken with the file read, as on a machine where nothing of it is in memory twice; "mapped" is what the system shows when
llama.cpp maps the file and copies some weights into another layout: pages of the file that it can drop at any time are counted again.
Buffers are those of a server, with logits reserved for a whole micro-batch; the resident set is that of olpack's engine, with logits for
one token.
Prints a Markdown table and writes it to benchmarks/memory.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from page import command_line, publish

REPOSITORY = Path(__file__).resolve().parents[1]
QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
CONTEXTS = (1024, 4096)
_BUFFER = re.compile(r"(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")

# Shapes of published models, cut to fewer layers where they would be too large here.
SHAPES = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B, 8 of 28 layers": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Gemma 3 270M": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
}


def write_model(folder: Path, config: dict, vocabulary: Path | None) -> None:
    """A folder with random weights, as Hugging Face would hold it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    if vocabulary is None:
        source = REPOSITORY / "olpack" / "assets" / "tiny-coder"
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder)
        rows = json.loads((source / "config.json").read_text())["vocab_size"]
    else:
        tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
        tokenizer.save_pretrained(folder)
        rows = len(tokenizer)
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    asked = AutoConfig.for_model(**config, **ids, vocab_size=rows, max_position_embeddings=32768)
    AutoModelForCausalLM.from_config(asked, dtype=torch.bfloat16).save_pretrained(folder)


def measure(path: str, context: int, outputs: int, mapped: bool) -> dict[str, int]:
    """In a fresh process: bytes of llama.cpp's buffers, by kind, and by how much the resident set grew at most."""
    import psutil

    from olpack.compare.hardware import peak_resident
    from olpack.llamacpp.library import captured_log, load_llama_cpp

    llama = load_llama_cpp()
    before = psutil.Process().memory_info().rss
    with captured_log() as log:
        params = llama.llama_model_default_params()
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mapped else llama.LLAMA_LOAD_MODE_NONE
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max, params.swa_full = context, 512, 512, outputs, False
        handle = llama.llama_init_from_model(model, params)
        tokens = (llama.llama_token * 512)(*range(512))
        for _ in range(1 if mapped else context // 512):
            assert llama.llama_decode(handle, llama.llama_batch_get_one(tokens, 512)) == 0
    found = {"resident": peak_resident() - before, "model": 0, "KV": 0, "RS": 0, "compute": 0, "output": 0}
    for kind, size in _BUFFER.findall("".join(log)):
        found[kind] += round(float(size) * (1 << 20))
    return found


def measured(path: Path, context: int, outputs: int, mapped: bool) -> dict[str, int]:
    """`measure`, in a process of its own."""
    code = f"import json; from memory import measure; print(json.dumps(measure({str(path)!r}, {context}, {outputs}, {mapped})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY)])}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def rows_of(label: str, folder: Path, work: Path) -> list[str]:
    """One row of the table for each quant and context length."""
    from olpack.export import Target, export
    from olpack.memory.footprint import plan, read
    from olpack.memory.job import Setting
    from olpack.memory.model_source import Subject
    from olpack.model.base import config_of

    files = [Target(quant, work / f"{quant}.gguf") for quant in QUANTS]
    export(folder, files)
    rows = []
    for context in CONTEXTS:
        server, engine = Setting(context), Setting(context, outputs=1)
        without = {footprint.quant: footprint for footprint in plan(Subject(label, config_of(str(folder))), QUANTS, engine)[0]}
        for file in files:
            footprint, whole = read(file.path, server)[0], read(file.path, engine)[0].total
            served = measured(file.path, context, server.outputs, mapped=True)
            alone = measured(file.path, context, engine.outputs, mapped=False)
            pairs = [
                (footprint.weights, alone["model"]),
                (footprint.cache, served["KV"] + served["RS"]),
                (footprint.buffers, served["compute"] + served["output"]),
                (whole, alone["resident"]),
            ]
            cells = [f"{estimate / 1e6:,.1f} | {truth / 1e6:,.1f} | {estimate / truth - 1:+.1%}" for estimate, truth in pairs]
            total = without[file.quant].total
            cells += [f"{total / 1e6:,.1f} | {total / alone['resident'] - 1:+.1%}", f"{served['resident'] / 1e6:,.1f}"]
            rows.append(f"| {label} | {file.quant} | {context:,} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    for file in files:
        file.path.unlink()
    return rows


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--vocabulary", type=Path, help="a GGUF with a vocabulary, for the random models")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    from olpack.compare.hardware import cpu_model

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        rows = rows_of("tiny-coder", REPOSITORY / "olpack" / "assets" / "tiny-coder", work)
        for label, config in SHAPES.items():
            write_model(work / "model", config, arguments.vocabulary)
            rows += rows_of(label, work / "model", work)
            shutil.rmtree(work / "model")
    kinds = ("weights", "KV cache", "buffers", "resident set")
    head = "| model | quant | context | " + " | ".join(f"{kind}, estimated | measured | off" for kind in kinds)
    head += " | without the file, estimated | off | mapped |"
    publish(
        [
            f"MB. {datetime.date.today()}, {cpu_model()}, {platform.system()} {platform.machine()}, llama-cpp-python 0.3.36, no GPU.",
            "",
            head,
            "| --- | --- |" + " ---: |" * (head.count("|") - 3),
            *rows,
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
