"""olpack's training step alone, on shapes of 8B and 70B with random weights that are made on the GPU: speed, memory, what a step spends its time on.

    python benchmarks/train_8b.py [--seconds 600] [--output benchmarks/train_8b.md]

Needs no checkpoint on disk, no tokenizer and no peer, and is done in about two minutes. Each part prints its lines as soon as it has them;
no part begins once the seconds are over. `benchmarks/train.py` compares with other programs.
"""

from __future__ import annotations

import gc
import random
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from page import command_line

BEGUN = time.time()
SHAPES = {  # hidden size, MLP, layers, heads, key heads, vocabulary
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "32B": (5120, 27648, 64, 40, 8, 152064),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (256, 512, 3, 4, 2, 1000),
}
RANK = 16


def random_model(shape: str, device: torch.device, rank: int = RANK):
    """Llama 3's shape in NF4 with double quantization, with LoRA on all linear layers; layer after layer, so that it needs no more than it holds."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    hidden, middle, layers, heads, key_heads, words = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def four_bits(layer: torch.nn.Module) -> torch.nn.Module:
        for module in list(layer.modules()):
            for name, linear in list(module.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    held = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
                    held.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
                    setattr(module, name, held)
        return layer

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
            four_bits(model.model.layers[0])
            config.num_hidden_layers = layers
            for index in range(1, layers):
                model.model.layers.append(four_bits(LlamaDecoderLayer(config, index)))
    finally:
        torch.set_default_dtype(before)
    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def rows(tokens: int, words: int, seed: int = 0, longest: int = 2048) -> list:
    """Samples of log-normal length (median about 365 tokens), exactly so many tokens together."""
    from olpack.data import TokenRow

    rng, found = random.Random(seed), []
    while tokens:
        length = min(tokens, longest, max(8, int(rng.lognormvariate(5.9, 0.7))))
        found.append(TokenRow(rng.choices(range(3, words), k=length), [True] * length, "", ""))
        tokens -= length
    return found


class Bench:
    """A model (by default `random_model`), its optimizer, and steps over flat rows."""

    def __init__(self, shape: str, device: torch.device, *, offload: bool = False, model=None):
        from olpack.recipe import Train
        from olpack.train import loop
        from olpack.train.forward import Forward
        from olpack.train.ops.flat_parameters import FlatParameters
        from olpack.train.ops.pinned_memory import PinnedMemory

        self.device, self.words = device, SHAPES[shape][-1]
        self.model = random_model(shape, device) if model is None else model
        self.built = time.time()
        # Whether layers are computed again without their last product is tried once, before the gradients are joined.
        self.host = PinnedMemory(0, device)  # so that torch locks what is needed
        self.forward = Forward(self.model, device, checkpointing=True, pinned=self.host if offload else None)
        self.skips = self.forward._recompute.skips
        self.trained = FlatParameters(self.model)
        self.optimizer = loop._optimizer(self.trained.parameters, Train(), device)

    def checkpointing(self, on: bool, *, offload: bool = True, keep: bool = False) -> None:
        from olpack.train.ops.activation_checkpointing import Recompute

        recompute = self.forward._recompute = Recompute(self.device, offload_attention=keep)
        recompute.skips, recompute.pinned = self.skips, self.host if offload else None
        self.forward.base._set_gradient_checkpointing(on, recompute)

    def step(self, batch: list) -> float:
        from olpack.train import loop
        from olpack.train.checkpoint import State

        loss = loop._backward(self.forward, self.trained, batch, State(budget=10**9))
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def measure(self, tokens: int, steps: int) -> tuple[float, float]:
        """(tokens per second of the median step, peak GiB), the first step not counted."""
        batches = [rows(tokens, self.words, seed) for seed in range(steps + 1)]
        seconds = []
        for number, batch in enumerate(batches):
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            started = time.time()
            self.step(batch)
            torch.cuda.synchronize()
            seconds.append(time.time() - started)
        seconds = sorted(seconds[1:])
        return tokens / seconds[len(seconds) // 2], torch.cuda.max_memory_allocated() / 2**30


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (begin.elapsed_time(end) / 1000)


def same_losses(device: torch.device, steps: int = 12) -> list[str]:
    """Losses of the plain path (peft, bitsandbytes, transformers' attention, one row at a time, autocast) and of olpack's, both in bfloat16."""
    from olpack.train.batches import pack
    from olpack.train.forward import Forward

    batches = [rows(600, SHAPES["tiny"][-1], seed % 4, 128) for seed in range(steps)]

    def curve(plain: bool) -> list[float]:
        torch.manual_seed(0)
        model = random_model("tiny", device)
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        forward = None if plain else Forward(model, device, checkpointing=False)
        optimizer, found = torch.optim.AdamW(adapter, lr=2e-3), []
        for batch in batches:
            if plain:
                total = torch.zeros((), device=device)
                for row in batch:
                    ids = torch.tensor(row.ids, device=device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        logits = model(input_ids=ids[None], use_cache=False).logits[0]
                    total = total + F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")
            else:
                total = forward.loss(pack(batch, device))
            loss = total / sum(row.target_count for row in batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain, ours = curve(True), curve(False)
    apart = max(abs(a - b) for a, b in zip(plain, ours, strict=True))
    return [f"losses over {steps} steps, plain {plain[0]:.4f} to {plain[-1]:.4f}, olpack {ours[0]:.4f} to {ours[-1]:.4f}, at most {apart:.4f} apart"]


def plain_8b(device: torch.device, tokens: int) -> list[str]:
    """The way it was before: peft's layers, transformers' attention, padded rows, all logits; gradient checkpointing of torch."""
    from olpack.recipe import Train
    from olpack.train import loop

    model = random_model("8B", device)
    model.base_model.model.enable_input_require_grads()
    model.base_model.model._set_gradient_checkpointing(True)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, seconds = loop._optimizer(adapter, Train(), device), []
    for number in range(3):
        ids = torch.randint(3, 128000, (tokens // 2048, 2048), device=device)
        if number == 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        del logits
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.time() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return [f"| plain peft and transformers, checkpointing | {tokens:,} | {tokens / seconds[-1]:,.0f} | | {peak:.2f} |"]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    lines = []

    def part(name: str, compute: Callable[[], list[str]]) -> None:
        if time.time() - BEGUN > arguments.seconds:
            print(f"not begun: {name}", flush=True)
            return
        started = time.time()
        try:
            found = compute()
        except Exception:  # the other parts are worth having
            found = [f"failed: {name}"]
            traceback.print_exc()
        lines.extend(found)
        print("\n".join(found), f"   ({name}: {time.time() - started:.1f} s, {time.time() - BEGUN:.0f} s since the start)", flush=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    rate = matmul_rate()
    hidden, middle, layers, heads, key_heads, words = SHAPES["8B"]
    weights = layers * (2 * hidden**2 * (1 + key_heads / heads) + 3 * hidden * middle) + words * hidden
    bench: list[Bench] = []

    def speed(label: str, tokens: int, steps: int, passes: int) -> list[str]:
        found, peak = bench[0].measure(tokens, steps)
        return [f"| {label} | {tokens:,} | {found:,.0f} | {found * passes * weights / rate:.0%} | {peak:.2f} |"]

    def build() -> list[str]:
        bench.append(Bench("8B", device))
        started = time.time()
        bench[0].step(rows(2048, words))
        torch.cuda.synchronize()
        return [
            f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}: Llama 3 8B's shape, NF4, rank {RANK} on all "
            f"linear layers; {rate / 1e12:.0f} TFLOP/s in a large bf16 product. The first step, kernels compiled in it, took "
            f"{time.time() - started:.1f} s.",
            "",
            "| olpack | tokens a step | tokens/s | of the limit | peak GiB |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]

    def with_checkpointing(label: str, tokens: int, steps: int, *, offload: bool = True, keep: bool = False) -> list[str]:
        bench[0].checkpointing(True, offload=offload, keep=keep)
        return speed(label, tokens, steps, 6)

    def without(tokens: int, steps: int) -> list[str]:
        bench[0].checkpointing(False)
        return speed("no checkpointing", tokens, steps, 4)

    def profile() -> list[str]:
        bench[0].checkpointing(False)
        batch = rows(16384, words)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            bench[0].step(batch)
            torch.cuda.synchronize()
        Path(arguments.output).with_suffix(".profile.txt").write_text(
            profiler.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=100)
        )
        return []

    def smallest() -> list[str]:
        bench[0].forward._offload_embeddings(bench[0].host, with_head=False)
        bench[0].optimizer.zero_grad(set_to_none=True)
        free()
        found = with_checkpointing("checkpointing, offloaded, input embeddings in host memory too", 2048, 4)
        bench[0].forward._offload_embeddings(bench[0].host, with_head=True)
        free()
        return found + with_checkpointing("checkpointing, offloaded, embeddings and output layer in host memory too", 2048, 4)

    def large() -> list[str]:
        bench.clear()
        free()
        bench.append(Bench("70B", device, offload=True))
        found = []
        for tokens in (512, 2048):
            bench[0].checkpointing(True)
            pace, peak = bench[0].measure(tokens, 1)
            found.append(f"| 70B, checkpointing, offloaded, input embeddings in host memory too | {tokens:,} | {pace:,.0f} | | {peak:.2f} |")
        return found

    part("build", build)
    part("no checkpointing", lambda: without(16384, 5))
    part("checkpointing", lambda: with_checkpointing("checkpointing, offloaded, attention kept", 16384, 4, keep=True))
    part("checkpointing, nothing kept", lambda: with_checkpointing("checkpointing, offloaded", 16384, 4))
    part("profile", profile)
    part("same losses", lambda: print(*same_losses(device)) or [])
    for tokens in (2048, 4096, 8192):
        part("memory", partial(without, tokens, 2))
        part("memory, checkpointing", partial(with_checkpointing, "checkpointing, offloaded, attention kept", tokens, 2, keep=True))
    for tokens in (2048, 16384):
        part("not offloaded", partial(with_checkpointing, "checkpointing", tokens, 2, offload=False))
    part("smallest", smallest)
    part("large", large)
    bench.clear()
    free()
    part("plain", lambda: plain_8b(device, 8192))


if __name__ == "__main__":
    sys.exit(main())
