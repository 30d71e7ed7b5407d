"""Products of frozen weights in fp8: the kernels write what the plain functions define, and training with them ends where it ends in 16 bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fp8_codes import assert_writes_codes
from tiny_models import write_model

from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.shape import MetaModel
from olpack.recipe import Train
from olpack.train import loop, planner
from olpack.train.batches import pack
from olpack.train.checks import check_training
from olpack.train.forward import Forward
from olpack.train.model import load_with_adapter
from olpack.train.ops import fp8, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exact(*shape: int) -> torch.Tensor:
    """Numbers that fp8 has, the largest of each row and column among them: Triton's interpreter does not round to the nearest."""
    numbers = torch.randint(-7, 8, shape, device=DEVICE).float() * 2.0 ** torch.randint(-3, 4, shape, device=DEVICE)
    numbers[:, 0] = numbers[0] = fp8.LARGEST
    return numbers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("columns", [[48], [48, 16], [32, 16, 9000]])
def test_the_kernel_quantizes_rows_side_by_side(columns):
    parts = [exact(7, size) for size in columns]
    parts[0][3] = 0
    for part in parts[1:]:
        part[3] = 0  # a row of zeros
    codes, scale = kernels.quantize_rows([parts[0].T.contiguous().T, *parts[1:]])
    wanted = fp8.quantize_rows(*(part.cpu() for part in parts))
    torch.testing.assert_close(scale.cpu(), wanted.scale)
    torch.testing.assert_close(codes.cpu().float(), wanted.codes.float())
    torch.testing.assert_close((codes.float() * scale).cpu(), torch.cat(parts, 1).cpu())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_kernel_writes_codes_of_a_weight_in_4_bits(turned, nested):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.randn(48, 192, device=DEVICE), blocksize=64, compress_statistics=nested, quant_type="nf4")
    weight = dequantize_4bit(packed, state)
    assert_writes_codes(lambda scale, codes: kernels.dequantize_4bit_to_fp8(packed, state, scale, codes, turned), weight, turned=turned)


@pytest.mark.parametrize("outs", [[48], [48, 16, 32], [64]], ids=str)
def test_a_gradient_through_the_kernel_is_that_of_the_dense_weights(outs):
    """Whose sizes side by side are no multiples of what it takes as a stride."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    strides, weights, dense = [], [], []
    for out in outs:
        packed, state = quantize_4bit(torch.randn(out, 192, device=DEVICE, dtype=torch.bfloat16), blocksize=64, quant_type="nf4")

        def write(scale, codes, *, turned, packed=packed, state=state):
            strides.append(codes.stride())
            kernels.dequantize_4bit_to_fp8(packed, state, scale, codes, turned)
            return True

        dense.append(dequantize_4bit(packed, state))
        weights.append(fp8.Weight(lambda dtype, weight=dense[-1]: weight.to(dtype), write))
    dys = [torch.randn(40, out, device=DEVICE, dtype=torch.bfloat16) for out in outs]
    found = fp8.Fp8Weights(weights, torch.bfloat16).gradient(dys)
    assert len(strides) == 2 * len(outs) and all(step % 64 == 0 and across == 1 for step, across in strides)
    near(found, sum(dy @ weight for dy, weight in zip(dys, dense, strict=True)), 0.06 if DEVICE.type == "cuda" else 0.1)


def test_a_product_and_its_gradient_are_those_of_the_dense_weights():
    weights = [torch.randn(32, 64), torch.randn(16, 64)]
    frozen = fp8.Fp8Weights([fp8.Weight(lambda dtype, weight=weight: weight.to(dtype), None) for weight in weights], torch.float32)
    x, dys = torch.randn(40, 64), [torch.randn(40, 32), torch.randn(40, 16)]
    for index, weight in enumerate(weights):
        near(frozen.product(fp8.quantize_rows(x), index), x @ weight.T)
    near(frozen.gradient(dys), sum(dy @ weight for dy, weight in zip(dys, weights, strict=True)))


def test_weights_whose_turned_codes_are_wrong_are_refused():
    def write(scale, codes, *, turned):
        if turned:
            codes.copy_(torch.randint(-7, 8, codes.shape))
        return turned

    with pytest.raises(RuntimeError, match="gradients differ by more than 20%"):
        fp8.Fp8Weights([fp8.Weight(lambda dtype: torch.eye(32, 64, dtype=dtype), write)], torch.float32)


def near(found: torch.Tensor, wanted: torch.Tensor, share: float = 0.06) -> None:
    assert (found - wanted).norm() < share * wanted.norm()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request, tmp_path_factory) -> Base:
    """qwen2: with biases."""
    return Base("tiny", write_model(tmp_path_factory.mktemp("fp8"), request.param))


def forward_of(base: Base, **options) -> Forward:
    torch.manual_seed(0)
    model = load_with_adapter(base, Train(), DEVICE).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return Forward(model, DEVICE, **{"checkpointing": False, **options})


ROWS = [TokenRow([(11 * index + start) % 250 + 4 for index in range(40)], [True] * 40, "", "") for start in range(3)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_point_where_those_in_16_bits_do(base, checkpointing):
    gradients = {}
    for in_fp8 in (False, True):
        forward = forward_of(base, checkpointing=checkpointing, in_fp8=in_fp8)
        assert forward.in_fp8 == in_fp8
        forward.loss(pack(ROWS, DEVICE)).backward()
        gradients[in_fp8] = torch.cat([parameter.grad.flatten() for parameter in forward.model.parameters() if parameter.grad is not None])
    assert not torch.equal(gradients[False], gradients[True])
    assert torch.nn.functional.cosine_similarity(gradients[False], gradients[True], dim=0) > 0.98


def test_held_out_rows_are_scored_in_16_bits(base):
    plain, other = (loop.evaluate(forward_of(base, in_fp8=in_fp8), ROWS, 512, "test") for in_fp8 in (False, True))
    assert plain == other


def test_training_ends_where_it_ends_in_16_bits(base, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "on_cpu", lambda settings, **_: planner.Fit(512, 512, False, in_fp8=settings.products == "fp8"))
    losses = {}
    for products in ("bf16", "fp8"):
        settings = Train(products=products, epochs=30, batch_size=3, learning_rate=2e-3)
        out = tmp_path / products
        losses[products] = loop.run(base, ROWS, ROWS, settings, out=out / "adapter", checkpoint=out / "checkpoint", key="").eval_loss_after
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03)


def test_layers_that_disagree_stay_in_16_bits(base, monkeypatch, capsys):
    monkeypatch.setattr("olpack.train.forward.FP8_TOLERANCE", 1e-4)
    forward = forward_of(base, in_fp8=True)
    assert not forward.in_fp8
    assert "stay in 16 bits" in capsys.readouterr().err
    assert loop.evaluate(forward, ROWS, 512, "test") == loop.evaluate(forward_of(base), ROWS, 512, "test")


def test_a_gpu_without_them_trains_in_16_bits(base, monkeypatch, capsys):
    def refused(*_):
        raise RuntimeError("scaled products need another GPU\nat line 1")

    monkeypatch.setattr(fp8, "multiply", refused)
    forward = forward_of(base, in_fp8=True)
    assert not forward.in_fp8
    assert "stay in 16 bits: scaled products need another GPU\n" in capsys.readouterr().err
    assert loop.evaluate(forward, ROWS, 512, "test") == loop.evaluate(forward_of(base), ROWS, 512, "test")


@pytest.mark.parametrize(
    ("settings", "multiplies", "hidden", "tokens", "chosen"),
    [
        ({"products": "bf16"}, True, 4096, 16384, False),
        ({"products": "auto"}, True, 4096, 16384, True),
        ({"products": "auto"}, False, 4096, 16384, False),
        ({"products": "auto"}, True, 4096, 2048, False),  # a step waits for the host
        ({"products": "auto"}, True, 512, 16384, False),
        ({"products": "auto", "quantization": "none"}, True, 4096, 16384, False),
        ({"products": "auto", "method": "dora"}, True, 4096, 16384, False),
        ({"products": "fp8"}, True, 512, 128, True),
    ],
)
def test_auto_takes_fp8_where_it_is_faster(settings, multiplies, hidden, tokens, chosen):
    model = SimpleNamespace(shape=SimpleNamespace(hidden=hidden), published={})
    assert (multiplies and planner._worth_fp8(model, Train(**settings), tokens)) == chosen


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        ({"quant_method": "gguf", "types": ["Q4_K", "Q6_K", "F32"]}, True),
        ({"quant_method": "gguf", "types": ["F16", "Q8_0"]}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
    ],
)
def test_auto_takes_fp8_for_blocks_of_a_gguf(stored, chosen):
    model = SimpleNamespace(shape=SimpleNamespace(hidden=4096), published={"quantization_config": stored})
    assert planner._worth_fp8(model, Train(products="auto"), 16384) == chosen
    assert not planner._worth_fp8(model, Train(products="auto"), 2048)


def test_the_summary_names_the_choice(base):
    fit = planner.on_gpu(MetaModel(base.config, base.label), ROWS, Train(products="fp8"), 8 << 30, multiplies_fp8=True)
    assert fit.in_fp8 and ", products in fp8: " in fit.summary
    sharded = planner.on_gpu(MetaModel(base.config, base.label), ROWS, Train(products="fp8", sharding="full"), 8 << 30, gpus=2, multiplies_fp8=True)
    assert not sharded.in_fp8


@pytest.mark.parametrize(
    ("settings", "multiplies", "sentence"),
    [
        ({}, False, "no GPU that multiplies in fp8"),
        ({"method": "dora"}, True, "lora and rslora without dropout"),
        ({"dropout": 0.1}, True, "lora and rslora without dropout"),
        ({"sharding": "full"}, True, "are not multiplied in fp8"),
    ],
)
def test_fp8_that_is_not_possible_is_refused_before_training(base, monkeypatch, settings, multiplies, sentence):
    monkeypatch.setattr(planner, "multiplies_fp8", lambda device: multiplies)
    with pytest.raises(OlpackError, match=sentence):
        check_training(base, Train(products="fp8", **settings), on_gpu=multiplies)
