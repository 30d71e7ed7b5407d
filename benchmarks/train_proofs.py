"""Three proofs of training, on the shipped package's rows: what is learned, what a packed row sees, what a kill costs.

    python benchmarks/train_proofs.py --llama-cpp DIR [--kills 38 41]

1. The share of learned tokens under published chat templates and vocabularies of a llama.cpp checkout, and whether each row ends with a
   learned end-of-turn token.
2. Logits of a row packed between others against those of the row alone.
3. `olpack train` killed (SIGKILL) several times against an unbroken run: losses of every step.

Prints Markdown tables and writes them to benchmarks/train_proofs.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch
from page import command_line, measured_here, publish

from olpack.base import resolve
from olpack.data import Renderer, load_chats
from olpack.data.rows import Chat
from olpack.recipe import Train
from olpack.train.batches import flatten, micro_batches
from olpack.train.forward import Forward
from olpack.train.model import load_with_adapter
from olpack.workspace import recipe_path

ROWS = recipe_path("coding-assistant").parent / "train.jsonl"
TEMPLATES = {  # file, vocabulary, turn tokens to add to it
    "Llama 3.1": ("meta-llama-Llama-3.1-8B-Instruct", "llama-bpe", []),
    "Qwen3": ("Qwen-Qwen3-0.6B", "qwen2", []),
    # There is no vocabulary of its own that transformers reads; its template takes no system turn.
    "Gemma 2, with Llama 2's vocabulary": ("google-gemma-2-2b-it", "llama-spm", ["<start_of_turn>", "<end_of_turn>"]),
}


def masks(llama_cpp: Path) -> list[str]:
    from transformers import AutoTokenizer

    lines = ["| chat template | rows | tokens | learned | rows that end with a learned end token |", "| --- | ---: | ---: | ---: | --- |"]
    chats = load_chats(ROWS)
    for name, (template, vocabulary, added) in TEMPLATES.items():
        tokenizer = AutoTokenizer.from_pretrained(llama_cpp / "models", gguf_file=f"ggml-vocab-{vocabulary}.gguf")
        tokenizer.chat_template = (llama_cpp / f"models/templates/{template}.jinja").read_text(encoding="utf-8")
        tokenizer.add_special_tokens({"additional_special_tokens": added} if added else {})
        renderer = Renderer(tokenizer)
        rows = [row for chat in chats for row in renderer.rows(_without_system(chat) if added else chat)]
        ends = {tokenizer.convert_ids_to_tokens(row.ids[_last(row.learned)]) for row in rows}
        ended = sum(row.ids[_last(row.learned)] in renderer.end_ids for row in rows)
        tokens, learned = sum(len(row.ids) for row in rows), sum(row.learned_count for row in rows)
        lines.append(f"| {name} | {len(rows)} | {tokens:,} | {learned / tokens:.1%} | {ended}: {', '.join(f'`{end}`' for end in sorted(ends))} |")
    return lines


def _without_system(chat: Chat) -> Chat:
    return Chat([message for message in chat.messages if message["role"] != "system"], chat.source)


def _last(flags: list[bool]) -> int:
    return max(index for index, flag in enumerate(flags) if flag)


def packed() -> list[str]:
    base, device = resolve("builtin/tiny-coder", relative_to=Path()), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for chat in load_chats(ROWS)[:64] for row in Renderer(base.tokenizer(), base.end_ids()).rows(chat)]
    forward = Forward(load_with_adapter(base, Train(quantization="none"), device), device, checkpointing=False, offload=False)
    groups, largest, scale = micro_batches(rows, 2048), 0.0, 0.0
    with torch.no_grad():
        for group in groups:
            together = forward.logits(flatten(group, device))[0]
            starts = accumulate((len(row.ids) for row in group), initial=0)
            for row, start in zip(group, starts, strict=False):
                alone = forward.logits(flatten([row], device))[0]
                largest = max(largest, (together[start : start + len(row.ids)] - alone).abs().max().item())
                scale = max(scale, alone.abs().max().item())
    tokens = sum(len(row.ids) for row in rows)
    return [f"{len(rows)} rows ({tokens:,} tokens) packed into {len(groups)} flat rows of at most 2,048 tokens, with no padding: their logits "
            f"differ from those of each row alone by at most {largest:.1e}, where the largest logit is {scale:.0f} "
            f"({device.type}, {forward.base.dtype})."]


def train(out: Path, kill_at: int | None = None) -> int:
    """Exit code of `olpack train`, or of SIGKILL once it has logged so many steps."""
    command = [sys.executable, "-m", "olpack", "train", "coding-assistant", "--out", out, "--set", "train.epochs=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while kill_at is not None and process.poll() is None:
        time.sleep(0.2)
        if any(record["step"] >= kill_at for file in out.rglob("checkpoint/metrics.jsonl") for record in records(file)):
            process.kill()
    return process.wait()


def records(metrics: Path) -> list[dict]:
    """Whole lines of a metrics.jsonl that is being written."""
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def resumed(kills: list[int], work: Path) -> list[str]:
    assert train(work / "unbroken") == 0
    for kill_at in kills:
        assert train(work / "killed", kill_at) != 0, "it was done before it could be killed"
    assert train(work / "killed") == 0
    one, two = (records(next((work / which).rglob("adapter/metrics.jsonl"))) for which in ("unbroken", "killed"))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    verdict = "the same, bit for bit" if all(a == b for a, b in pairs) else "NOT the same"
    shown = range(0, len(pairs), max(1, len(pairs) // 8))
    return [f"Killed at steps {' and '.join(map(str, kills))} of {len(pairs)} and run again each time; every loss is {verdict}, largest difference "
            f"{max(abs(a - b) for a, b in pairs):.1e}.", "",
            f"| step | {' | '.join(str(number + 1) for number in shown)} |", f"| --- |{' ---: |' * len(shown)}",
            f"| unbroken | {' | '.join(f'{pairs[number][0]:.4f}' for number in shown)} |",
            f"| killed | {' | '.join(f'{pairs[number][1]:.4f}' for number in shown)} |"]  # fmt: skip


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp, for its templates and vocabularies")
    parser.add_argument("--kills", type=int, nargs="+", default=[38, 41], help="steps; a checkpoint is written every minute")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        lines = ["## What is learned", "", *masks(arguments.llama_cpp), "", "## What a packed row sees", "", *packed(),
                 "", "## What a kill costs", "", *resumed(arguments.kills, work), "", measured_here(__file__)]  # fmt: skip
    finally:
        shutil.rmtree(work)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
