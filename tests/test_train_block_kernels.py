"""The Triton kernels for blocks of GGUF files give ggml's weights, and the fp8 codes of these."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from absent_gpu import compile_kernels
from fp8_codes import assert_writes_codes
from random_blocks import SCALES, random_blocks

from olpack.llamacpp import library
from olpack.model.gguf_blocks import TYPES, BlockType
from olpack.train.block_experts import BlockExperts
from olpack.train.frozen import BlockLinear
from olpack.train.ops import block_kernels, blocks, fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITH_KERNELS = [type_ for type_ in TYPES.values() if type_.name in block_kernels.TYPES]
each_type = pytest.mark.parametrize("type_", WITH_KERNELS, ids=lambda type_: type_.name)
NUMBERS = {type_.name: number for number, type_ in TYPES.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ggmls(type_: BlockType, packed: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns]."""
    weights = np.empty((len(packed), type_.columns(packed.shape[1])), np.float32)
    library.dequantize_rows(NUMBERS[type_.name], packed.cpu().numpy(), weights)
    return torch.from_numpy(weights)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but for numbers that are none."""
    defined = ~expected.isnan()
    bits = {4: torch.int32, 2: torch.int16}[expected.element_size()]
    found = found.cpu()
    return bool((found.isnan() == ~defined).all()) and torch.equal(found[defined].view(bits), expected[defined].view(bits))


def test_every_type_with_blocks_has_a_kernel():
    assert {type_.name for type_ in WITH_KERNELS} == {type_.name for type_ in TYPES.values() if type_.weights > 1}


@each_type
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 3, 5)], ids=str)
def test_weights_are_ggmls_bit_for_bit(type_, shape):
    """Random bytes have all scales: negative and subnormal ones, and such that are no numbers. Some blocks are all zeros, some all ones."""
    *rows, count = shape
    packed = torch.randint(0, 256, (*rows, count, type_.bytes), dtype=torch.uint8)
    flat = packed.view(-1, type_.bytes)
    if len(flat) > 2:
        flat[1], flat[2] = 0, 255
    if len(flat) > 4:
        flat[3], flat[4] = flat[0], flat[0]
        for at in SCALES.get(type_.name, ()):
            flat[3, at : at + 2], flat[4, at : at + 2] = torch.tensor([3, 0]), torch.tensor([255, 131])  # subnormal: 3 and -1023 times 2^-24
    packed = packed.view(*rows, -1)
    expected = ggmls(type_, packed.view(-1, packed.shape[-1])).view(*rows, -1)
    with np.errstate(all="ignore"):  # of the interpreter's numpy
        assert same(block_kernels.dequantize(type_, packed.to(DEVICE), torch.float32), expected)
        assert same(block_kernels.dequantize(type_, packed.to(DEVICE), torch.float16), expected.half())
        narrow = block_kernels.dequantize(type_, packed.to(DEVICE), torch.bfloat16)
    if DEVICE.type == "cuda":
        assert same(narrow, expected.bfloat16())  # which Triton's interpreter rounds towards zero
    else:
        torch.testing.assert_close(narrow, expected.bfloat16(), equal_nan=True, rtol=1e-2, atol=0)


@each_type
def test_rows_that_lie_apart(type_):
    packed = random_blocks(type_, 6, 512, DEVICE, 0.01)
    assert same(block_kernels.dequantize(type_, packed[::2], torch.float32), ggmls(type_, packed[::2].contiguous()))


@each_type
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (144, 256)])
def test_fp8_codes_are_those_of_the_weights(type_, turned, rows, columns):
    packed = random_blocks(type_, rows, columns, DEVICE, 2.0**-4, 0.25)
    weight = ggmls(type_, packed).to(DEVICE)
    assert_writes_codes(lambda scale, codes: block_kernels.dequantize_to_fp8(type_, packed, scale, codes, turned), weight, turned=turned)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["Q4_0", "MXFP4"])
def test_fp8_codes_of_numbers_that_fp8_has(name, turned):
    """Where scales are powers of two, nothing is rounded."""
    type_ = TYPES[NUMBERS[name]]
    packed = random_blocks(type_, 32, 256, DEVICE, 2.0**-6)
    dense = ggmls(type_, packed).to(DEVICE)
    dense = dense.T if turned else dense
    exact = (dense * 64).to(torch.float8_e4m3fn)
    out = fp8.turned_codes(*dense.shape, DEVICE)
    block_kernels.dequantize_to_fp8(type_, packed, torch.full((len(dense), 1), 2.0**-6, device=DEVICE), out, turned)
    assert torch.equal(exact.float(), dense * 64)
    assert torch.equal(out.float(), exact.float())


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """Names of the types whose kernels run; they take the place of plain torch, as on a GPU."""
    names: list[str] = []

    def recorded(function):
        return lambda type_, *arguments: (names.append(type_.name), function(type_, *arguments))[1]

    for name in ("dequantize", "dequantize_to_fp8"):
        monkeypatch.setattr(block_kernels, name, recorded(getattr(block_kernels, name)))
    monkeypatch.setattr(blocks, "kernels_for", lambda _: block_kernels)
    monkeypatch.setattr(blocks, "_works", {})
    return names


def test_layers_and_experts_take_their_weights_from_the_kernels(used):
    type_ = TYPES[NUMBERS["Q4_K"]]
    layer = BlockLinear(type_, 16, 256, None, torch.float32)
    layer.register_buffer("blocks", packed := random_blocks(type_, 16, 256, DEVICE, 0.01, 0.05))
    assert torch.equal(layer.dequantize().cpu(), ggmls(type_, packed))
    codes = torch.empty(16, 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    assert layer.write_fp8(torch.ones(16, 1, device=DEVICE), codes, turned=False)
    assert used == ["Q4_K"] * 3  # once to see whether it works

    used.clear()
    type_ = TYPES[NUMBERS["Q4_0"]]
    plain = SimpleNamespace(num_experts=2, is_concatenated=True, _apply_gate=lambda both: both[:, :32], _parameters={})
    experts = BlockExperts(plain, {part: (type_, (2, 32, 32)) for part in ("gate", "up", "down")}, torch.float32)
    for part in experts.types:
        experts.register_buffer(part, random_blocks(type_, 64, 32, DEVICE, 0.01).view(2, 32, -1))
    x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    experts(x, torch.tensor([[0], [1], [0]], device=DEVICE), torch.ones(3, 1, device=DEVICE)).sum().backward()
    assert used == ["Q4_0"] * (1 + 2 * 3 * 2)  # each of two experts, forward and backward


def test_a_type_whose_kernel_fails_is_dequantized_by_torch(used, monkeypatch, capsys):
    q4_0, q8_0 = TYPES[NUMBERS["Q4_0"]], TYPES[NUMBERS["Q8_0"]]
    monkeypatch.setattr(block_kernels, "_write", lambda *_: (_ for _ in ()).throw(RuntimeError("no such GPU\nline 2")))
    packed = random_blocks(q4_0, 16, 64, DEVICE, 0.01)
    for _ in range(2):
        assert torch.equal(blocks.dequantize(q4_0, packed, torch.float32).cpu(), ggmls(q4_0, packed))
    assert not blocks.write_fp8(q4_0, packed, torch.ones(16, 1), torch.empty(16, 64).to(torch.float8_e4m3fn), turned=False)
    monkeypatch.setattr(block_kernels, "_write", lambda type_, packed, scale, out: out.zero_())
    packed = random_blocks(q8_0, 16, 64, DEVICE, 0.01)
    assert torch.equal(blocks.dequantize(q8_0, packed, torch.float32).cpu(), ggmls(q8_0, packed))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "Q4_0" in lines[0] and "no such GPU)" in lines[0] and "Q8_0" in lines[1] and "other weights" in lines[1]


def test_weights_in_16_bits_have_no_kernel(used):
    bfloat16 = TYPES[NUMBERS["BF16"]]
    weights = torch.randn(4, 8).bfloat16()
    assert torch.equal(blocks.dequantize(bfloat16, weights.view(torch.uint8), torch.bfloat16), weights)
    assert not used


COMPILED = """
from olpack.train.ops import block_kernels
print(*(compiled.metadata.name for compiled in block_kernels.compile_for(sys.argv[2:], torch.bfloat16)))
"""


def test_the_kernels_are_compiled_for_a_gpu(tmp_path):
    names = ["Q3_K", "Q5_0", "IQ4_XS", "BF16"]  # the last has no kernel
    done = compile_kernels(COMPILED, 86, *names, cache=tmp_path)
    assert done.stdout.split() == ["_dequantize_kernel"] * 3, done.stderr
