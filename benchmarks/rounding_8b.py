"""How long `rounding: learned` takes for an 8B: the layers of a Llama 3 8B with random weights, read and rounded one by one.

    python benchmarks/rounding_8b.py                     # two minutes on an H200 with 16 cores
    python benchmarks/rounding_8b.py --hidden 512        # how it works, on any machine

A file with some of the 32 layers reads rows in Q8_0, as in a build: on a GPU by transformers, else by llama.cpp. Each matrix of one layer is rounded
to the types that quants give it. What 32 layers and 16,384 tokens take is that in proportion. Then the block scales of Q4_0 are trained for some
steps of 16 such rows, in proportion likewise. Prints a Markdown table and writes it to benchmarks/rounding_8b.md.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import torch
from page import command_line, measured_here, publish

from olpack.data import TokenRow
from olpack.export import second_order
from olpack.export.rounded import input_factors
from olpack.export.second_order import Factor, round_matrix
from olpack.llamacpp import library
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.grids import GRID_TYPES
from olpack.recipe import Export
from olpack.train.block_scales import ROWS_A_STEP, train_block_scales
from olpack.train.layer_inputs import LayerInputs

LAYERS, TOKENS, HEAD, ROW = 32, 16_384, 128, 512
VOCABULARY = 128_256 / 4096  # times the hidden size
PLAIN, SCALED = ("q4_0", "q4_K", "q5_K"), "q4_0"  # of the quants Q4_0, Q4_K_M and Q5_K_M; the type whose scales are trained
MORE_BITS, IN_HALF_OF_LAYERS = ("attn_v", "ffn_down"), "q6_K"  # in place of q4_K and q5_K


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2, help="that are written and read")
    parser.add_argument("--tokens", type=int, default=TOKENS if torch.cuda.is_available() else 4096, help="that are read")
    parser.add_argument("--folder", type=Path, help="for the file; by default one for temporary files")
    asked = parser.parse_args()
    hidden = asked.hidden
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 4, hidden),
        "attn_v": (hidden // 4, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (hidden * 7 // 2, hidden),
        "ffn_up": (hidden * 7 // 2, hidden),
        "ffn_down": (hidden, hidden * 7 // 2),
    }
    draw = random.Random(0)
    vocabulary = round(VOCABULARY * hidden)
    rows = [[draw.randrange(vocabulary) for _ in range(ROW)] for _ in range(asked.tokens // ROW)]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path, one = (write(Path(folder) / f"{layers}.gguf", shapes, hidden, layers, vocabulary) for layers in (asked.layers, 1))
        print("written", flush=True)
        text = [*measured(path, one, shapes, rows, asked.layers)]
    publish(
        [
            "# How long rounding by output takes for an 8B\n",
            __doc__.split("\n\n")[2].split("Prints")[0].strip(),
            "",
            *text,
            "",
            measured_here(__file__),
        ],
        asked.output,
    )


def measured(path: Path, one: Path, shapes: dict[str, tuple[int, int]], rows: list[list[int]], layers: int) -> Iterator[str]:
    """The table.

    Args:
        path, one: the files with all these layers, and with one of them.
    """
    names = {f"blk.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in shapes.items()}
    on_gpu = torch.cuda.is_available()
    values = np.random.default_rng(1).standard_normal(max(a * b for a, b in shapes.values()), np.float32) * 0.02
    library.quantize_rows(library.tensor_type("q4_K"), values[None, :256], np.empty(144, np.uint8), search=True)  # the search is compiled by then
    reading, rounding, factoring = 0.0, {}, 0.0
    blocks: dict[str, tuple[str, Path]] = {}
    alone = ""
    loading = seconds_to_load(path, names) if on_gpu else 0.0
    with ThreadPoolExecutor(usable_processors()) as pool:
        started = time.monotonic()
        for number, (sharing, given) in enumerate(input_factors(path, rows, names)):
            wait(on_gpu)
            if number == 0:
                reading = time.monotonic() - started - loading  # and one factor
            else:
                factoring += time.monotonic() - started
            assert given is not None
            print(f"{', '.join(sharing)}: {time.monotonic() - started:.2f} s", flush=True)
            for name in (name.split(".")[2] for name in sharing if name.startswith("blk.0.")):
                matrix = np.ascontiguousarray(values[: shapes[name][0] * shapes[name][1]].reshape(shapes[name]))
                for type_name in (*PLAIN, *([IN_HALF_OF_LAYERS] if name in MORE_BITS else [])):
                    took = []
                    for _ in range(2):  # the first of a type compiles its kernel
                        started = time.monotonic()
                        packed = round_matrix(type_name, matrix, given, pool)
                        took.append(time.monotonic() - started)
                    assert packed is not None
                    rounding[name, type_name] = took[1]
                    print(f"{name} to {type_name}: {took[0]:.2f} s, then {took[1]:.2f} s", flush=True)
                    if type_name == SCALED:
                        blocks[name] = (type_name, path.with_name(f"{name}.{type_name}"))
                        packed.tofile(blocks[name][1])
                    if on_gpu and name == "attn_k" and type_name == "q4_K":
                        alone = without_kernel(type_name, matrix, given, pool, packed, took[1])
            started = time.monotonic()
    torch.cuda.empty_cache()
    steps = [
        seconds_a_step(file, {f"blk.{layer}.{name}.weight": of_type for layer in range(count) for name, of_type in blocks.items()}, rows)
        for file, count in ((one, 1), (path, layers))
    ]
    step = steps[0] + (steps[1] - steps[0]) / (layers - 1) * (LAYERS - 1)  # the output layer is there once
    scale = LAYERS / layers * TOKENS / sum(map(len, rows))
    read, factorized, training = reading * scale, factoring * LAYERS / layers, step * Export().scale_steps

    of_layers = layers * sum(a * b for a, b in shapes.values()) * 34 / 32
    loaded = loading * (1 + (LAYERS / layers - 1) * of_layers / path.stat().st_size)
    read_in_all = loaded + read + factorized

    def rounded(*types: str) -> float:
        """Seconds for all layers."""

        def of(name: str) -> float:
            plain = sum(rounding[name, one] for one in types)
            if name not in MORE_BITS:
                return plain
            return (plain + sum(rounding[name, one] for one in types if one == SCALED) + rounding[name, IN_HALF_OF_LAYERS]) / 2

        return LAYERS * sum(map(of, shapes))

    tokens = f"{sum(map(len, rows)):,} tokens through {layers} layers"
    yield "| step | measured | 32 layers |"
    yield "| --- | ---: | ---: |"
    if on_gpu:
        yield f"| the model on the GPU | {loading:.1f} s | {loaded:.0f} s |"
    yield f"| {tokens}, with the products of their inputs | {reading:.1f} s | {read:.0f} s |"
    yield f"| the factors of {4 * layers - 1} matrices of products | {factoring:.2f} s | {factorized:.0f} s |"
    for (name, type_name), seconds in rounding.items():
        yield f"| {name} to {type_name} | {seconds:.2f} s | |"
    yield f"| all matrices to the types of Q4_K_M | | {rounded('q4_K'):.0f} s |"
    yield f"| to those of Q4_0, Q4_K_M and Q5_K_M | | {rounded(*PLAIN):.0f} s |"
    yield f"| a step of training of the block scales, {ROWS_A_STEP * ROW:,} tokens | {steps[1]:.2f} s | {step:.1f} s |"
    yield f"| {Export().scale_steps} such steps, for Q4_0 | | {training:.0f} s |"
    yield f"| **Q4_K_M in all** | | **{read_in_all + rounded('q4_K'):.0f} s** |"
    yield f"| **Q4_0, Q4_K_M and Q5_K_M in all** | | **{read_in_all + rounded(*PLAIN) + training:.0f} s** |"
    if on_gpu:
        yield f"\n{alone}"
        yield f"\nMost memory of the GPU, with the products of {layers} layers: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB."


def seconds_to_load(path: Path, names: Collection[str]) -> float:
    """Of the model, on the GPU; the first time, libraries are imported."""
    for _ in range(2):
        started = time.monotonic()
        assert LayerInputs.load(path, names, ROW, torch.device("cuda"), 1 << 50)
        wait(True)
    return time.monotonic() - started


def without_kernel(type_name: str, matrix: np.ndarray, given: Factor, pool: ThreadPoolExecutor, packed: np.ndarray, seconds: float) -> str:
    """The same matrix with a column's operations launched one by one."""
    kernel = second_order._columns
    second_order._columns = lambda name, device: second_order.Columns(GRID_TYPES[name], device)
    started = time.monotonic()
    plain = round_matrix(type_name, matrix, given, pool)
    took = time.monotonic() - started
    second_order._columns = kernel
    assert plain is not None
    values = [gguf.dequantize(blocks, gguf.GGMLQuantizationType(library.tensor_type(type_name))) for blocks in (packed, plain)]
    errors = [second_order.output_error(matrix, one, given) for one in values]
    same, ratio = (packed == plain).mean(), errors[1] / errors[0]
    return (
        f"attn_k to {type_name}: {seconds:.2f} s; with plain torch in place of the kernel {took:.2f} s, {same:.4%} of the bytes the same, and "
        f"{ratio:.5f} times the error of the outputs."
    )


def seconds_a_step(path: Path, matrices: dict[str, tuple[str, Path]], rows: list[list[int]]) -> float:
    """Of training of block scales: what six steps take more than two, a quarter of it."""
    took = []
    given = [TokenRow(ids, [True] * len(ids), "", "") for ids in rows]
    for steps in (2, 2, 6):  # the first loads kernels
        started = time.monotonic()
        train_block_scales(path, matrices, given, path.with_name(f"{steps}.safetensors"), steps=steps, title="training block scales")
        took.append(time.monotonic() - started)
    return (took[2] - took[1]) / 4


def wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def write(path: Path, shapes: dict[str, tuple[int, int]], hidden: int, layers: int, vocabulary: int) -> Path:
    """A Llama of random weights in Q8_0, without a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shapes["ffn_gate"][0])
    writer.add_head_count(hidden // HEAD)
    writer.add_head_count_kv(max(1, hidden // HEAD // 4))
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    draw = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        type_ = library.tensor_type("q8_0")
        some = np.empty((min(rows, 512), library.row_size(type_, columns)), np.uint8)
        library.quantize_rows(type_, draw.standard_normal((len(some), columns), np.float32) * 0.02, some)
        writer.add_tensor(name, np.resize(some, (rows, some.shape[1])), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    for name in ("token_embd", "output"):
        add(f"{name}.weight", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, (rows, columns) in shapes.items():
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
