"""QLoRA training speed of olpack, Unsloth and TRL on one GPU: same model, same texts, same tokens a step.

    python benchmarks/train.py make FOLDER TOKENIZER [--shape 8B]     # a checkpoint with random weights: speed does not depend on them
    python benchmarks/train.py all FOLDER [--programs olpack,unsloth,trl]
    python benchmarks/train.py olpack FOLDER [--no-checkpointing] [--profile]     # products in fp8; olpack-bf16: in 16 bits

TOKENIZER is a folder with a tokenizer of 128k tokens, such as Llama 3's. `all` runs each program in a process of its own, prints a Markdown
table with real (unpadded) tokens per second, ratios and the share of what the card's matrix units can do, and writes benchmarks/train.md.
Peers: `pip install unsloth trl liger-kernel`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from page import command_line, publish
from train_8b import RANK, SHAPES, matmul_rate

STARTED = time.time()
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UNSLOTH_DISABLE_STATISTICS="1")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONGEST, TOKENS = 2048, 16384  # of a sample, of a step
STEPS, WARM = 10, 4


def make(folder: Path, tokenizer: Path, shape: str) -> None:
    """Write a bfloat16 checkpoint of Llama 3's shape with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, middle, layers, heads, key_heads, words = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=128001,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.pad_token = tokens.convert_ids_to_tokens(128004)
    tokens.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokens.save_pretrained(folder)


def texts(tokenizer, count: int) -> list[str]:
    """Texts of log-normal length, median about 365 words of one token each, at most 2,000."""
    rng = random.Random(0)
    words = [word for number in range(2000, 30000) if (word := tokenizer.decode([number])).startswith(" ") and word.strip().isalpha()][:8000]
    return ["".join(rng.choices(words, k=min(2000, max(8, int(rng.lognormvariate(5.9, 0.7)))))) for _ in range(count)]


def run_olpack(folder: Path, checkpointing: bool, profile: bool, in_fp8: bool) -> dict:
    import torch

    from olpack.train.device import compute_dtype
    from olpack.train.ops.pointwise import compile_kernels

    compile_kernels(torch.device("cuda"), compute_dtype(torch.device("cuda")), json.loads((folder / "config.json").read_text()), RANK)
    from transformers import AutoTokenizer

    from olpack.data import TokenRow
    from olpack.model.base import Base
    from olpack.model.shape import MetaModel
    from olpack.recipe import Train
    from olpack.train import loop
    from olpack.train.checkpoint import State
    from olpack.train.forward import Forward
    from olpack.train.memory import estimate_training
    from olpack.train.model import load_with_adapter
    from olpack.train.ops.flat_parameters import FlatParameters
    from olpack.train.ops.pinned_memory import PinnedMemory

    device, base, host = torch.device("cuda", 0), Base("random", folder), None
    settings = Train(rank=RANK, alpha=RANK)
    if checkpointing:
        estimated = estimate_training(MetaModel(base.config, base.label), rank=RANK, tokens=TOKENS, precision="nf4")
        host = PinnedMemory(estimated.pinned(offload_attention=True), device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_with_adapter(base, settings, device).model
    loaded = time.time()
    forward = Forward(model, device, checkpointing=checkpointing, pinned=host, offload_attention=checkpointing, in_fp8=in_fp8)
    trained = FlatParameters(model)
    optimizer = loop._optimizer(trained.parameters, settings, device)
    rows = [TokenRow(ids, [True] * len(ids), "", "") for ids in tokenizer(texts(tokenizer, 40 * (STEPS + 2)))["input_ids"]]
    torch.cuda.reset_peak_memory_stats()
    ends, counts, losses = [], [], []

    def step() -> None:
        batch, room = [], TOKENS
        while room:  # the last row of a step is cut, so that every step has the same number of tokens
            row = rows.pop(0)
            batch.append(TokenRow(row.ids[:room], row.loss_mask[:room], "", ""))
            room -= len(batch[-1].ids)
        losses.append(loop._backward(forward, trained, batch, State(budget=TOKENS)))
        torch.nn.utils.clip_grad_norm_(trained.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        ends.append(time.time())
        counts.append(TOKENS)

    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated()
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))
    return result(ends, counts, peak, loaded)


def result(ends: list[float], counts: list[int], peak: int, loaded: float) -> dict:
    """Tokens per second from the median step after warm-up."""
    steps = sorted(count / (end - start) for start, end, count in zip(ends[WARM - 1 :], ends[WARM:], counts[WARM:], strict=False))
    return {"tokens_per_s": steps[len(steps) // 2], "peak_gib": peak / 2**30, "load_s": loaded - STARTED, "first_step_s": ends[0] - STARTED}


def run_peer(program: str, folder: Path, checkpointing: bool) -> dict:
    """Unsloth or TRL (with Liger's kernels), with packing, 8 rows of 2,048 tokens a step."""
    if program == "unsloth":
        from unsloth import FastLanguageModel  # before transformers
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    lora = None
    if program == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=LONGEST, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            bias="none",
            target_modules=LINEAR,
            use_gradient_checkpointing="unsloth" if checkpointing else False,
            random_state=1,
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0})
        lora = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", target_modules=LINEAR, task_type="CAUSAL_LM")
    loaded = time.time()
    ends: list[float] = []
    counts: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            ends.append(time.time())

    # What each was fastest with: TRL needs 97 GB for all eight rows at once without checkpointing, and is slower.
    parts = 2 if program == "trl" and not checkpointing else 1
    config = SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=TOKENS // LONGEST // parts,
        gradient_accumulation_steps=parts,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        max_length=LONGEST,
        bf16=True,
        optim="adamw_8bit",
        seed=1,
        dataset_text_field="text",
        packing=True,
        use_liger_kernel=program == "trl",
        gradient_checkpointing=checkpointing,
    )
    data = Dataset.from_list([{"text": text} for text in texts(tokenizer, 40 * (STEPS + 2))])
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])
    collate = trainer.data_collator

    def counting(features):
        batch = collate(features)
        mask = batch.get("attention_mask")
        counts.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    counts = [sum(counts[start : start + parts]) for start in range(0, len(counts), parts)]
    return result(ends, counts, torch.cuda.max_memory_allocated(), loaded)


def compare(folder: Path, programs: list[str]) -> list[str]:
    import torch

    rate = matmul_rate()
    config = json.loads((folder / "config.json").read_text())
    per_layer = 2 * config["hidden_size"] ** 2 * (1 + config["num_key_value_heads"] / config["num_attention_heads"])
    weights = config["num_hidden_layers"] * (per_layer + 3 * config["hidden_size"] * config["intermediate_size"])
    weights += config["vocab_size"] * config["hidden_size"]
    lines = [
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}: {weights / 1e9:.1f}B weights in products, "
        f"{rate / 1e12:.0f} TFLOP/s in a large one. NF4, rank {RANK}, all linear layers, {TOKENS:,} tokens a step, samples of at most "
        f"{LONGEST:,}.",
        "",
        "| program | checkpointing | tokens/s | olpack is | of the limit | peak GiB | to the first step, s |",
        "| --- | :---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for checkpointing in (False, True):
        found = {program: run(program, folder, checkpointing) for program in programs}
        ours, limit = (found.get("olpack") or {}).get("tokens_per_s"), rate / (6 if checkpointing else 4) / weights
        for program, figures in found.items():
            cells = "failed | | | |"
            if figures:
                ratio = f"{ours / figures['tokens_per_s']:.2f} ×" if ours else ""
                cells = (
                    f"{figures['tokens_per_s']:,.0f} | {ratio} | {figures['tokens_per_s'] / limit:.0%} | {figures['peak_gib']:.1f} | "
                    f"{figures['first_step_s']:.0f} |"
                )
            lines.append(f"| {program} | {'yes' if checkpointing else 'no'} | {cells}")
    return lines


def run(program: str, folder: Path, checkpointing: bool) -> dict | None:
    """What a program says of itself in a process of its own; None where it failed."""
    command = [sys.executable, __file__, program, str(folder), *([] if checkpointing else ["--no-checkpointing"])]
    done = subprocess.run(command, capture_output=True, text=True)
    said = next((line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    news = "\n".join([said, *warnings] if said else [done.stdout, done.stderr[-3000:]])
    print(f"{program}, {'with' if checkpointing else 'without'} checkpointing: {news}", file=sys.stderr, flush=True)
    return json.loads(said) if said else None


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("what", choices=["make", "all", "olpack", "olpack-bf16", "unsloth", "trl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument(
        "--programs", default="olpack,olpack-bf16,unsloth,trl", help="in the order in which they run: the first one starts from a cold disk"
    )
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.folder, arguments.tokenizer, arguments.shape)
    elif arguments.what == "all":
        publish(compare(arguments.folder, arguments.programs.split(",")), arguments.output)
    elif arguments.what.startswith("olpack"):
        in_fp8 = arguments.what == "olpack"
        print("RESULT", json.dumps(run_olpack(arguments.folder, arguments.checkpointing, arguments.profile, in_fp8)))
    else:
        print("RESULT", json.dumps(run_peer(arguments.what, arguments.folder, arguments.checkpointing)))


if __name__ == "__main__":
    main()
