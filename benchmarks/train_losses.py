"""Does the fast path learn the same? Losses over 50 steps: plain peft and bitsandbytes in bfloat16, olpack in bfloat16, against float32.

    python benchmarks/train_losses.py [--device cuda] [--models Llama Qwen3]

The same base in NF4, the same first adapter, the same rows in the same order, AdamW in float32. Plain: transformers' own attention, one row
at a time, autocast. A difference from float32 that is not larger than plain's is the rounding of bfloat16. Prints a Markdown table and
writes it to benchmarks/train_losses.md.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from page import command_line, publish

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from tiny_models import write_model  # noqa: E402 — in tests/

from olpack.data import Renderer, TokenRow, load_chats  # noqa: E402
from olpack.model.base import Base, resolve  # noqa: E402
from olpack.recipe import Train  # noqa: E402
from olpack.train import model as model_of  # noqa: E402
from olpack.train.batches import flatten, micro_batches, schedule  # noqa: E402
from olpack.train.forward import Forward  # noqa: E402

STEPS, BATCH, BUDGET = 50, 4, 2048
CODER = "tiny-coder on coding-assistant"
SPM = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {
    "Llama": ("llama", {}),
    "Qwen2": ("qwen2", {"tied": False}),
    "Qwen3": ("qwen3", {}),
    "Mistral, window 32": ("mistral", {"sliding_window": 32, **SPM}),
    "Gemma 2": ("gemma2", {"sliding_window": 32, **SPM}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 32, **SPM}),
}


def random_rows(count: int) -> list[TokenRow]:
    """Rows that can be learned: each repeats a few tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(20, 120, (), generator=generator))
        pattern = torch.randint(3, 500, (5,), generator=generator)
        ids = pattern.repeat(length // 5 + 1)[:length].tolist()
        rows.append(TokenRow(ids, [index > 4 for index in range(length)], "", ""))
    return rows


def coding_rows() -> tuple[Base, list[TokenRow]]:
    base = resolve("builtin/tiny-coder", relative_to=REPOSITORY)
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(base.path))
    return base, [renderer.rows(chat)[0] for chat in load_chats(REPOSITORY / "modelfiles/coding-assistant/train.jsonl")]


def losses(base: Base, rows: list[TokenRow], device: torch.device, dtype: torch.dtype, *, plain: bool) -> list[float]:
    model_of.compute_dtype = lambda _: dtype
    model = model_of.load_with_adapter(base, Train(learning_rate=1e-3), device)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = None if plain else Forward(model, device, checkpointing=False)
    optimizer = torch.optim.AdamW(adapter, lr=1e-3)
    found = []
    for batch in schedule(len(rows), 1e9 if not rows else STEPS * BATCH / len(rows), BATCH, 0)[:STEPS]:
        chosen = [rows[index] for index in batch]
        if plain:
            parts = [plain_loss(model, row, device, dtype) for row in chosen]
        else:
            parts = [forward.loss(flatten(group, device)) for group in micro_batches(chosen, forward.budget(BUDGET))]
        count = sum(row.target_count for row in chosen)
        loss = torch.stack(parts).sum() / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def plain_loss(model, row: TokenRow, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    ids, loss_mask = torch.tensor(row.ids, device=device), torch.tensor(row.loss_mask, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1][loss_mask[1:]].float(), ids[1:][loss_mask[1:]], reduction="sum")


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=[CODER, *SHAPES], help="some of those of the table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [
        f"{date.today()}, {where}, torch {torch.__version__}: {STEPS} steps of {BATCH} rows, NF4, rank 16, learning rate 1e-3.",
        "",
        "| model | loss, first to last | plain bf16 from float32: mean, largest | olpack bf16 from float32: mean, largest |",
        "| --- | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        made = {
            label: (Base("random", write_model(Path(scratch, kind), kind, **{**WIDE, **settings})), random_rows(200))
            for label, (kind, settings) in SHAPES.items()
            if label in arguments.models
        }
        for label, (base, rows) in {**({CODER: coding_rows()} if CODER in arguments.models else {}), **made}.items():
            exact = losses(base, rows, device, torch.float32, plain=True)
            cells = []
            for plain in (True, False):
                apart = [abs(a - b) for a, b in zip(exact, losses(base, rows, device, torch.bfloat16, plain=plain), strict=True)]
                cells.append(f"{sum(apart) / len(apart):.4f}, {max(apart):.4f}")
            lines.append(f"| {label} | {exact[0]:.3f} to {exact[-1]:.3f} | {cells[0]} | {cells[1]} |")
            print(lines[-1], flush=True)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
