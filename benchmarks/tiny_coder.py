"""Train `builtin/tiny-coder` from nothing: tokenizer, weights, model card.

    python benchmarks/tiny_coder.py                             # one data-centre GPU, under ten minutes
    python benchmarks/tiny_coder.py --smoke --out /tmp/coder    # two CPU cores, about a minute; figures mean nothing

A Qwen3 of 16 M parameters learns the source of CPython's standard library (the running interpreter's, or `--stdlib DIR`) and small
generated functions with their docstrings; modules and combinations that are kept for evaluation are left out. tiny_coder_corpus.py says how.
Prints the table that ends up in the model card.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gzip
import lzma
import math
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# The corpus puts the repository on the path.
from tiny_coder_corpus import (
    CONTEXT,
    END_OF_TEXT,
    ROOT,
    SHORT,
    VOCABULARY,
    Module,
    documented_functions,
    epoch_of,
    functions_of,
    held_out_module,
    library_modules,
    parses,
    save_tokenizer,
    train_tokenizer,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from olpack import progress

CARD = Path(__file__).with_name("tiny_coder_card.md")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}  # as Ollama samples where nothing else is said


@dataclass(frozen=True)
class Settings:
    """What a run is made of. An epoch is one pass over the library's modules and over a third of their tests."""

    epochs: int = 14
    minutes: float = 6.0  # the schedule is squeezed into this time where the machine is slower
    window: int = CONTEXT  # of whole files; functions and chats come in rows of 1 / SHORT of it
    batch: int = 8  # windows per step
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    dropout: float = 0.15
    warmup: float = 0.02  # share of the run
    completions: int = 200
    generated: int = 100_000  # small functions with a docstring in each pass (exercises.py)
    readers: int = 4  # processes that prepare the passes
    seed: int = 1


SMOKE = Settings(epochs=1, minutes=0.5, window=512, batch=1, completions=4, generated=200, readers=1)


# Model


def make_model(seed: int) -> Qwen3ForCausalLM:
    """The architecture with random weights, float32. Every row of every matrix is a multiple of 256, which K-quants need."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        max_window_layers=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, **SAMPLING)
    with torch.no_grad():
        for layer in model.model.layers:  # GPT-2's scaling: the sum of all branches keeps the variance of one
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def add_dropout(model: Qwen3ForCausalLM, share: float) -> None:
    """Dropout on what every branch adds to the residual stream; Qwen3 itself has none there."""

    def drop(module, inputs, output):
        return F.dropout(output, share, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def token_loss(model, ids: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross entropy in nats of each token of `ids` (batch, window + 1) given those before it."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model, tokenizer: Tokenizer, texts: list[str], window: int, device: str) -> tuple[float, float]:
    """Nats per token, and bits per UTF-8 byte, of texts read one after another in windows that do not see each other."""
    model.eval()
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [*encoding.ids, end]
    total, row = 0.0, torch.tensor(ids)
    whole = (len(ids) - 1) // window * window
    blocks = list(row[: whole + 1].unfold(0, window + 1, window).split(16)) + [row[whole:][None]]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for block in blocks:
            if block.shape[1] > 1:
                total += token_loss(model, block.to(device), "sum").item()
    size = sum(len(text.encode()) for text in texts)
    return total / (len(ids) - 1), total / math.log(2) / size


def train(settings: Settings, modules: list[Module], tokenizer: Tokenizer, held: list[str], device: str) -> tuple[Qwen3ForCausalLM, dict]:
    """Train from random weights; returns the model of the epoch with the lowest held-out loss, and the figures of the run."""
    started = time.monotonic()
    model = make_model(settings.seed).to(device)
    add_dropout(model, settings.dropout)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    compiled_loss = torch.compile(token_loss, dynamic=False) if device == "cuda" else token_loss

    def backward(batch: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(batch).to(device, torch.long)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = compiled_loss(model, ids, "mean")
        loss.backward()
        return loss.detach()

    per_step = settings.window * settings.batch
    best, curve, losses = (math.inf, 0, {}), [], []
    steps, done = 0, 0.0
    with ProcessPoolExecutor(settings.readers, mp_context=get_context("spawn")) as pool:  # passes are encoded while others are learned
        library = [module.text for module in modules if not module.is_test]
        functions = list(chain.from_iterable(pool.map(functions_of, library, chunksize=20)))
        seeds = [settings.seed * 1000 + epoch for epoch in range(settings.epochs)]
        coming = [pool.submit(epoch_of, modules, functions, settings.generated, tokenizer, settings.window, per_step, seed) for seed in seeds]
        for parts in (1, SHORT) if device == "cuda" else ():  # compile for both shapes before the clock of the schedule runs
            backward(np.zeros((settings.batch * parts, settings.window // parts + 1), dtype=np.int32))
            optimizer.zero_grad(set_to_none=True)
        total = settings.epochs * len(coming[0].result())
        clock = time.monotonic()
        progress.say(f"{total} steps; {clock - started:.0f} s to read and compile")
        with progress.task("training", total=total * per_step, unit="tokens") as shown:
            for epoch, batches in enumerate(coming):
                model.train()
                for batch in batches.result():
                    done = max(steps / total, (time.monotonic() - clock) / (60 * settings.minutes))
                    if done >= 1:
                        break
                    rate = min((done + 1e-4) / settings.warmup, 1) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
                    for group in optimizer.param_groups:
                        group["lr"] = settings.learning_rate * rate
                    losses.append(backward(batch))
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    steps += 1
                    shown.advance(per_step)
                coming[epoch] = None  # a pass is some 30 MB
                nats, bits = held_out_loss(model, tokenizer, held, settings.window, device)
                learned = torch.stack(losses[-100:]).mean().item()
                curve.append({"epoch": epoch + 1, "train_loss": learned, "held_out_loss": nats, "bits_per_byte": bits})
                progress.say(f"epoch {epoch + 1}: train {learned:.3f}, held out {nats:.3f} nats per token, {bits:.3f} bits per byte")
                if nats < best[0]:
                    best = nats, epoch + 1, copy.deepcopy(model.state_dict())
                if done >= 1:
                    break
        for batches in filter(None, coming):
            batches.cancel()
    tokens, now = steps * per_step, time.monotonic()
    model = make_model(settings.seed)
    model.load_state_dict(best[2])
    return model, {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "epochs": len(curve),
        "best_epoch": best[1],
        "seconds": now - started,
        "tokens_per_second": tokens / (now - clock),
        "train_loss": curve[best[1] - 1]["train_loss"],
        "curve": curve,
    }


# Figures


def compressed_bits(held: bytes, trained_on: bytes) -> dict[str, float]:
    """Bits per byte that general compressors need for the same text; the last one may look back at everything the model learned from."""
    alone = 8 / len(held)
    primed = len(lzma.compress(trained_on + held, preset=9)) - len(lzma.compress(trained_on, preset=9))
    return {
        "gzip -9": alone * len(gzip.compress(held, 9)),
        "xz -9": alone * len(lzma.compress(held, preset=9)),
        "xz -9 after the training text": alone * primed,
    }


def first_function(text: str) -> str:
    """A completion up to the next statement at the left margin, or up to its last whole line where it was cut off."""
    lines = text.split("\n")
    for number, line in enumerate(lines[1:], 1):
        if line.strip() and not line.startswith((" ", "\t", ")", "]", "}", "#")):
            return "\n".join(lines[:number])
    return "\n".join(lines[:-1])


@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], sample: bool, device: str, new_tokens: int = 320) -> list[str]:
    """Each prompt with what the model adds, cut at the end of its first function."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
    choice = SAMPLING if sample else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    out = model.generate(**batch, max_new_tokens=new_tokens, **choice)
    return [first_function(text + "\n") for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def measure(folder: Path, settings: Settings, tokenizer: Tokenizer, held: list[Module], device: str) -> dict:
    """The figures of the files as they lie in `folder`: loaded as a user loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    loaded = AutoTokenizer.from_pretrained(folder)
    texts = [module.text for module in held]
    nats, bits = held_out_loss(model, tokenizer, texts, settings.window, device)
    _, untrained = held_out_loss(make_model(settings.seed).to(device), tokenizer, texts, settings.window, device)
    torch.manual_seed(settings.seed)
    names = [name for module in held for name in documented_functions(module)]
    sampled = complete(model, loaded, ["def "] * settings.completions, True, device)
    greedy = complete(model, loaded, [f"def {name}(" for name in sorted(set(names))[: settings.completions]], False, device)
    return {
        "held_out_loss": nats,
        "bits_per_byte": bits,
        "untrained_bits_per_byte": untrained,
        "sampled_parse": sum(map(parses, sampled)) / len(sampled),
        "sampled_count": len(sampled),
        "greedy_parse": sum(map(parses, greedy)) / len(greedy),
        "greedy_count": len(greedy),
        "examples": sampled[:8] + greedy[:4],
    }


def table(figures: dict) -> str:
    """The run as a Markdown table."""
    rows = [
        ("parameters", f"{figures['parameters']:,}"),
        ("tokens seen", f"{figures['tokens']:,} in {figures['epochs']} epochs (best: epoch {figures['best_epoch']})"),
        ("training time", f"{figures['seconds']:.0f} s on {figures['hardware']}, reading and compilation included"),
        ("speed", f"{figures['tokens_per_second']:,.0f} tokens/s once compiled, held-out checks included"),
        ("train loss", f"{figures['train_loss']:.3f} nats per token"),
        ("held-out loss", f"{figures['held_out_loss']:.3f} nats per token"),
        ("**held-out bits per byte, tiny-coder**", f"**{figures['bits_per_byte']:.3f}**"),
        ("the same, untrained model", f"{figures['untrained_bits_per_byte']:.3f}"),
        *((f"the same, {name}", f"{bits:.3f}") for name, bits in figures["compressors"].items()),
        (
            f"`def ` sampled at temperature 0.8, top-k 40, top-p 0.9: parses ({figures['sampled_count']} completions)",
            f"{figures['sampled_parse']:.0%}",
        ),
        (
            f"`def NAME(` greedy, names of held-out functions: parses ({figures['greedy_count']} completions)",
            f"{figures['greedy_parse']:.0%}",
        ),
    ]
    return "\n".join(["| figure | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def report(figures: dict, head: str) -> str:
    """The table, the curve and some completions, as Markdown."""
    points = [" | ".join([str(point["epoch"]), *(f"{value:.4f}" for value in list(point.values())[1:])]) for point in figures["curve"]]
    titles = ["| epoch | train loss | held-out loss | held-out bits per byte |", "| --- | --- | --- | --- |"]
    curve = titles + [f"| {point} |" for point in points]
    examples = [f"```python\n{text.rstrip()}\n```" for text in figures["examples"]]
    said = "The first eight of `def ` sampled, the first four of `def NAME(` greedy."
    return "\n\n".join([head, table(figures), "## By epoch", "\n".join(curve), f"## Completions\n{said}", *examples]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train builtin/tiny-coder from scratch.")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the library's folder")
    parser.add_argument("--python", default=".".join(map(str, sys.version_info[:3])), help="the version of that library, for the card")
    parser.add_argument("--out", type=Path, default=ROOT / "olpack" / "assets" / "tiny-coder", help="the model folder")
    parser.add_argument("--report", type=Path, help="write the table here too, with the curve")
    for field in fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), help=f"default {field.default}")
    parser.add_argument("--smoke", action="store_true", help="a short run on the CPU that only shows that everything works")
    args = parser.parse_args()
    changed = {field.name: value for field in fields(Settings) if (value := getattr(args, field.name)) is not None}
    settings = replace(SMOKE if args.smoke else Settings(), **changed)
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device here. Use --smoke for a short run on the CPU.")
    device = "cpu" if args.smoke else "cuda"
    torch.set_float32_matmul_precision("high")
    progress.use("auto")

    modules = list(library_modules(args.stdlib))
    held = [module for module in modules if not module.is_test and held_out_module(module.name)]
    trained_on = [module for module in modules if module.is_test or not held_out_module(module.name)]
    library = [module.text for module in trained_on if not module.is_test]
    tests = [module.text for module in trained_on if module.is_test]
    held_texts = [module.text for module in held]
    if args.smoke:
        held, held_texts = held[:3], held_texts[:3]
    tokenizer = train_tokenizer(library)
    progress.say(f"{len(library)} modules and {len(tests)} tests to learn from, {len(held)} modules held out")
    with ThreadPoolExecutor(1) as pool:
        joined = "".join(library[:20] if args.smoke else library + tests).encode()
        compressors = pool.submit(compressed_bits, "".join(held_texts).encode(), joined)
        model, figures = train(settings, trained_on, tokenizer, held_texts, device)
        args.out.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, args.out)
        model.to(torch.bfloat16).save_pretrained(args.out)
        figures.update(measure(args.out, settings, tokenizer, held, device), compressors=compressors.result())
    figures["hardware"] = f"one {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU (smoke run: no training to speak of)"
    date = datetime.date.today().isoformat()
    command = " ".join(["python benchmarks/tiny_coder.py", *(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())])
    card = CARD.read_text(encoding="utf-8").format(
        millions=figures["parameters"] / 1e6,
        python=args.python,
        library_mb=sum(map(len, library)) / 1e6,
        tests_mb=sum(map(len, tests)) / 1e6,
        held_count=len(held),
        held_mb=sum(map(len, held_texts)) / 1e6,
        layers=model.config.num_hidden_layers,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        command=command,
        date=date,
        hardware=figures["hardware"],
        torch=torch.__version__.partition("+")[0],
        table=table(figures),
        **asdict(settings),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    if args.report:
        args.report.write_text(report(figures, f"# tiny-coder, {date}, {figures['hardware']}\n\n`{command}`"), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
