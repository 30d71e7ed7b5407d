"""Are our files llama.cpp's files? Architecture by quant, byte for byte, against convert_hf_to_gguf.py and llama.cpp's quantizer.

    python benchmarks/identity.py [--vocabularies LLAMA_CPP/models]

Small models with random weights, in every type that needs no importance matrix (those that do: tests/test_export_importance.py). With
--vocabularies, also the published vocabularies of that folder (ggml-vocab-*.gguf), and a LoRA adapter against peft's merged checkpoint.
Prints Markdown tables and writes them to benchmarks/identity.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from page import command_line, publish  # noqa: E402 — beside this file
from tiny_models import converter, write_adapter, write_model, write_sentencepiece  # noqa: E402 — in tests/

from olpack.export import Target  # noqa: E402
from olpack.workspace import file_digest  # noqa: E402

QUANTS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_M",
    "IQ3_S",
)
SHORT = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
SENTENCEPIECE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
MODELS = {
    "Llama, untied": ("llama", {"tied": False}),
    "Llama, tied, float32": ("llama", {"dtype": "float32"}),
    "Qwen2, untied, in shards": ("qwen2", {"tied": False, "shard": "300KB"}),
    "Qwen3, tied": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}),
    "Gemma 2": ("gemma2", SENTENCEPIECE),
    "Gemma 3": ("gemma3_text", SENTENCEPIECE),
    "Mistral": ("mistral", {"tied": False, **SENTENCEPIECE}),
    "Mixtral": ("mixtral", {"tied": False, "num_local_experts": 4, "num_experts_per_tok": 2, **SENTENCEPIECE}),
    "Phi-3": ("phi3", {"tied": False, **SENTENCEPIECE}),
}
VOCABULARIES = {"qwen2": ("Qwen3", "qwen3"), "llama-bpe": ("Llama 3", "llama"), "starcoder": ("Llama", "llama"), "gpt-2": ("Qwen2", "qwen2")}


def usual(out: Path, quants: Sequence[str], *models: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of what llama.cpp makes, by model and quant. The files are removed."""
    command = [sys.executable, REPOSITORY / "tests/usual_way.py", "--out", out, "--quants", ",".join(quants), *models]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    found = {}
    for model in models:
        found[model.name] = {quant: file_digest(out / model.name / f"{quant}.gguf") for quant in quants}
    return found


def ours(model: Path, quants: Sequence[str], out: Path, adapter: Path | None = None) -> dict[str, str]:
    files = converter().export(model, [Target(quant, out / f"{quant}.gguf") for quant in quants], adapter=adapter, round_to_bf16=True)
    return {file.quant: file.sha256 for file in files}


def row(label: str, wanted: dict[str, str], made: dict[str, str], quants: Sequence[str]) -> str:
    return f"| {label} | {' | '.join('=' if wanted[quant] == made[quant] else '**differs**' for quant in quants)} |"


def head(title: str, quants: Sequence[str]) -> list[str]:
    return [f"| {title} | {' | '.join(quants)} |", f"| --- |{' :---: |' * len(quants)}"]


def architectures(work: Path) -> list[str]:
    """One row an architecture."""
    folders = {}
    for number, (label, (kind, settings)) in enumerate(MODELS.items()):
        folders[label] = write_model(work / f"model-{number}", kind, **settings)
        if "bos_token_id" in settings:
            write_sentencepiece(folders[label])
    expected = usual(work / "usual", QUANTS, *folders.values())
    rows = [row(label, expected[path.name], ours(path, QUANTS, work / "ours"), QUANTS) for label, path in folders.items()]
    return [*head("architecture", QUANTS), *rows]


def vocabularies(work: Path, folder: Path) -> list[str]:
    """One row a published vocabulary, without and with an adapter."""
    from transformers import AutoTokenizer

    rows = []
    for name, (label, kind) in VOCABULARIES.items():
        path = folder / f"ggml-vocab-{name}.gguf"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        model = write_model(work / name, kind, vocab_size=len(tokenizer), tied=False)
        for file in model.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(model)
        adapter = write_adapter(work / f"{name}-adapter", model)
        merged = merge(model, adapter, work / "merged" / name)
        for suffix, source, used in (("", model, None), (", with an adapter", merged, adapter)):
            expected = usual(work / "usual-vocabulary", SHORT, source)[source.name]
            rows.append(row(f"{label}, {name}, {len(tokenizer):,} tokens{suffix}", expected, ours(model, SHORT, work / "ours", used), SHORT))
    return [*head("vocabulary", SHORT), *rows]


def merge(model: Path, adapter: Path, out: Path) -> Path:
    """peft's merged checkpoint in bfloat16, merged in float32 as olpack merges, with the tokenizer's files beside it."""
    import shutil

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    for file in [*model.glob("tokenizer*"), *model.glob("chat_template*"), *model.glob("special_tokens*")]:
        shutil.copy(file, out)
    return out


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--vocabularies", type=Path, help="llama.cpp's folder models/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{date.today()}: `=` where our file is llama.cpp's, byte for byte (rounded to bfloat16 as its converter rounds).", ""]
        lines += architectures(Path(scratch))
        if arguments.vocabularies:
            lines += ["", "Published vocabularies, and a LoRA adapter against peft's merged checkpoint:", ""]
            lines += vocabularies(Path(scratch), arguments.vocabularies)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
