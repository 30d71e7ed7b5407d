"""4-bit weights on a CPU are those of the formula, whatever bitsandbytes' kernel makes of them on this machine."""

from __future__ import annotations

import logging

import pytest
import torch
from four_bits_reference import dequantized
from tiny_models import write_model

from olpack.commands import doctor
from olpack.model import four_bits
from olpack.model.base import Base
from olpack.model.frozen_weights import FrozenQuantization
from olpack.recipe import Train
from olpack.train.model import load_with_adapter
from olpack.train.ops.lora import _frozen_weight

CPU = torch.device("cpu")
SHAPES = [(96, 128), (50, 48), (33, 96), (7, 33), (2, 2), (300, 70)]


def _neighbour(kernel, packed, scales, block, kind, shape, dtype):
    """Rows of broken blocks get another block's scale, as on some CPUs."""
    return kernel(packed, scales.roll(1) if shape[-1] % block else scales, block, kind, shape, dtype)


def _zeros(kernel, packed, scales, block, kind, shape, dtype):
    return torch.zeros(tuple(shape), dtype=dtype)


@pytest.fixture(params=["as it is", _neighbour, _zeros])
def kernel(request):
    """The library's kernel on this machine, and two damaged ones in its place. Nothing of it stays."""
    import bitsandbytes  # noqa: F401, which would register its own over a damaged one

    four_bits.check_kernel.cache_clear()
    damaged = None
    if request.param != "as it is":
        damaged = torch.library.Library("bitsandbytes", "IMPL")
        damaged.impl("dequantize_4bit", lambda *arguments: request.param(four_bits.dequantize, *arguments), "CPU")
    yield request.param
    four_bits.check_kernel.cache_clear()
    if damaged is not None:
        damaged._destroy()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_4_bits_are_those_of_the_formula(kernel, kind, nested):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    four_bits.check_kernel()
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(torch.arange(1, shape[0] + 1)[:, None]).to(dtype)
            packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            found, wanted = dequantize_4bit(packed, state), dequantized(packed, state)
            assert found.dtype == wanted.dtype == dtype
            torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_training_computes_with_the_weights_of_the_formula(kernel, kind, tmp_path):
    from bitsandbytes.nn import Linear4bit

    base = Base("tiny", write_model(tmp_path / "model", "llama", hidden_size=48, head_dim=12, intermediate_size=72))
    model = load_with_adapter(base, Train(rank=4, quantization=kind), CPU).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(layer.in_features % 64 for layer in layers)
    for layer in layers:
        wanted = dequantized(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(_frozen_weight(layer)[0](torch.float32), wanted)
        x = torch.eye(layer.in_features, requires_grad=True)
        out = layer(x)
        out.sum().backward()
        torch.testing.assert_close(out, wanted.T)
        torch.testing.assert_close(x.grad[0], wanted.sum(dim=0))


def test_what_a_dequantized_merge_starts_from_is_what_training_saw(kernel):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    held = FrozenQuantization("nf4", True, "float32", "default", [])
    torch.testing.assert_close(held.round_trip(weight), dequantized(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)))


def test_doctor_names_a_kernel_that_is_replaced(kernel):
    message = doctor._nf4()
    assert ("which bitsandbytes gets wrong here" in message) == (four_bits.check_kernel() is not None)
    if kernel != "as it is":
        assert "which bitsandbytes gets wrong here" in message


def test_a_kernel_that_is_right_stays(kernel):
    if kernel == "as it is":
        right = torch.library.Library("bitsandbytes", "IMPL")
        right.impl("dequantize_4bit", four_bits.dequantize, "CPU")
        assert four_bits.check_kernel() is None
        right._destroy()


def test_bitsandbytes_asks_for_no_package_and_may_say_all_else(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already `pip install kernels`", "no")
    logger.warning("another one")
    assert [record.getMessage() for record in caplog.records] == ["another one"]
