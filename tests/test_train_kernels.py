"""The Triton kernels compute what the plain functions do. Without a GPU, Triton's interpreter runs them (`conftest.py` says so)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from absent_gpu import compile_kernels
from gated import gated_mlp
from tiny_models import write_model
from triton.runtime.errors import OutOfResources

from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train.batches import pack
from olpack.train.forward import Forward
from olpack.train.ops import kernels, pointwise
from olpack.train.ops.limits import UNCOUNTED
from olpack.train.ops.low_rank import MlpLowRank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = {"rtol": 1e-5, "atol": 1e-5}
HALF = {"rtol": 4e-3, "atol": 4e-3}  # of float16, which the interpreter multiplies, too


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, WIDE), (torch.bfloat16, {"rtol": 1e-2, "atol": 1e-2})])
@pytest.mark.parametrize("size", [16, 40, 4096 + 8])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_and_its_gradient(dtype, near, size, offset):
    x, weight, dy = numbers(7, size, dtype=dtype), numbers(size, dtype=dtype), numbers(7, size, dtype=dtype)
    wanted = pointwise.norm.plain(x, weight, 1e-6, offset)
    torch.testing.assert_close(kernels.norm(x, weight, 1e-6, offset), wanted, **near)
    gradient = pointwise.norm_backward.plain(dy, x, wanted[1], weight, offset)
    torch.testing.assert_close(kernels.norm_backward(dy, x, wanted[1], weight, offset), gradient, **near)


@pytest.mark.parametrize("size", [8, 24, 128])
def test_the_rotation(size):
    x, cos, sin = numbers(5, 3, size), numbers(5, size), numbers(5, size)
    torch.testing.assert_close(kernels.rotate(x, cos, sin), pointwise.rotate.plain(x, cos, sin), **WIDE)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("words", [300, 9000])
def test_the_loss_takes_the_logits_place(softcap, words):
    logits, targets = 5 * numbers(6, words), torch.randint(0, words, (6,), device=DEVICE)
    targets[[1, 5]] = UNCOUNTED
    losses, gradient = pointwise.loss.plain(logits.clone(), targets, softcap)
    found, place = kernels.loss(logits, targets, softcap)
    torch.testing.assert_close((found, place), (losses, gradient), **WIDE)
    assert place.data_ptr() == logits.data_ptr()
    assert ((found != 0).tolist() == (targets != UNCOUNTED).tolist()) and not place[[1, 5]].any()


FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("gate", FUNCTIONS)
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(70, 200, 5), (33, 130, 16), (5, 300, 40), (200, 64, 64)])
def test_a_gate_with_its_adapters(gate, tokens, columns, rank):
    half = torch.float16
    gated, upped, dmiddle = numbers(3, tokens, columns, dtype=half).unbind(0)
    of_b = (numbers(columns, rank, dtype=half) / rank**0.5 for _ in range(2))
    adapters = MlpLowRank(numbers(tokens, 2 * rank, dtype=half), *of_b, numbers(rank, columns, dtype=half) / columns**0.5)
    dlow = numbers(tokens, rank, dtype=half)
    assert kernels.takes(adapters)
    wanted, gradients = gated_mlp(FUNCTIONS[gate], gated, upped, dmiddle, adapters, dlow)
    near_whole(kernels.product(gated, upped, adapters, gate), wanted)
    of_gate, of_up, of_down = kernels.gradients(dmiddle, gated, upped, adapters, dlow, gate)
    near_whole((gated, upped, of_gate, of_up, of_down.T), (*gradients[:2], *gradients[3:]))


def near_whole(found, wanted) -> None:
    """Apart by no more than rounding, of the whole tensor: sums of many terms may be near zero."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other).norm() <= 2e-3 * other.norm()


@pytest.mark.parametrize("gate", FUNCTIONS)
def test_a_gate_alone(gate):
    gated, upped, dmiddle = numbers(3, 33, 130).unbind(0)
    middle, low = kernels.product(gated, upped, None, gate)
    plain = pointwise.gate_of(FUNCTIONS[gate])
    torch.testing.assert_close(middle, plain.function(gated) * upped, **WIDE)
    assert low is None
    wanted = [value.clone() for value in (dmiddle, gated, upped)]
    plain._plain_gradients(*wanted)
    assert kernels.gradients(dmiddle, gated, upped, None, None, gate) is None
    torch.testing.assert_close([dmiddle, gated, upped], wanted, **WIDE)


def test_what_a_kernel_does_not_take():
    def adapters(rank: int, dtype: torch.dtype) -> MlpLowRank:
        sizes = ((4, 2 * rank), (8, rank), (8, rank), (rank, 8))
        return MlpLowRank(*(torch.empty(*size, dtype=dtype) for size in sizes))

    assert kernels.takes(adapters(kernels.MOST_RANK, torch.bfloat16))
    assert not kernels.takes(adapters(kernels.MOST_RANK + 1, torch.bfloat16))
    assert not kernels.takes(adapters(4, torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off instead of rounding it
@pytest.mark.parametrize("shape", [(96, 128), (50, 48)])  # the last block is not whole
def test_4_bits_are_what_the_formula_makes_of_them(kind, nested, stored, dtype, shape):
    from bitsandbytes.functional import quantize_4bit
    from four_bits_reference import dequantized

    packed, state = quantize_4bit(numbers(*shape, dtype=dtype), quant_type=kind, compress_statistics=nested, quant_storage=stored)
    assert torch.equal(kernels.dequantize_4bit(packed, state).cpu(), dequantized(packed, state))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_learns_the_same_with_them(tmp_path, monkeypatch, kind):
    from test_train_forward import ROWS, SENTENCEPIECE, plain_loss, same_gradients, with_adapter

    for module in ("forward", "model"):
        monkeypatch.setattr(f"olpack.train.{module}.compute_dtype", lambda _: torch.float32)
    base = Base("tiny", write_model(tmp_path / "model", kind, **(SENTENCEPIECE if kind == "gemma2" else {"tied": False})))
    plain, model = (with_adapter(base, Train(rank=4), DEVICE) for _ in range(2))
    wanted = sum(plain_loss(plain, row) for row in ROWS)
    wanted.backward()
    monkeypatch.setattr(pointwise, "kernels_for", lambda _: kernels)  # also for a CPU's tensors
    loss = Forward(model, DEVICE, checkpointing=False).loss(pack(ROWS, DEVICE))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    same_gradients(model, plain, 1e-4)


def test_each_kernel_runs_once_before_it_is_used(monkeypatch):
    sizes = {"hidden": 40, "middle": 72, "head": 16, "vocabulary": 300}
    kernels.run_once(DEVICE, torch.float16, **sizes, rank=20)
    monkeypatch.setattr(kernels, "_refused", set())

    def too_large(*_):
        raise OutOfResources(81920, 65536, "shared memory")

    monkeypatch.setattr(kernels, "gradients", too_large)
    kernels.run_once(DEVICE, torch.float16, **sizes, rank=20)
    ranks = {rank: MlpLowRank(*(torch.empty(rank, rank, dtype=torch.float16) for _ in range(4))) for rank in (16, 20)}
    assert kernels.takes(ranks[16]) and not kernels.takes(ranks[20])


def test_sizes_that_a_config_has_otherwise_are_usual_ones():
    assert pointwise._sizes({"hidden_size": 64, "num_attention_heads": [4, 8], "head_dim": None, "intermediate_size": 96}, 8) == {
        "hidden": 64,
        "middle": 96,
        "head": 2,
        "vocabulary": 32000,
        "rank": 8,
    }
    assert pointwise._sizes({}, 8)["middle"] == 4 * 4096


COMPILED = """
from olpack.train.ops import kernels
list(kernels.compile_for(torch.bfloat16, hidden=4096, middle=14336, head=128, vocabulary=128256, rank=int(sys.argv[2])))
for name in sorted(name for name in dir(kernels) if name.endswith("_kernel")):
    for compiled in getattr(kernels, name).device_caches[0][0].values():
        print(name, compiled.metadata.shared)
"""
SHARED = 99 << 10  # bytes of shared memory that a program may have on the smallest of these GPUs


@pytest.mark.parametrize(("capability", "rank"), [(86, 64), (90, 16), (120, 32)])
def test_the_kernels_are_compiled_for_a_gpu(tmp_path, capability, rank):
    done = compile_kernels(COMPILED, capability, str(rank), cache=tmp_path)
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert shared.keys() == {
        "_adapted_gradients_kernel",
        "_adapted_product_kernel",
        "_dequantize_kernel",
        "_loss_kernel",
        "_norm_backward_kernel",
        "_norm_kernel",
        "_rotate_kernel",
    }, done.stderr
    assert all(int(size) <= SHARED for size in shared.values())
