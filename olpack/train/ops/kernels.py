"""The functions of `olpack.train.ops.pointwise` as Triton kernels, for a GPU: `norm`, `rotate` and `loss` under the same names, with the same
arguments and the same results up to rounding, and those of `Gate` and of a weight in 4 bits.

Each makes one pass over the memory that it must read and write. What that gains is in benchmarks/train_kernels.md. Counts of tokens are not
specialized, so that a kernel is compiled once, and not once for those that 16 divides and once for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from olpack.train.ops.low_rank import MlpLowRank

MOST_RANK = 64  # of an adapter whose products a kernel makes beside the gate; of a larger one the sums do not fit into registers
_FUSED = {"enable_fp_fusion": True}  # products and sums rounded once; Triton warns that its default will change
_ROW = 4096  # elements of a program in kernels that go row by row
# Logits that a program reads at once; and a number that, negative, is less than any logit, and whose difference to itself is a number.
_LOSS = {"SIZE": 4096, "FEW": 1e30, "num_warps": 8, **_FUSED}
_NUMBERS = 2048  # of a 4-bit weight in a program
_PROGRAMS, _GRADIENTS_PROGRAMS = 4096, 1024  # into which the work of a large GPU is best cut
_refused: set[int] = set()  # padded ranks whose tiles do not fit into the GPU's shared memory
_FLAT = 1024  # elements of a program in kernels that take them as they come


def _rows_of(size: int) -> dict[str, int]:
    """How many rows of so many elements a program takes."""
    padded = triton.next_power_of_2(size)
    return {"ROWS": max(1, _ROW // padded), "SIZE": padded, "num_warps": 4 if padded <= _ROW else 16, **_FUSED}


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(x, weight, y, scale, rows, size, eps, offset, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    seen = (row < rows) & (column < size)
    place = row.to(tl.int64) * size + column
    wide = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / size + eps)
    factor = offset + tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(y + place, wide * inverse * factor, mask=seen)
    tl.store(scale + row, inverse, mask=row < rows)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = x.shape
    y, scale = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    parts = _rows_of(size)
    _norm_kernel[(triton.cdiv(rows, parts["ROWS"]),)](x, weight, y, scale, rows, size, eps, offset, **parts)
    return y, scale


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(dy, x, scale, weight, dx, rows, size, offset, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    seen = (row < rows) & (column < size)
    place = row.to(tl.int64) * size + column
    inverse = tl.load(scale + row, mask=row < rows, other=0.0)
    scaled = tl.load(x + place, mask=seen, other=0.0).to(tl.float32) * inverse
    factor = offset + tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    gradient = tl.load(dy + place, mask=seen, other=0.0).to(tl.float32) * factor
    along = tl.sum(gradient * scaled, 1, keep_dims=True) / size
    tl.store(dx + place, (gradient - scaled * along) * inverse, mask=seen)


def norm_backward(dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    rows, size = x.shape
    dx = torch.empty_like(dy)
    parts = _rows_of(size)
    _norm_backward_kernel[(triton.cdiv(rows, parts["ROWS"]),)](dy, x, scale, weight, dx, rows, size, offset, **parts)
    return dx


@triton.jit(do_not_specialize=["rows", "heads"])
def _rotate_kernel(x, cos, sin, y, rows, heads, half, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # a head of a token
    column = tl.arange(0, SIZE)[None, :]
    seen = (row < rows) & (column < half)
    place = row.to(tl.int64) * (2 * half) + column
    angle = (row // heads) * (2 * half) + column
    first = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=seen, other=0.0).to(tl.float32)
    of_first, with_second = tl.load(cos + angle, mask=seen, other=0.0).to(tl.float32), tl.load(sin + angle, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + place, first * of_first + second * with_second, mask=seen)
    of_second = tl.load(cos + angle + half, mask=seen, other=0.0).to(tl.float32)
    with_first = tl.load(sin + angle + half, mask=seen, other=0.0).to(tl.float32)
    tl.store(y + place + half, second * of_second + first * with_first, mask=seen)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    tokens, heads, size = x.shape
    y, rows = torch.empty_like(x), tokens * heads
    parts = _rows_of(size // 2)
    _rotate_kernel[(triton.cdiv(rows, parts["ROWS"]),)](x, cos.contiguous(), sin.contiguous(), y, rows, heads, size // 2, **parts)
    return y


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _loss_kernel(logits, targets, losses, words, softcap, CAPPED: tl.constexpr, SIZE: tl.constexpr, FEW: tl.constexpr):
    row = tl.program_id(0)
    here = logits + row.to(tl.int64) * words
    target = tl.load(targets + row)
    counted = tl.where(target < 0, 0.0, 1.0)  # `UNCOUNTED`
    wanted = tl.load(here + tl.maximum(target, 0)).to(tl.float32)
    if CAPPED:
        wanted = softcap * _tanh(wanted / softcap)
    highest = tl.full([SIZE], -FEW, tl.float32)  # of each lane
    total = tl.zeros([SIZE], tl.float32)
    for start in range(0, words, SIZE):
        word = start + tl.arange(0, SIZE)
        wide = tl.load(here + word, mask=word < words, other=0.0).to(tl.float32)
        if CAPPED:
            wide = softcap * _tanh(wide / softcap)
        wide = tl.where(word < words, wide, -FEW)
        higher = tl.maximum(highest, wide)
        total = total * tl.exp(highest - higher) + tl.exp(wide - higher)
        highest = higher
    most = tl.max(highest, 0)
    whole = tl.sum(total * tl.exp(highest - most), 0)
    tl.store(losses + row, (tl.log(whole) + most - wanted) * counted)
    for start in range(0, words, SIZE):
        word = start + tl.arange(0, SIZE)
        wide = tl.load(here + word, mask=word < words, other=0.0).to(tl.float32)
        if CAPPED:
            squashed = _tanh(wide / softcap)
            gradient = (tl.exp(squashed * softcap - most) / whole - tl.where(word == target, 1.0, 0.0)) * (1.0 - squashed * squashed)
        else:
            gradient = tl.exp(wide - most) / whole - tl.where(word == target, 1.0, 0.0)
        tl.store(here + word, gradient * counted, mask=word < words)


def loss(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, words = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    _loss_kernel[(rows,)](logits, targets, losses, words, softcap, CAPPED=bool(softcap), **_LOSS)
    return losses, logits


@triton.jit
def _gate(x, GELU: tl.constexpr):
    """(f(x), f'(x))"""
    if GELU:
        inner = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1.0 + inner)
        slope = 0.5 * (1.0 + inner) + 0.5 * x * (1.0 - inner * inner) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    return value, slope


@triton.jit
def _product_kernel(gated, upped, middle, size, GELU: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value, _ = _gate(tl.load(gated + place, mask=place < size, other=0.0).to(tl.float32), GELU)
    tl.store(middle + place, value * tl.load(upped + place, mask=place < size, other=0.0).to(tl.float32), mask=place < size)


@triton.jit
def _gradients_kernel(dmiddle, gated, upped, size, GELU: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    gradient = tl.load(dmiddle + place, mask=place < size, other=0.0).to(tl.float32)
    value, slope = _gate(tl.load(gated + place, mask=place < size, other=0.0).to(tl.float32), GELU)
    up = tl.load(upped + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(dmiddle + place, value * up, mask=place < size)
    tl.store(gated + place, gradient * up * slope, mask=place < size)
    tl.store(upped + place, gradient * value, mask=place < size)


@triton.jit(do_not_specialize=["tokens"])
def _adapted_product_kernel(
    gated,
    upped,
    h,
    gate_b,
    up_b,
    down_a,
    middle,
    low,
    tokens,
    columns,
    rank,
    span,
    GELU: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mine = (token < tokens)[:, None]
    part = tl.arange(0, RANK)
    in_rank = (part < rank)[None, :]
    of_gate = tl.load(h + token[:, None] * (2 * rank) + part[None, :], mask=mine & in_rank, other=0.0)
    of_up = tl.load(h + token[:, None] * (2 * rank) + rank + part[None, :], mask=mine & in_rank, other=0.0)
    found = tl.zeros([TOKENS, RANK], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * TOKENS * columns
    within = tl.arange(0, TOKENS)[:, None] * columns
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        place, seen = within + column[None, :], mine & inside[None, :]
        there = (part < rank)[:, None] & inside[None, :]
        at = column[None, :] * rank + part[:, None]
        gate = tl.load(gated + begin + place, mask=seen, other=0.0).to(tl.float32)
        gate = tl.dot(of_gate, tl.load(gate_b + at, mask=there, other=0.0), gate)
        up = tl.load(upped + begin + place, mask=seen, other=0.0).to(tl.float32)
        up = tl.dot(of_up, tl.load(up_b + at, mask=there, other=0.0), up)
        value, _ = _gate(gate, GELU)
        product = (value * up).to(middle.dtype.element_ty)
        tl.store(middle + begin + place, product, mask=seen)
        a = tl.load(down_a + part[None, :] * columns + column[:, None], mask=in_rank & inside[:, None], other=0.0)
        found = tl.dot(product, a, found)
    row = tl.program_id(1).to(tl.int64) * tokens + token[:, None]
    tl.store(low + row * rank + part[None, :], found, mask=mine & in_rank)


@triton.jit(do_not_specialize=["tokens", "span"])
def _adapted_gradients_kernel(
    dmiddle,
    gated,
    upped,
    h,
    gate_b,
    up_b,
    down_a,
    dlow,
    sums,
    tokens,
    columns,
    rank,
    span,
    GELU: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.arange(0, RANK)
    in_rank = (part < rank)[None, :]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    there = (part < rank)[:, None] & inside
    of_b = column[None, :] * rank + part[:, None]
    b_gate, b_up = tl.load(gate_b + of_b, mask=there, other=0.0), tl.load(up_b + of_b, mask=there, other=0.0)
    a_down = tl.load(down_a + part[:, None] * columns + column[None, :], mask=there, other=0.0)
    db_gate = tl.zeros([COLUMNS, RANK], tl.float32)
    db_up = tl.zeros([COLUMNS, RANK], tl.float32)
    da_down = tl.zeros([COLUMNS, RANK], tl.float32)
    place = tl.arange(0, TOKENS)[:, None] * columns + column[None, :]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        mine = (token < tokens)[:, None]
        seen = mine & inside
        begin = tl.cast(start, tl.int64) * columns
        h_gate = tl.load(h + token[:, None] * (2 * rank) + part[None, :], mask=mine & in_rank, other=0.0)
        h_up = tl.load(h + token[:, None] * (2 * rank) + rank + part[None, :], mask=mine & in_rank, other=0.0)
        d_low = tl.load(dlow + token[:, None] * rank + part[None, :], mask=mine & in_rank, other=0.0)
        gate = tl.dot(h_gate, b_gate, tl.load(gated + begin + place, mask=seen, other=0.0).to(tl.float32))
        up = tl.dot(h_up, b_up, tl.load(upped + begin + place, mask=seen, other=0.0).to(tl.float32))
        gradient = tl.dot(d_low, a_down, tl.load(dmiddle + begin + place, mask=seen, other=0.0).to(tl.float32))
        value, slope = _gate(gate, GELU)
        da_down = tl.dot(tl.trans((value * up).to(gated.dtype.element_ty)), d_low, da_down)
        dgate = (gradient * up * slope).to(gated.dtype.element_ty)
        tl.store(gated + begin + place, dgate, mask=seen)
        db_gate = tl.dot(tl.trans(dgate), h_gate, db_gate)
        dup = (gradient * value).to(gated.dtype.element_ty)
        tl.store(upped + begin + place, dup, mask=seen)
        db_up = tl.dot(tl.trans(dup), h_up, db_up)
    row = (tl.program_id(1).to(tl.int64) * 3 * columns + column[:, None]) * rank + part[None, :]
    known = (column < columns)[:, None] & in_rank
    tl.store(sums + row, db_gate, mask=known)
    tl.store(sums + row + columns * rank, db_up, mask=known)
    tl.store(sums + row + 2 * columns * rank, da_down, mask=known)


def takes(adapters: MlpLowRank) -> bool:
    """Whether the adapters' products can be made beside the gate: in 16 bits, and up to a rank."""
    rank, *others = adapters.gate_b.shape[1], adapters.up_b.shape[1], adapters.down_a.shape[0]
    return adapters.h.dtype.itemsize == 2 and others == [rank, rank] and rank <= MOST_RANK and _padded(rank) not in _refused


def product(gated: torch.Tensor, upped: torch.Tensor, adapters: MlpLowRank | None, gate: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`Gate.product`; without adapters the middle alone."""
    middle, gelu = torch.empty_like(gated), gate == "gelu_tanh"
    if adapters is None:
        size = gated.numel()
        _product_kernel[(triton.cdiv(size, _FLAT),)](gated, upped, middle, size, GELU=gelu, SIZE=_FLAT, **_FUSED)
        return middle, None
    tokens, columns = gated.shape
    rank = adapters.gate_b.shape[1]
    tile = _tile(rank)
    blocks = triton.cdiv(tokens, tile["TOKENS"])
    parts, span = _cut(columns, tile["COLUMNS"], blocks, _PROGRAMS)
    low = gated.new_empty(parts, tokens, rank, dtype=torch.float32)
    _adapted_product_kernel[(blocks, parts)](gated, upped, *adapters, middle, low, tokens, columns, rank, span, GELU=gelu, **tile)
    return middle, low.sum(0).to(gated.dtype)


def gradients(
    dmiddle: torch.Tensor, gated: torch.Tensor, upped: torch.Tensor, adapters: MlpLowRank | None, dlow: torch.Tensor | None, gate: str
) -> torch.Tensor | None:
    """The gradients of gated and upped take their places. Returns those of the scaled B of gate and of up and of A of down, turned,
    float32 [3, columns, rank]; without adapters nothing, and the middle takes the place of dmiddle."""
    gelu = gate == "gelu_tanh"
    if adapters is None:
        size = gated.numel()
        _gradients_kernel[(triton.cdiv(size, _FLAT),)](dmiddle, gated, upped, size, GELU=gelu, SIZE=_FLAT, **_FUSED)
        return None
    tokens, columns = gated.shape
    rank = adapters.gate_b.shape[1]
    tile = _gradients_tile(rank)
    blocks = triton.cdiv(columns, tile["COLUMNS"])
    parts, span = _cut(tokens, tile["TOKENS"], blocks, _GRADIENTS_PROGRAMS)
    sums = gated.new_empty(parts, 3, columns, rank, dtype=torch.float32)
    _adapted_gradients_kernel[(blocks, parts)](dmiddle, gated, upped, *adapters, dlow, sums, tokens, columns, rank, span, GELU=gelu, **tile)
    return sums.sum(0)


def _tile(rank: int) -> dict[str, int]:
    """Sizes of a program. Four warps multiply 64 rows at a time, and more columns would not fit into their registers."""
    padded = _padded(rank)
    return {"RANK": padded, "TOKENS": 64, "COLUMNS": 64 if padded == 16 else 32, "num_warps": 4, "num_stages": 2, **_FUSED}


def _gradients_tile(rank: int) -> dict[str, int]:
    """The same for a program that accumulates three sums as well: there more columns of few tokens are faster."""
    few = {"TOKENS": 16, "COLUMNS": 128, "num_stages": 1} if _padded(rank) == 16 else {}
    return {**_tile(rank), **few}


def _padded(rank: int) -> int:
    """The rank as a product of matrices takes it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


def _cut(size: int, step: int, others: int, programs: int) -> tuple[int, int]:
    """(parts, elements of a part) into which a dimension is cut so that there are programs enough; every part but the last is whole steps."""
    steps = triton.cdiv(size, step)
    span = triton.cdiv(steps, min(steps, triton.cdiv(programs, others))) * step
    return triton.cdiv(size, span), span


@triton.jit(do_not_specialize=["blocks"])
def _dequantize_kernel(
    codes,
    levels,
    absmax,
    outer_levels,
    outer,
    offset,
    out,
    blocks,
    numbers,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    known = block < blocks
    pair = block.to(tl.int64) * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    packed = tl.load(codes + pair, mask=2 * pair < numbers, other=0).to(tl.int32)
    largest = tl.load(absmax + block, mask=known, other=0)
    if NESTED:
        largest = tl.load(outer_levels + largest.to(tl.int32)) * tl.load(outer + block // OUTER, mask=known, other=0.0) + tl.load(offset)
    high, low = tl.load(levels + (packed >> 4)) * largest, tl.load(levels + (packed & 15)) * largest
    values = tl.reshape(tl.join(high, low), (BLOCKS, SIZE))
    place = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + place, values, mask=place < numbers)


def dequantize_4bit(weight: torch.Tensor, state) -> torch.Tensor:
    """The same as bitsandbytes' function of this name, digit for digit.

    Args:
        weight: packed, two numbers in a byte, whatever the dtype that it is stored as.
        state: bitsandbytes' `QuantState` of it.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    nested, form = state.nested, _dequantizing(state.blocksize)
    outer = (state.state2.code, state.state2.absmax, state.offset) if nested else (None, None, None)
    blocks = triton.cdiv(out.numel(), state.blocksize)
    _dequantize_kernel[(triton.cdiv(blocks, form["BLOCKS"]),)](
        weight.view(torch.uint8),
        state.code,
        state.absmax,
        *outer,
        out,
        blocks,
        out.numel(),
        NESTED=nested,
        OUTER=state.state2.blocksize if nested else 0,
        **form,
    )
    return out


def _dequantizing(blocksize: int) -> dict[str, int]:
    """Sizes of a program. Sums are rounded like bitsandbytes', after each product."""
    return {"SIZE": blocksize, "BLOCKS": max(1, _NUMBERS // blocksize), "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def to_fp8(numbers):
    return tl.minimum(tl.maximum(numbers, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _four_bits(
    codes, levels, absmax, outer_levels, outer, offset, row, block, rows, columns, NESTED: tl.constexpr, OUTER: tl.constexpr, SIZE: tl.constexpr
):
    """These rows and blocks of columns of a weight in 4 bits, float32 [rows, blocks · SIZE]."""
    known = (row < rows)[:, None] & (block * SIZE < columns)[None, :]
    place = row.to(tl.int64)[:, None] * (columns // SIZE) + block[None, :]
    pair = place[:, :, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, None, :]
    packed = tl.load(codes + pair, mask=known[:, :, None], other=0).to(tl.int32)
    largest = tl.load(absmax + place, mask=known, other=0)
    if NESTED:
        largest = tl.load(outer_levels + largest.to(tl.int32)) * tl.load(outer + place // OUTER, mask=known, other=0.0) + tl.load(offset)
    high, low = tl.load(levels + (packed >> 4)) * largest[:, :, None], tl.load(levels + (packed & 15)) * largest[:, :, None]
    return tl.reshape(tl.join(high, low), (row.shape[0], block.shape[0] * SIZE))


@triton.jit(do_not_specialize=["rows"])
def _fp8_weight_kernel(
    codes,
    levels,
    absmax,
    outer_levels,
    outer,
    offset,
    scale,
    out,
    rows,
    columns,
    step,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    numbers = _four_bits(codes, levels, absmax, outer_levels, outer, offset, row, block, rows, columns, NESTED, OUTER, SIZE)
    column = tl.program_id(1) * (BLOCKS * SIZE) + tl.arange(0, BLOCKS * SIZE)
    numbers = to_fp8(numbers / tl.load(scale + row, mask=row < rows, other=1.0)[:, None])
    tl.store(out + row.to(tl.int64)[:, None] * step + column[None, :], numbers, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _turned_fp8_weight_kernel(
    codes,
    levels,
    absmax,
    outer_levels,
    outer,
    offset,
    scale,
    out,
    rows,
    columns,
    step,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Four rows are one word, because single bytes are turned at a third of the pace.
    word = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.program_id(1) * (BLOCKS * SIZE) + tl.arange(0, BLOCKS * SIZE)
    inverse = 1 / tl.load(scale + column, mask=column < columns, other=1.0)[None, :]
    words = tl.zeros([ROWS // 4, BLOCKS * SIZE], tl.int32)
    for byte in tl.static_range(4):
        numbers = _four_bits(codes, levels, absmax, outer_levels, outer, offset, 4 * word + byte, block, rows, columns, NESTED, OUTER, SIZE)
        words |= to_fp8(numbers * inverse).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * byte)
    place = column.to(tl.int64)[:, None] * step + word[None, :]
    tl.store(out + place, tl.trans(words), mask=(column < columns)[:, None] & (4 * word < rows)[None, :])


def _fp8_weight_form(size: int, turned: bool) -> dict[str, int]:
    """Sizes of a program for a weight with blocks of so many numbers."""
    return {"SIZE": size, "ROWS": 128, "BLOCKS": max(1, (64 if turned else 128) // size), "num_warps": 4}


def dequantize_4bit_to_fp8(weight: torch.Tensor, state, scale: torch.Tensor, out: torch.Tensor, turned: bool) -> None:
    """Write a weight in 4 bits as fp8 codes.

    Args:
        weight, state: as `dequantize_4bit` takes them; the weight is [rows, columns], both divisible by 16.
        scale: float32, of each row, or of each column if turned.
        out: float8_e4m3fn [rows, columns], or [columns, rows] if turned; numbers of a row stand side by side. If turned, its row stride is
            divisible by 64 (`fp8.turned_codes` says why).
    """
    rows, columns = state.shape
    nested, size = state.nested, state.blocksize
    outer = (state.state2.code, state.state2.absmax, state.offset) if nested else (None, None, None)
    form = {**_fp8_weight_form(size, turned), "NESTED": nested, "OUTER": state.state2.blocksize if nested else 0}
    grid = (triton.cdiv(rows, form["ROWS"]), triton.cdiv(columns, form["BLOCKS"] * size))
    kernel, out = (_turned_fp8_weight_kernel, out.view(torch.int32)) if turned else (_fp8_weight_kernel, out)
    kernel[grid](weight.view(torch.uint8), state.code, state.absmax, *outer, scale, out, rows, columns, out.stride(0), **form)


@triton.jit
def _highest(numbers, row, columns, step, SIZE: tl.constexpr):
    """The largest absolute number of a row."""
    most = tl.zeros([SIZE], tl.float32)
    for start in range(0, columns, SIZE):
        column = start + tl.arange(0, SIZE)
        most = tl.maximum(most, tl.abs(tl.load(numbers + row * step + column, mask=column < columns, other=0.0).to(tl.float32)))
    return tl.max(most, 0)


@triton.jit
def _write_row(numbers, out, row, columns, step, inverse, SIZE: tl.constexpr):
    for start in range(0, columns, SIZE):
        column = start + tl.arange(0, SIZE)
        wide = tl.load(numbers + row * step + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(out + column, to_fp8(wide * inverse), mask=column < columns)


@triton.jit
def _quantize_rows_kernel(
    first, second, third, codes, scale, columns, second_columns, third_columns, step, second_step, third_step, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    most = _highest(first, row, columns, step, SIZE)
    if PARTS > 1:
        most = tl.maximum(most, _highest(second, row, second_columns, second_step, SIZE))
    if PARTS > 2:
        most = tl.maximum(most, _highest(third, row, third_columns, third_step, SIZE))
    factor = tl.where(most > 0, most / 448.0, 1.0)
    tl.store(scale + row, factor)
    here = codes + row * (columns + second_columns + third_columns)
    _write_row(first, here, row, columns, step, 1 / factor, SIZE)
    if PARTS > 1:
        _write_row(second, here + columns, row, second_columns, second_step, 1 / factor, SIZE)
    if PARTS > 2:
        _write_row(third, here + columns + second_columns, row, third_columns, third_step, 1 / factor, SIZE)


def quantize_rows(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`olpack.train.ops.fp8.quantize_rows` of up to three matrices."""
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    rows, columns = parts[0].shape[0], [part.shape[1] for part in parts]
    codes = parts[0].new_empty(rows, sum(columns), dtype=torch.float8_e4m3fn)
    scale = parts[0].new_empty(rows, 1, dtype=torch.float32)
    none = 3 - len(parts)
    steps = [part.stride(0) for part in parts] + [0] * none
    size = min(8192, triton.next_power_of_2(max(columns)))
    sizes = {"PARTS": len(parts), "SIZE": size, "num_warps": max(4, size // 512)}
    _quantize_rows_kernel[(rows,)](*parts, *[None] * none, codes, scale, *columns, *[0] * none, *steps, **sizes)
    return codes, scale


def compile_for(dtype: torch.dtype, *, hidden: int, middle: int, head: int, vocabulary: int, rank: int) -> Iterator[None]:
    """Compile the kernels that a step of a model of this shape runs, one at each iteration; a kernel of another form is compiled when it is met.

    Args:
        hidden, middle, head, vocabulary: sizes of a hidden state, of the MLP's middle, of a head, and of the vocabulary.
    """
    wide, count, start = torch.float32, 16, {"grid": (1,)}
    yield _norm_kernel.warmup(dtype, dtype, dtype, wide, count, hidden, 1e-6, 0.0, **_rows_of(hidden), **start)
    yield _norm_backward_kernel.warmup(dtype, dtype, wide, dtype, dtype, count, hidden, 0.0, **_rows_of(hidden), **start)
    yield _rotate_kernel.warmup(dtype, dtype, dtype, dtype, count, count, head // 2, **_rows_of(head // 2), **start)
    yield _loss_kernel.warmup(dtype, torch.int64, wide, vocabulary, 0.0, CAPPED=False, **_LOSS, **start)
    levels = (wide, torch.uint8, wide, wide, wide, dtype, count, hidden * middle)
    yield _dequantize_kernel.warmup(torch.uint8, *levels, NESTED=True, OUTER=256, **_dequantizing(64), **start)
    if rank <= MOST_RANK:
        pair, low = (dtype, dtype), (dtype, dtype, dtype, dtype)
        yield _adapted_product_kernel.warmup(*pair, *low, dtype, wide, count, middle, rank, middle, GELU=False, **_tile(rank), **start)
        of_rank = _gradients_tile(rank)
        yield _adapted_gradients_kernel.warmup(dtype, *pair, *low, dtype, wide, count, middle, rank, count, GELU=False, **of_rank, **start)


def run_once(device: torch.device, dtype: torch.dtype, *, hidden: int, middle: int, head: int, vocabulary: int, rank: int) -> None:
    """Run what `compile_for` compiles, over one token, to see whether it works here. A rank too large for the GPU goes to the plain functions.

    Raises:
        Exception: Triton's, whatever it is.
    """

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    _, scale = norm(ones(1, hidden), ones(hidden), 1e-6, 0.0)
    norm_backward(ones(1, hidden), ones(1, hidden), scale, ones(hidden), 0.0)
    rotate(ones(1, 1, head), ones(1, head), ones(1, head))
    loss(ones(1, vocabulary), torch.zeros(1, dtype=torch.int64, device=device), 0.0)
    low = MlpLowRank(ones(1, 2 * rank), ones(middle, rank), ones(middle, rank), ones(rank, middle))
    if takes(low):
        try:
            product(ones(1, middle), ones(1, middle), low, "silu")
            gradients(ones(1, middle), ones(1, middle), ones(1, middle), low, ones(1, rank), "silu")
        except triton.runtime.errors.OutOfResources:
            _refused.add(_padded(rank))
