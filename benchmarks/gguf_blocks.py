"""Frozen weights in the blocks of a GGUF beside NF4, on a GPU: the kernels alone, and a training step of an 8B model.

    python benchmarks/gguf_blocks.py [--only kernels|steps] [--seconds 150] [--output benchmarks/gguf_blocks.md]

The files of the second table are headers of Llama 3 8B in llama.cpp's mixes and holes for the data; they are opened, planned and loaded as any,
and the blocks are filled at random. NF4 is the model of `train_8b.py`. No line is begun once the seconds are over.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import gguf
import numpy as np
import torch
import triton
from page import command_line
from train_8b import RANK, SHAPES, Bench, rows

from olpack.model.base import Base
from olpack.model.gguf_architectures import config_of
from olpack.model.gguf_base import open_gguf
from olpack.model.gguf_blocks import TYPES, BlockType
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train import planner
from olpack.train.frozen import BlockLinear
from olpack.train.model import load_with_adapter
from olpack.train.ops import block_kernels, kernels, lora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from random_blocks import SCALES, random_blocks

BEGUN = time.time()
ROWS, COLUMNS = 14336, 4096  # of the weight of the first table
QUANTS = ("Q4_K_M", "Q4_0", "Q8_0")
TOKENS, STEPS = (2048, 8192), 6
STANDARD = 0.02  # deviation of a weight


def milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def like_weights(type_: BlockType, device: torch.device, count: int, columns: int) -> torch.Tensor:
    """Random blocks whose weights have a mean of 0 and `STANDARD`."""

    def sample(scale: float, offset: float) -> torch.Tensor:
        return type_.dequantize(random_blocks(type_, 256, 256, device, scale, offset))

    if type_.name == "MXFP4":
        return random_blocks(type_, count, columns, device, STANDARD / 8)
    offset = 0.0
    if len(SCALES[type_.name]) > 1:
        offset = -(sample(1 / 64, 0).mean() / sample(0, 1).mean() * 64).item()
    deviation = sample(1 / 64, offset / 64).std().item() * 64
    return random_blocks(type_, count, columns, device, STANDARD / deviation, offset * STANDARD / deviation)


def kernel_lines(device: torch.device) -> Iterator[str]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    yield f"A weight of {ROWS:,} × {COLUMNS:,}, in ms (GB/s read and written):"
    yield ""
    yield "| blocks | to bfloat16 | by plain torch | values that differ | to fp8 | turned |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    codes = torch.empty(ROWS, COLUMNS, dtype=torch.float8_e4m3fn, device=device)
    turned = torch.empty(COLUMNS, ROWS, dtype=torch.float8_e4m3fn, device=device)
    scale, turned_scale = (torch.full((size, 1), 0.1 / 448, device=device) for size in (ROWS, COLUMNS))

    def line(name: str, packed: int, dense: Callable, plain: Callable, to_fp8: Callable) -> str:
        differ = (dense() != plain()).sum().item()
        taken = [milliseconds(dense), milliseconds(plain), *(milliseconds(lambda way=way: to_fp8(*way)) for way in ways)]
        pace = (packed + 2 * ROWS * COLUMNS) / taken[0] / 1e6
        return f"| {name} | {taken[0]:.4f} ({pace:,.0f}) | {taken[1]:.3f} | {differ} | {taken[2]:.4f} | {taken[3]:.4f} |"

    ways = ((scale, codes, False), (turned_scale, turned, True))
    weight = STANDARD * torch.randn(ROWS, COLUMNS, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    yield line(
        "NF4 (plain: bitsandbytes)",
        packed.nbytes,
        lambda: kernels.dequantize_4bit(packed, state),
        lambda: dequantize_4bit(packed, state),
        lambda *way: kernels.dequantize_4bit_to_fp8(packed, state, *way),
    )
    for type_ in TYPES.values():
        if type_.name in block_kernels.TYPES:
            blocks = like_weights(type_, device, ROWS, COLUMNS)
            yield line(
                type_.name,
                blocks.nbytes,
                lambda type_=type_, blocks=blocks: block_kernels.dequantize(type_, blocks, torch.bfloat16),
                lambda type_=type_, blocks=blocks: type_.dequantize(blocks, torch.bfloat16),
                lambda *way, type_=type_, blocks=blocks: block_kernels.dequantize_to_fp8(type_, blocks, *way),
            )


def types_of(quant: str, layer: int, layers: int) -> dict[str, str]:
    """Part of a tensor's name to its type, where that is not the quant's own: llama.cpp's mix."""
    if quant != "Q4_K_M":
        return {"output": "Q6_K" if quant == "Q4_0" else quant}
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return {"output": "Q6_K", **({"attn_v": "Q6_K", "ffn_down": "Q6_K"} if more else {})}


def write_file(quant: str, path: Path) -> None:
    """A GGUF of Llama 3 8B with holes for its data."""
    hidden, middle, layers, heads, key_heads, words = SHAPES["8B"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    keys = hidden * key_heads // heads
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden), "ffn_down": (hidden, middle),
    }  # fmt: skip
    numbers, size = {type_.name: number for number, type_ in TYPES.items()}, 0

    def add(name: str, shape: tuple[int, ...], type_name: str) -> None:
        nonlocal size
        type_ = TYPES[numbers[type_name]]
        stored = (*shape[:-1], type_.row_bytes(shape[-1]))
        dtype = gguf.GGMLQuantizationType(numbers[type_name])
        if type_name == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(stored), raw_dtype=dtype)
        else:
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=dtype)
        size += -(-math.prod(stored) // 32) * 32

    own = "Q4_K" if quant == "Q4_K_M" else quant
    add("token_embd.weight", (words, hidden), own)
    for layer in range(layers):
        chosen = types_of(quant, layer, layers)
        for part, shape in matrices.items():
            add(f"blk.{layer}.{part}.weight", shape, chosen.get(part, own))
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", (hidden,), "F32")
    add("output_norm.weight", (hidden,), "F32")
    add("output.weight", (words, hidden), types_of(quant, 0, layers)["output"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)


def loaded(base: Base, device: torch.device):
    """The model with its adapter, its blocks filled."""
    model = load_with_adapter(base, Train(rank=RANK), device).model
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(std=STANDARD)
    for module in model.modules():
        if isinstance(module, BlockLinear):
            blocks = module.get_buffer("blocks")
            blocks.copy_(like_weights(module.block_type, device, len(blocks), module.in_features))
    return model


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def step_lines(device: torch.device, folder: Path, late: Callable[[], bool]) -> Iterator[str]:
    yield f"Training the 8B shape, rank {RANK}, the median of {STEPS} steps. Frozen weights and the peak in GiB, measured (planned):"
    yield ""
    yield "| frozen weights | GiB | products | checkpointing | tokens of a step | tokens/s | of NF4 | peak GiB |"
    yield "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |"
    nf4: dict[tuple, float] = {}
    for quant in ("NF4", *QUANTS):
        if late():
            return
        free()
        begun, stored, model, words = time.time(), None, None, SHAPES["8B"][-1]
        if quant != "NF4":
            path = folder / f"{quant}.gguf"
            write_file(quant, path)
            base = Base(quant, folder, gguf=open_gguf(path))
            stored, model = planner.stored_bytes(base), loaded(base, device)
            shape = MetaModel(config_of(base.gguf), quant)
        bench = Bench("8B", device, model=model)
        if quant == "NF4":
            config = bench.forward.base.config.to_dict()
            shape = MetaModel({**config, "architectures": ["LlamaForCausalLM"]}, quant)
        taken = sum(tensor.nbytes for tensor in frozen_tensors(bench.model)) / 2**30
        print(f"{quant}: {time.time() - begun:.1f} s until it trains", flush=True)
        for products, checkpointing in (("16 bits", False), ("fp8", False), ("16 bits", True)):
            lora.fuse(bench.model, bench.forward.dtype, in_fp8=products == "fp8")
            bench.checkpointing(checkpointing, offload=False, keep=False)
            for tokens in TOKENS if not checkpointing else TOKENS[-1:]:
                if late():
                    return
                bench.measure(tokens, 2)  # kernels are compiled, memory is reserved
                pace, peak = bench.measure(tokens, STEPS)
                key = (products, checkpointing, tokens)
                nf4.setdefault(key, pace)
                asked = Train(rank=RANK, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, batch_size=64, epochs=1)
                fit = planner.on_gpu(shape, rows(tokens, words), asked, 1 << 40, stored=stored)
                planned = "" if checkpointing else f" ({fit.bytes / 2**30:.1f})"  # with it, olpack offloads the embeddings, too
                way = f"{products} | {'yes' if checkpointing else 'no'} | {tokens:,}"
                frozen = f"{taken:.2f} ({fit.training.weights / 2**30:.2f})"
                yield f"| {quant} | {frozen} | {way} | {pace:,.0f} | {pace / nf4[key]:.2f} × | {peak:.1f}{planned} |"
        del bench, model


def frozen_tensors(model) -> Iterator[torch.Tensor]:
    """All that the base has in memory."""
    yield from (blocks for blocks in model.buffers() if blocks.dtype == torch.uint8)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            if (state := getattr(parameter, "quant_state", None)) is not None:
                yield from (state.absmax, *((state.state2.absmax,) if state.nested else ()))


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--only", choices=["kernels", "steps"])
    parser.add_argument("--seconds", type=float, default=150)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    lines = [
        "# Blocks of GGUF files beside NF4",
        "",
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}. `python benchmarks/gguf_blocks.py`",
        "",
    ]

    def late() -> bool:
        return time.time() - BEGUN > arguments.seconds

    def publish(found: Iterator[str]) -> None:
        for line in found:
            lines.append(line)
            print(line, f"   {time.time() - BEGUN:.0f} s", flush=True)
            arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines.append("")

    if arguments.only != "steps":
        publish(kernel_lines(device))
    if arguments.only != "kernels":
        with tempfile.TemporaryDirectory() as folder:
            publish(step_lines(device, Path(folder), late))


if __name__ == "__main__":
    main()
