"""One pass against the usual way: merge with peft, convert to BF16, quantize four times. Same model, same machine, same run.

    python benchmarks/export.py                                          # 300M parameters, tiny-coder's vocabulary
    python benchmarks/export.py --hidden 4096 --intermediate 12288 --layers 36 --work /scratch   # the shape of an 8B model
    python benchmarks/export.py --vocabulary ggml-vocab-qwen2.gguf       # a published vocabulary, as llama.cpp's source holds it

Prints a Markdown table and writes it to benchmarks/export.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")

MERGE = """
import sys, shutil, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
for file in [*base.glob("tokenizer*"), *base.glob("chat_template*")]:
    shutil.copy(file, out)
"""
CONVERT = """
import sys
from pathlib import Path
from olpack.llamacpp.source import converter_source
sys.path[:0] = [str(converter_source()), str(converter_source() / "gguf-py"), "tests"]
from usual_way import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""
QUANTIZE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from usual_way import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
ONE_PASS = """
import sys
from pathlib import Path
from olpack.export import Target, export
base, adapter, out, rounded, *quants = sys.argv[1:]
targets = [Target(quant, Path(out, f"{quant}.gguf")) for quant in quants]
export(Path(base), targets, adapter=Path(adapter), round_to_bf16=rounded == "rounded")
"""


@dataclass
class Cost:
    """What one or more commands took: seconds of wall time and of CPU time, peak bytes of the largest process, bytes written."""

    wall: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu, max(self.memory, other.memory), self.written + other.written)


def run(code: str, *arguments: object) -> Cost:
    """Run a piece of Python in a process of its own, from the repository, and say what it and its children took."""
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"a step failed:\n{said[-3000:]}")
    return Cost(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, used.ru_oublock * 512)


def write_base(folder: Path, shape: argparse.Namespace) -> int:
    """A Qwen3 of random weights, one file for each layer, so that its size is not bounded by memory. Returns its parameters."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    rows = write_vocabulary(folder, shape.vocabulary)
    heads, head_dim = shape.hidden // 128, 128
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": rows, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4), "head_dim": head_dim, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    keys = config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,),
        "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
        "self_attn.q_proj": (heads * head_dim, shape.hidden), "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden), "self_attn.o_proj": (shape.hidden, heads * head_dim),
        "mlp.gate_proj": (shape.intermediate, shape.hidden), "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    parts = [
        {"model.embed_tokens.weight": (rows, shape.hidden)},
        {"model.norm.weight": (shape.hidden,), "lm_head.weight": (rows, shape.hidden)},
    ]
    parts += [{f"model.layers.{i}.{name}.weight": size for name, size in layer.items()} for i in range(shape.layers)]
    torch.manual_seed(0)
    weight_map, parameters = {}, 0
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {key: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for key, size in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        parameters += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def write_vocabulary(folder: Path, vocabulary: Path | None) -> int:
    """The tokenizer's files; returns how many rows the embedding needs."""
    if vocabulary is None:
        source = REPOSITORY / "olpack" / "assets" / "tiny-coder"
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder)
        return json.loads((source / "config.json").read_text())["vocab_size"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
    tokenizer.save_pretrained(folder)
    return -(-len(tokenizer) // 256) * 256


def write_adapter(folder: Path, base: Path, rank: int = 16) -> None:
    """A LoRA adapter on every linear layer, made from the base's tensor headers."""
    import torch
    from safetensors.torch import save_file

    from olpack.export.folder import read_tensor_headers

    folder.mkdir()
    tensors = {}
    for name, header in read_tensor_headers(base).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, header.shape[1]) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(header.shape[0], rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def usual_way(base: Path, adapter: Path, work: Path) -> dict[str, Cost]:
    """The steps, one process each. The merged folder has the base's name, because it becomes `general.name`."""
    merged, intermediate = work / "merged" / base.name, work / "bf16.gguf"
    (work / "usual").mkdir()
    steps = {"merge": run(MERGE, base, adapter, merged), "convert": run(CONVERT, merged, intermediate)}
    shutil.rmtree(merged)
    steps |= {quant: run(QUANTIZE, intermediate, work / "usual" / f"{quant}.gguf", quant) for quant in QUANTS}
    intermediate.unlink()
    return steps


def table(shape: str, steps: dict[str, Cost], ours: Cost, same: dict[str, bool]) -> str:
    """The figures as Markdown."""
    cores = len(os.sched_getaffinity(0))
    total = sum(steps.values(), Cost())
    lines = [
        f"{shape}, {', '.join(QUANTS)}; {cores} cores, {platform.machine()}.",
        "",
        "| way | wall time | CPU share | peak memory | written |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def line(name: str, cost: Cost) -> str:
        share = cost.cpu / cost.wall / cores
        return f"| {name} | {cost.wall:.1f} s | {share:.0%} | {cost.memory / 1e9:.2f} GB | {cost.written / 1e9:.2f} GB |"

    identical = ", ".join(f"{quant} {'yes' if equal else 'NO'}" for quant, equal in same.items())
    lines += [line(f"usual: {name}", cost) for name, cost in steps.items()]
    lines += [
        line("**usual, together**", total),
        line("**olpack, one pass**", ours),
        "",
        f"{total.wall / ours.wall:.1f} × faster, {total.written / max(ours.written, 1):.1f} × less written. "
        f"Rounded to bfloat16 as the usual way rounds, the files are identical: {identical}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--vocabulary", type=Path, help="a GGUF with a vocabulary")
    parser.add_argument("--work", type=Path, help="a folder with room for four times the model")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        work = Path(scratch)
        base, adapter = work / "base", work / "adapter"
        parameters = write_base(base, arguments)
        write_adapter(adapter, base)
        ours = run(ONE_PASS, base, adapter, work / "ours", "exact", *QUANTS)
        shutil.rmtree(work / "ours")
        steps = usual_way(base, adapter, work)
        run(ONE_PASS, base, adapter, work / "rounded", "rounded", *QUANTS)
        same = {
            quant: not subprocess.run(["cmp", "-s", work / "usual" / f"{quant}.gguf", work / "rounded" / f"{quant}.gguf"]).returncode
            for quant in QUANTS
        }
    shape = f"Qwen3 shape, {parameters / 1e6:.0f}M parameters, LoRA of rank 16 on all linear layers"
    text = table(shape, steps, ours, same)
    print(text)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
