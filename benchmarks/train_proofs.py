"""Three proofs of training, on the shipped package's rows: what is learned, what a packed row sees, what a kill costs.

    python benchmarks/train_proofs.py --llama-cpp DIR [--kills 5 11 18]

1. The share of target tokens under published chat templates and vocabularies of a llama.cpp checkout, and whether each row ends with a
   learned end-of-turn token.
2. Logits of a row packed between others against those of the row alone.
3. Training that is killed (SIGKILL) several times against an unbroken run: losses of every step.

Prints Markdown tables and writes them to benchmarks/train_proofs.md.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from page import command_line, measured_here, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_models import write_model  # in tests/
from train_child import child

from olpack.data import Renderer, load_chats
from olpack.data.rows import Chat
from olpack.model.base import resolve
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
        ends = {tokenizer.convert_ids_to_tokens(row.ids[_last(row.loss_mask)]) for row in rows}
        ended = sum(row.ids[_last(row.loss_mask)] in renderer.end_ids for row in rows)
        tokens, targets = sum(len(row.ids) for row in rows), sum(row.target_count for row in rows)
        lines.append(f"| {name} | {len(rows)} | {tokens:,} | {targets / tokens:.1%} | {ended}: {', '.join(f'`{end}`' for end in sorted(ends))} |")
    return lines


def _without_system(chat: Chat) -> Chat:
    return Chat([message for message in chat.messages if message["role"] != "system"], chat.source)


def _last(flags: list[bool]) -> int:
    return max(index for index, flag in enumerate(flags) if flag)


def packed() -> list[str]:
    base, device = resolve("builtin/tiny-coder", relative_to=Path()), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for chat in load_chats(ROWS)[:64] for row in Renderer(base.tokenizer(), base.end_ids()).rows(chat)]
    forward = Forward(load_with_adapter(base, Train(quantization="none"), device), device, checkpointing=False)
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
    return [
        f"{len(rows)} rows ({tokens:,} tokens) packed into {len(groups)} flat rows of at most 2,048 tokens, with no padding: their logits "
        f"differ from those of each row alone by at most {largest:.1e}, where the largest logit is {scale:.0f} "
        f"({device.type}, {forward.base.dtype})."
    ]


def resumed(kills: list[int], work: Path) -> list[str]:
    """A small model of the tests, its checkpoints after every step, killed in the middle of the given steps."""
    base = write_model(work / "model")
    settings = Train(epochs=8, batch_size=8, learning_rate=1e-2, dropout=0.1)
    assert child(base, work / "unbroken", settings).code == 0
    done = 0
    for at in kills:
        assert child(base, work / "killed", settings, at="backward", call=at - done).code == -signal.SIGKILL
        done = at - 1
    assert child(base, work / "killed", settings).code == 0
    one, two = ([json.loads(line) for line in (work / which / "adapter/metrics.jsonl").read_text().splitlines()] for which in ("unbroken", "killed"))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    verdict = "the same, bit for bit" if all(a == b for a, b in pairs) else "NOT the same"
    adapters = {(work / which / "adapter/adapter_model.safetensors").read_bytes() for which in ("unbroken", "killed")}
    shown = range(0, len(pairs), max(1, len(pairs) // 8))
    return [
        f"A small model with dropout in NF4, killed (SIGKILL) in the middle of steps {', '.join(map(str, kills))} of {len(pairs)}, and run again "
        f"each time. Every loss is {verdict}; the adapters are {'the same bytes' if len(adapters) == 1 else 'NOT the same'}.",
        "",
        f"| step | {' | '.join(str(number + 1) for number in shown)} |",
        f"| --- |{' ---: |' * len(shown)}",
        f"| unbroken | {' | '.join(f'{pairs[number][0]:.4f}' for number in shown)} |",
        f"| killed | {' | '.join(f'{pairs[number][1]:.4f}' for number in shown)} |",
    ]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp, for its templates and vocabularies")
    parser.add_argument("--kills", type=int, nargs="+", default=[5, 11, 18], help="steps")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        lines = [
            "## What is learned",
            "",
            *masks(arguments.llama_cpp),
            "",
            "## What a packed row sees",
            "",
            *packed(),
            "",
            "## What a kill costs",
            "",
            *resumed(arguments.kills, work),
            "",
            measured_here(__file__),
        ]
    finally:
        shutil.rmtree(work)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
